"""A folder for what is made once and read often."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_folder(cache: str | Path | None) -> Path:
    """`cache`, else the folder that `S5EQX_CACHE` names, else `~/.cache/s5eqx`. It is made if need be."""
    folder = Path(cache or os.environ.get("S5EQX_CACHE") or "~/.cache/s5eqx").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, that is found at `path` once it is complete and on the disk, and not before.

    What writers that were killed a day ago have left is removed.
    """
    for left in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                left.unlink()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process of a machine in, so that the others find what it made and need not make it as well.

    The system takes the lock from a process that dies. Where there are no locks, all come in: files that are written
    whole are right all the same.
    """
    with open(path, "ab") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
