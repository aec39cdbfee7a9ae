"""The tokens of documents as one array on the disk."""

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s5eqx._typing import Integer, checked
from s5eqx.data._cache import cache_folder, one_at_a_time, written_whole
from s5eqx.data.documents import Documents
from s5eqx.data.tokenizer import AbstractTokenizer

_FORMAT = 1
_BATCH = 2**20
"""Letters that are tokenised at once."""


class Tokens(NamedTuple):
    """The tokens of all documents, each followed by end-of-text, and how much text they are."""

    array: Integer[np.ndarray, " n"]
    documents: int
    bytes: int

    def bits_per_byte(self, loss: float) -> float:
        """Bits for a byte of UTF-8 where a token costs `loss` nats: a figure that does not depend on the tokenizer."""
        return loss / math.log(2) * len(self.array) / self.bytes


@checked
def tokenize(
    documents: Documents, tokenizer: AbstractTokenizer, *, cache: str | Path | None = None, progress: bool = True
) -> Tokens:
    """The tokens of documents, from the cache where they were tokenised before.

    The array is mapped into memory, not read. It holds `uint16` where the vocabulary fits, else `uint32`. A file of the
    cache is named by the fingerprints of documents and tokenizer, and appears whole or not at all; one that has not the
    length that was noted for it is made again, with a warning.

    **Arguments:**

    - `cache`: the folder of the cache; `None` for the one that the variable `S5EQX_CACHE` names, or `~/.cache/s5eqx`.
    - `progress`: show a bar while documents are tokenised.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    about = {"format": _FORMAT, "documents": documents.fingerprint, "tokenizer": tokenizer.fingerprint}
    key = hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
    path = cache_folder(cache) / f"tokens-{key}.bin"
    note = path.with_suffix(".json")
    counts = _noted(path, note, dtype)
    if counts is None:
        with one_at_a_time(path.with_suffix(".lock")):
            counts = _noted(path, note, dtype)  # another process may have made it by now
            if counts is None:
                if path.exists() and note.exists():
                    warnings.warn(f"{path} does not have the length noted in {note}: it is made again", stacklevel=2)
                counts = _write(path, documents, tokenizer, dtype, progress)
                with written_whole(note) as file:
                    about |= {"name": documents.name, "dtype": dtype.name, "counts": counts}
                    file.write(json.dumps(about, indent=1).encode())
    # An empty file cannot be mapped.
    array = np.memmap(path, dtype, mode="r") if counts["tokens"] else np.zeros(0, dtype)
    return Tokens(array, counts["documents"], counts["bytes"])


def _noted(path, note, dtype):
    """What the file at `path` holds, or `None` if it has to be made."""
    try:
        counts = json.loads(note.read_bytes())["counts"]
        whole = path.stat().st_size == counts["tokens"] * dtype.itemsize
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return counts if whole else None


def _write(path, documents, tokenizer, dtype, progress):
    from tqdm import tqdm

    end = np.array([tokenizer.end_of_text], dtype)
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    bar = tqdm(total=documents.at_most, desc=f"tokenise {documents.name}", unit=" documents", disable=not progress)
    with bar, written_whole(path) as file:
        for texts in _batches(documents):
            for tokens in tokenizer.encode(texts):
                file.write(tokens.astype(dtype).tobytes())
                file.write(end.tobytes())
                counts["tokens"] += len(tokens) + 1
            counts["documents"] += len(texts)
            counts["bytes"] += sum(len(text.encode()) for text in texts)
            bar.update(len(texts))
            bar.set_postfix_str(f"{counts['bytes'] / 1e6:.1f} MB", refresh=False)
    return counts


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about `_BATCH` letters in all."""
    batch, letters = [], 0
    for text in texts:
        batch.append(text)
        letters += len(text)
        if letters >= _BATCH:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch
