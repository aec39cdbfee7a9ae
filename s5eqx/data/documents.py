"""Documents in a fixed order, how repetitions leave them, and how they are split."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from s5eqx._typing import Integer, checked
from s5eqx.data._random_order import SPLIT, random_order

_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts that are read anew at each iteration, and are never held all at once.

    Texts of nothing but white space are left out.

    **Arguments:**

    - `name`: what messages call them.
    - `fingerprint`: says which texts these are; others must have another.
    - `read`: reads them, always in the same order.
    - `at_most`: how many there can be, if that is known. Progress bars show it.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[str]]
    at_most: int | None = None

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.read() if text and not text.isspace())


class Splits(NamedTuple):
    """A corpus in three parts."""

    train: Documents
    validation: Documents
    test: Documents


@checked
def unique_paragraphs(documents: Documents) -> Documents:
    """The documents without the paragraphs that occurred before, in the same document or in one before it.

    Blank lines separate paragraphs; one blank line joins those that stay. White space at a paragraph's ends makes no
    difference. What is remembered of a paragraph is a hash of 128 bits.
    """

    def read():
        seen = set()
        for text in documents:
            kept = []
            for paragraph in _BLANK_LINES.split(text):
                digest = hashlib.blake2b(paragraph.strip().encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    kept.append(paragraph)
            yield "\n\n".join(kept)

    return Documents(documents.name, f"{documents.fingerprint}, unique paragraphs", read, documents.at_most)


@checked
def cut(documents: Documents, shares: Mapping[str, float], *, seed: int = 0) -> dict[str, Documents]:
    """Documents drawn at random for each of `shares`, and what is left as `train`.

    Whole documents are drawn, by their number and `seed` alone; a share has the nearest number of documents, and one at
    least. Each part keeps the order of the documents.

    **Arguments:**

    - `shares`: the fraction of all documents that a part gets, by the name of the part.

    **Raises:** `ValueError`, when the documents are first read, if there are fewer of them than parts.
    """
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares must be above 0 and together below 1, so that some are left; got {dict(shares)}")
    names = [*shares, "train"]

    @functools.cache
    def parts() -> Integer[np.ndarray, " n"]:
        """The part of each document."""
        count = sum(1 for _ in documents)
        sizes = [max(1, round(share * count)) for share in shares.values()]
        if sum(sizes) >= count:
            raise ValueError(
                f"{documents.name} must have a document at least for each of {', '.join(names)}; it has {count} with "
                "text. Give more files, or the same text in more of them: documents are never divided."
            )
        part = np.full(count, len(shares), np.uint8)
        order = random_order(seed, SPLIT, 0, count)
        for number, some in enumerate(np.split(order, np.cumsum(sizes))[: len(sizes)]):
            part[some] = number
        return part

    def take(number):
        return lambda: (text for text, part in zip(documents, parts(), strict=True) if part == number)

    told = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    return {
        name: Documents(
            f"{documents.name} {name}", f"{documents.fingerprint}, {name} of [{told}] seed {seed}", take(number)
        )
        for number, name in enumerate(names)
    }


def column_of(rows: Mapping[str, list[Any]], column: str, source: str) -> list[str]:
    """The texts of some rows.

    **Raises:** `ValueError` if there is no such column, or if it holds anything but texts.
    """
    if column not in rows:
        raise ValueError(f"{source} has no column {column!r}; name one of its columns: {', '.join(rows)}")
    for text in rows[column]:
        if not isinstance(text, str):
            raise ValueError(f"each row of the column {column!r} must hold a text; {source} has one of {text!r}")
    return rows[column]
