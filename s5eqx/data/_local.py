"""Documents of local files."""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from s5eqx.data.documents import Documents, column_of


class _Format(NamedTuple):
    """How `datasets` reads the files of a suffix: the name of its reader, its options, and rows to read at a time."""

    reader: str
    options: dict[str, Any]
    rows: int


SUFFIXES = {
    ".txt": _Format("text", {"sample_by": "document"}, 1),
    ".parquet": _Format("parquet", {}, 1000),
    ".jsonl": _Format("json", {}, 1000),
}


def local_documents(pattern: str, *, column: str) -> Documents:
    """The documents of all files that match, in the order of their names.

    The fingerprint is of the contents: a corpus that was copied or touched is still the same, and one that was edited
    is not, which sizes and times do not always show. Hashing takes little time beside tokenising.
    """
    paths = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
    suffixes = sorted({Path(path).suffix for path in paths} or {Path(pattern).suffix})
    if not paths:
        raise ValueError(f"no file matches {pattern!r} from {os.getcwd()}; write a pattern such as 'path/*.txt'")
    if len(suffixes) > 1 or suffixes[0] not in SUFFIXES:
        raise ValueError(
            f"the files of a corpus must all be {', '.join(SUFFIXES)}, of one kind; {pattern!r} matches "
            f"{', '.join(suffix or 'no suffix' for suffix in suffixes)}. Write a pattern such as 'path/*.txt'."
        )
    form = SUFFIXES[suffixes[0]]
    digest = hashlib.blake2b(f"{form.reader} {column}".encode(), digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())

    def read() -> Iterator[str]:
        import datasets
        import pyarrow

        # Not prepared but streamed: `datasets` would else write a copy of all files into its own cache.
        try:
            rows = datasets.load_dataset(
                form.reader, data_files=list(map(glob.escape, paths)), split="train", streaming=True, **form.options
            )
            for batch in rows.iter(batch_size=form.rows):
                yield from column_of(batch, column, pattern)
        except UnicodeDecodeError as problem:
            raise ValueError(f"texts must be UTF-8, and {_undecodable(paths)} is not: {problem}") from problem
        except pyarrow.ArrowInvalid as problem:
            raise ValueError(f"{pattern!r} cannot be read as {form.reader}: {problem}") from problem

    return Documents(repr(pattern), f"files {digest.hexdigest()}", read, len(paths) if form.rows == 1 else None)


def _undecodable(paths):
    """The first file that is not UTF-8."""
    for path in paths:
        with open(path, encoding="utf-8") as file:
            try:
                while file.read(2**20):
                    pass
            except UnicodeDecodeError:
                return path
    return "a file"
