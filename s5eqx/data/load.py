"""From a corpus and a tokenizer to a task."""

from pathlib import Path
from typing import NamedTuple

from s5eqx._typing import checked
from s5eqx.data.documents import Splits
from s5eqx.data.text import Text
from s5eqx.data.tokenizer import AbstractTokenizer
from s5eqx.data.tokens import Tokens, tokenize


class TextData(NamedTuple):
    """A task to train on, the same evaluated on the test part, and the tokens of each part."""

    task: Text
    test: Text
    tokens: dict[str, Tokens]


@checked
def load_text(
    corpus: Splits,
    tokenizer: AbstractTokenizer,
    *,
    length: int,
    seed: int = 0,
    packed: bool = False,
    vocab_size: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> TextData:
    """A corpus as tasks for training:

        corpus = read_corpus("path/*.txt")
        text = load_text(corpus, Bytes(), length=1024)
        trainer = Trainer(build, text.task, policy, batch_size=16)

    **Arguments:**

    - `length`, `seed`: as for `Text`. `text.task` is evaluated on the validation part.
    - `packed`: reset the state of the model where a document begins.
    - `vocab_size`: the model's V, which must not be below the tokenizer's; `None` to compare them elsewhere.
    - `cache`, `progress`: as for `tokenize`.
    """
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the model's vocab_size must be at least {tokenizer.vocab_size}, the tokenizer's; it is {vocab_size}. "
            "Build the model with the tokenizer's vocab_size, or take another tokenizer."
        )
    tokens = {
        name: tokenize(documents, tokenizer, cache=cache, progress=progress)
        for name, documents in corpus._asdict().items()
    }
    reset_at = tokenizer.end_of_text if packed else None
    train, validation, test = (tokens[name].array for name in ("train", "validation", "test"))
    task = Text(train, validation, length=length, seed=seed, reset_at=reset_at)
    return TextData(task, task.on(test, split="test"), tokens)
