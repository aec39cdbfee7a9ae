"""What lies on the Hugging Face hub, and what is said when it cannot be had."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from s5eqx.data.documents import Documents, column_of

_SECONDS = 10
"""How long the hub may take to answer before it counts as out of reach."""


def hub_splits(name: str, *, config: str | None, revision: str | None, column: str) -> dict[str, Documents]:
    """The splits `train`, `validation` and `test` of a corpus, as far as it has them."""
    instead = "Without a network, train on local files: --data 'path/*.txt', or .parquet, or .jsonl."
    found = hub_dataset(name, "corpus", config=config, revision=revision, instead=instead)
    if "train" not in found:
        raise ValueError(
            f"a corpus must have a split called train; {_told(name, config)} has {', '.join(map(str, found))}"
        )
    return {
        split: _documents(found[split], f"{_told(name, config)} {split}", column)
        for split in ("train", "validation", "test")
        if split in found
    }


def hub_dataset(
    name: str, kind: str, *, config: str | None = None, revision: str | None = None, instead: str
) -> Mapping[Any, Any]:
    """The splits of a data set, of the hub or of the cache of `datasets`.

    Messages call it a `kind`, and say what serves `instead` where there is no network.
    """
    problem = _unreachable(name, "dataset")
    import datasets

    # What `datasets` has in its cache serves as well. It is told that there is no network, since it would else try for
    # half a minute to find one.
    with _offline(datasets) if problem else contextlib.nullcontext():
        try:
            if problem and revision is not None:
                raise ValueError("the cache does not say which revision it holds")
            return datasets.load_dataset(name, config, revision=revision)
        except (OSError, ValueError) as failure:
            if problem is None:
                raise ValueError(f"the {kind} {_told(name, config)} cannot be loaded: {failure}") from failure
            raise ConnectionError(
                f"the Hugging Face hub cannot be reached ({problem}), and the cache of `datasets` does not give the "
                f"{kind} {_told(name, config)} ({failure}). {instead}"
            ) from failure


def hub_tokenizer(name: str) -> Path:
    """The file `tokenizer.json` of a model: of the hub's local cache if it is there, else of the hub."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", local_files_only=True))
    if problem := _unreachable(name, "model"):
        raise ConnectionError(
            f"the tokenizer {name!r} is not in the cache, and the Hugging Face hub cannot be reached ({problem}). "
            "Without a network, give the path of a tokenizer.json, train a tokenizer on the corpus, or take bytes."
        )
    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except EntryNotFoundError as failure:
        raise ValueError(f"{name!r} of the hub has no file tokenizer.json; name a model that has one") from failure


def _unreachable(name: str, kind: Literal["dataset", "model"]) -> str | None:
    """Why the hub cannot be asked for `name`; `None` if it can. One short question in place of many retries."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as answer:
        first = str(answer).strip().splitlines()[0]
        raise ValueError(
            f"the Hugging Face hub does not give the {kind} {name!r}: {first}. Check the name, and log in if it is not "
            "public; local files are named by a path such as 'path/*.txt'."
        ) from answer
    except Exception as problem:  # each HTTP library that the hub's client has used has errors of its own
        return f"{type(problem).__name__}: {problem}"
    return None


@contextlib.contextmanager
def _offline(datasets) -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _documents(rows, name, column):
    def read():
        for batch in rows.iter(batch_size=1000):
            yield from column_of(batch, column, name)

    # Of the data as they were prepared: it changes with the corpus, its revision, its configuration and its split.
    return Documents(name, f"hub {rows._fingerprint} {column}", read, len(rows))


def _told(name, config):
    return name if config is None else f"{name} {config}"
