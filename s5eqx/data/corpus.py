"""Corpora from the hub or from local files, in three parts."""

import re
from pathlib import Path

from s5eqx._typing import checked
from s5eqx.data._hub import hub_splits
from s5eqx.data._local import SUFFIXES, local_documents
from s5eqx.data.documents import Splits, cut, unique_paragraphs

_SHARES = {"validation": 0.05, "test": 0.05}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@checked
def read_corpus(
    source: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    column: str = "text",
    unique: bool = False,
    seed: int = 0,
) -> Splits:
    """A corpus by its name on the Hugging Face hub, or from files by a pattern such as `path/*.txt`.

    On the hub a row is a document, an empty one is none, and `train`, `validation` and `test` are taken as they are
    given; where one of the last two is missing, 5 % of the documents of `train` take its place. A local `.txt` is a
    document, and so is a row of a `.parquet` and a line of a `.jsonl`; the parts get 90 %, 5 % and 5 % of them.

    Texts are not changed, but that every line of a `.txt` ends as on Unix. WikiText-103 as the published perplexities
    have it, raw and with a line for a document, is `read_corpus("Salesforce/wikitext", config="wikitext-103-raw-v1")`.

    **Arguments:**

    - `source`: the name or pattern. In a pattern `**` stands for folders of any depth; all files have one suffix.
    - `config`: for the hub, which of the corpora of that name; `None` where there is but one.
    - `revision`: for the hub, a commit or tag; `None` for the newest.
    - `column`: which column holds the text.
    - `unique`: leave out paragraphs that occurred before, and documents of nothing else, before the corpus is split.
    - `seed`: chooses which documents go to which part, where they are not given.

    **Raises:** `ValueError` for what is not there or cannot be read, `ConnectionError` where the hub is out of reach
    and the corpus is not in its cache. Texts are read late: a wrong column or a damaged file shows when they are.
    """
    if _is_local(source):
        if config is not None or revision is not None:
            raise ValueError(f"config and revision are for corpora of the hub, and {source!r} names files")
        given = {"train": local_documents(source, column=column)}
    else:
        given = hub_splits(source, config=config, revision=revision, column=column)
    if unique and len(given) > 1:
        raise ValueError(
            f"unique looks for repetitions over a whole corpus, which must not be split yet; {source} comes as "
            f"{', '.join(given)}. Leave `unique` out."
        )
    train = unique_paragraphs(given["train"]) if unique else given["train"]
    missing = {name: share for name, share in _SHARES.items() if name not in given}
    return Splits(**{**given, **(cut(train, missing, seed=seed) if missing else {})})


def _is_local(source):
    path = Path(source).expanduser()
    return path.suffix in SUFFIXES or path.exists() or not _HUB_NAME.fullmatch(source)
