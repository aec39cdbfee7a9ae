"""What the benchmarks share: a look at their settings, fair timing, a process of its own for each allocator setting."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

TUNED = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=8589934592:glibc.malloc.mmap_threshold=8589934592"
"""Keeps freed blocks and asks for huge pages. Without it glibc maps any array over 32 MiB anew on every call, at about
a microsecond a page, and that is then what a benchmark measures; with a threshold for trimming alone, any over 128 KiB.
"""


def check_settings(settings: Any, **least: int) -> None:
    """Ends the program where a number, or one of several, is below `least[field]` or else 1, where several are none, or
    where a file has no folder."""
    for name, value in vars(settings).items():
        if value == ():
            sys.exit(f"error: {name} must have at least one entry, got none")
        if isinstance(value, Path) and (value.is_dir() or not value.parent.is_dir()):
            sys.exit(f"error: {name} must be a file in a folder that exists, got {value}")
        numbers = [number for number in jax.tree.leaves(value) if type(number) is int]
        if min(numbers, default=1) < (bound := least.get(name, 1)):
            sys.exit(f"error: {name} must be at least {bound}, got {value}")


def interleaved_medians(programs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds a call: medians over `repeats` rounds in which each program runs once, after a warm-up."""
    for program in programs.values():
        jax.block_until_ready(program())
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def in_a_process_of_its_own(script: str, arguments: list[str], *, tuned: bool) -> dict:
    """Runs `script` again with the allocator tuned or as it comes; returns the JSON on its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tuned:
        environment["GLIBC_TUNABLES"] = TUNED
    command = [sys.executable, script, *arguments]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def where() -> dict[str, str]:
    """The machine and the versions, for the record."""
    cores = len(os.sched_getaffinity(0))
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = f"{cores} {'core' if cores == 1 else 'cores'}"
    return {
        "machine": f"{machine}, {cpus[0].split(':')[1].strip()}" if cpus else machine,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
    }


def over_lengths(axes: Any, lengths: list[int], *, xlabel: str, title: str) -> None:
    """Names the horizontal axis of a logarithmic plot, and the plot."""
    axes.set(xlabel=xlabel, title=title)
    axes.xaxis.minorticks_off()
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.grid(alpha=0.3)
