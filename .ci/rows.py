"""Commands that must succeed, and rows of a table that are carried out in turn: what the scripts here share."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """What a row showed instead of what it should."""


class Skipped(Exception):
    """Why a row cannot be carried out on this machine."""


def run(*command, **options) -> str:
    """Return the output of a command that must succeed."""
    said, status = attempt(*command, **options)
    if status:
        raise Failed(said)
    return said


def attempt(*command, environment=None, folder=None) -> tuple[str, int]:
    """Run a command; return its output, errors included, and its exit status."""
    done = subprocess.run(
        [*map(str, command)],
        env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800,
    )  # fmt: skip
    return done.stdout, done.returncode


def expect(patterns: Iterable[str], text: str) -> None:
    """Raise `Failed` if one of the regular expressions is not in the text."""
    for pattern in patterns:
        if not re.search(pattern, text):
            raise Failed(f"{text}\nexpected: {pattern}")


def clean_environment() -> dict[str, str]:
    """Return the environment variables without those that steer what is built or imported, and without GPUs."""
    misleading = ("S5EQX_", "PYTHON", "CUDA", "CMAKE_ARGS", "VIRTUAL_ENV")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(misleading)}
    return kept | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def report(rows: Iterable[tuple[str, Callable[[], str]]], wanted: Sequence[str]) -> None:
    """Carry out the rows, titles and functions, whose title has one of the wanted words, or all where none are wanted.

    Print for each its seconds and what it returns. Exit with an error if one raises `Failed`.
    """
    chosen = [(title, row) for title, row in rows if not wanted or any(word in title for word in wanted)]
    if not chosen:
        sys.exit(f"no title has any of these words: {', '.join(wanted)}")
    failed = []
    for title, row in chosen:
        start = time.monotonic()
        try:
            seen, verdict = row(), "as expected"
        except Skipped as why:
            seen, verdict = str(why), "skipped"
        except (Failed, subprocess.TimeoutExpired) as failure:
            seen, verdict = str(failure), "FAILED"
            failed.append(title)
        print(f"\n--- {title}: {verdict} ({time.monotonic() - start:.0f} s)\n{seen.rstrip()}", flush=True)
    if failed:
        sys.exit(f"\nfailed: {'; '.join(failed)}")
    print("\nall rows are as expected")
