"""The scan on a GPU: time, bandwidth, error, compile time and memory, beside what else does the same.

    python tests/gpu/bench.py [--json FILE]

Against a copy of as many bytes on the device, `jax.lax.associative_scan`, `jax.lax.scan`, and, where they are
installed, a Triton scan (`triton_scan.py`) and the kernels of accelerated-scan. Prints markdown.

Times are medians over rounds, on random numbers. Buffers that fit in the cache are rotated: several calls on different
data make one program, and the time is that of one of them. The backward pass is timed alone, on the residuals of its
own forward pass. The error is the relative L2 distance of the states, or of the cotangents of b, from a recurrence in
double precision, on 4 rows and 16 states from everywhere; |a| = 1 - 1/L.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx.ops import diagonal_scan, use_backend

ROTATED = 128 << 20  # bytes: twice the cache of the largest GPU
PATIENCE = 2.0  # seconds; what takes longer is timed once
TORCH_SECONDS = 120  # for all that needs PyTorch, compiling included
STEP_SECONDS = 20e-6  # of lax.scan on a GPU, at a guess: to leave out what would take minutes


class Case(NamedTuple):
    shape: tuple[int, int, int]
    varying: bool
    direction: Literal["forward", "backward"]
    dtype: str = "complex64"

    @property
    def bytes(self):
        """Least traffic: inputs once, results once."""
        arrays = {(False, "forward"): 2, (False, "backward"): 3, (True, "forward"): 3, (True, "backward"): 5}
        return arrays[self.varying, self.direction] * np.dtype(self.dtype).itemsize * int(np.prod(self.shape))

    def sets(self, effort):
        """How many different inputs take turns."""
        return int(np.clip(-(-ROTATED // self.bytes), 1, effort.sets))

    def __str__(self):
        return f"{self.shape} {self.dtype} {'a[t]' if self.varying else 'a'}"


class Effort(NamedTuple):
    rounds: int
    """That a median is taken over."""
    sets: int
    """Of inputs that take turns, at most."""


@dataclasses.dataclass
class Row:
    """One program on one case."""

    case: Case
    program: str
    seconds: float | None = None
    error: float | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    remark: str = ""


def both(shape, varying, dtype="complex64"):
    return [Case(shape, varying, direction, dtype) for direction in ("forward", "backward")]


CASES = [
    *both((16, 131072, 16), False),
    *both((16, 1024, 64), False),
    *both((1, 1048576, 16), False),
    *both((1, 131072, 512), True),
    *both((16, 131072, 16), True),
    *both((1, 1048576, 64), False),
    *both((1, 131072, 512), False),
    *both((1, 65536, 1536), True, "float32"),
]
TINY = [
    *both((2, 40, 3), False),
    Case((2, 40, 3), True, "backward"),
    Case((1, 32, 3), True, "forward", "float32"),
]


# The programs. Each scans (B, L, P) from a state of zero.


def associative(a, b):
    def combine(early, late):
        return late[0] * early[0], late[0] * early[1] + late[1]

    return jax.lax.associative_scan(combine, (jnp.broadcast_to(a, b.shape), b), axis=1)[1]


def sequential(a, b):
    def step(x, inputs):
        x = inputs[0] * x + inputs[1]
        return x, x

    steps = jnp.swapaxes(jnp.broadcast_to(a, b.shape), 0, 1), jnp.swapaxes(b, 0, 1)
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(b[:, 0]), steps)[1], 0, 1)


def ours(a, b):
    with use_backend("native"):
        return diagonal_scan(a, b)


# Inputs and truth.


@functools.partial(jax.jit, static_argnums=0)
def draw(case, key):
    """a, b and the cotangent of the states."""
    keys = jr.split(key, 3)
    _, length, states = case.shape
    a = jr.normal(keys[0], case.shape if case.varying else (states,), case.dtype)
    a = a / jnp.abs(a).astype(case.dtype) * (1 - 1 / length)
    return a, jr.normal(keys[1], case.shape, case.dtype), jr.normal(keys[2], case.shape, case.dtype)


def sample(z):
    """Some rows and states from everywhere, on the host: enough to see an error, and soon compared."""
    rows, states = (slice(None, None, max(1, n // kept)) for n, kept in ((z.shape[0], 4), (z.shape[-1], 16)))
    return np.asarray(z[rows, :, states] if z.ndim == 3 else z[states])


def truth(case, a, b, g):
    """The states, or the cotangents of b, in double precision."""
    backward = case.direction == "backward"
    source = g if backward else b
    result = np.empty(source.shape, np.complex128 if np.iscomplexobj(source) else np.float64)
    a = a.astype(result.dtype)
    x = np.zeros_like(result[:, 0])
    length = source.shape[1]
    for t in range(length)[:: -1 if backward else 1]:
        x = (a[:, min(t + backward, length - 1)] if case.varying else a) * x + source[:, t]
        result[:, t] = x
    return result


def distance(given, exact):
    """Relative, in the L2 norm."""
    return float(np.linalg.norm(given - exact) / np.linalg.norm(exact))


# Measuring.


def median_seconds(run, rounds):
    """Of one call of `run`, which returns arrays, and a remark; after a warm-up."""

    def several(calls):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    if (once := several(1)) > PATIENCE:
        return once, "timed once"
    calls = int(np.clip(0.01 / several(1), 1, 20))  # enough that starting them costs little beside running them
    return statistics.median(several(calls) for _ in range(rounds)), ""


def compiled(function, *operands):
    start = time.perf_counter()
    program = jax.jit(function).lower(*operands).compile()
    return program, time.perf_counter() - start


def measure_copy(case, effort):
    """Reads half of the case's bytes and writes the other half."""
    count = case.bytes // 2 // 4
    buffers = [jr.normal(jr.key(seed), count, jnp.float32) for seed in range(case.sets(effort))]
    run, _ = compiled(lambda buffers: [jnp.copy(z) for z in buffers], buffers)
    seconds, remark = median_seconds(lambda: run(buffers), effort.rounds)
    return Row(case, "copy", seconds / len(buffers), remark=remark)


def measure(case, name, exact, effort):
    """The row of one program of JAX."""
    scan, backward = PROGRAMS[name], case.direction == "backward"

    def operands(seed):
        a, b, g = draw(case, jr.key(seed))
        # The residuals are a program's own choice; the pass that makes them is not timed.
        return (jax.jit(lambda a, b: jax.vjp(scan, a, b)[1])(a, b), g) if backward else (a, b)

    function = (lambda pull, g: pull(g)) if backward else scan
    first = operands(0)
    one, compile_seconds = compiled(function, *first)
    memory = one.memory_analysis()
    error = distance(sample(one(*first)[1] if backward else one(*first)), exact)
    sets = [first, *map(operands, range(1, case.sets(effort)))]
    every = compiled(lambda sets: [function(*z) for z in sets], sets)[0] if len(sets) > 1 else None
    seconds, remark = median_seconds((lambda: every(sets)) if every else (lambda: one(*first)), effort.rounds)
    temporary = memory.temp_size_in_bytes if memory else None
    return Row(case, name, seconds / len(sets), error, compile_seconds, temporary, remark)


def attempt(case, name, measurement):
    """The row of `measurement()`, or one that says what was in its way."""
    try:
        return measurement()
    except Exception as error:
        print(f"{case}, {case.direction}, {name}: {error}", file=sys.stderr)
        return Row(case, name, remark=f"not run: {(str(error).strip() or repr(error)).splitlines()[0][:90]}")


PROGRAMS = {"s5eqx": ours, "associative_scan": associative, "lax.scan": sequential}


def why_not(case, name, deadline):
    """Why a program is not run on a case, or nothing."""
    if time.monotonic() > deadline:
        return "out of time"
    if name == "lax.scan" and case.shape[1] * STEP_SECONDS > 3:
        return f"{case.shape[1]} steps one by one"
    if name == "lax.scan" and case.varying:
        return "as the time-invariant one"
    return None


def measure_all(cases, effort, deadline):
    rows, truths = [], {}
    for name in PROGRAMS:  # ours first: the others get what time is left
        for case in cases:
            if why := why_not(case, name, deadline):
                rows.append(Row(case, name, remark=f"not run: {why}"))
                continue
            if name == "s5eqx":
                truths[case] = truth(case, *map(sample, draw(case, jr.key(0))))
                rows.append(measure_copy(case, effort))
            rows.append(attempt(case, name, lambda c=case, n=name: measure(c, n, truths[c], effort)))
            print(f"{case}, {case.direction}, {name}: {microseconds(rows[-1].seconds)} µs", file=sys.stderr)
    return rows


def measure_torch(cases):
    """Programs of PyTorch, in a process of their own: two frameworks do not share a device's memory well."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Triton and accelerated-scan are not run: no {' and no '.join(missing)} here", file=sys.stderr)
        return []
    command = [sys.executable, str(Path(__file__).with_name("triton_scan.py")), json.dumps(cases)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TORCH_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"Triton and accelerated-scan are not run: {error}", file=sys.stderr)
        return []
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [Row(cases[row.pop("case")], **row) for row in rows]


# The report.


def microseconds(seconds):
    return "–" if seconds is None else f"{1e6 * seconds:,.1f}" if seconds < 1e-4 else f"{1e6 * seconds:,.0f}"


def table(rows):
    """Markdown: the programs of a case under each other, after the copy they are compared with."""
    columns = ["(B, L, P)", "pass", "program", "µs", "GB/s", "of copy", "times s5eqx", "error", "compile s", "temp. MB"]
    lines = [columns, ["---"] * len(columns)]
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        by_name = {row.program: row.seconds for row in mine if row.seconds}
        for i, row in enumerate(sorted(mine, key=lambda row: row.program != "copy")):
            cells = [str(case), case.direction] if i == 0 else ["", ""]
            cells += [row.program, microseconds(row.seconds)]
            if row.seconds is None:
                cells += [row.remark] + [""] * (len(columns) - len(cells) - 1)
            else:
                cells += [
                    f"{case.bytes / row.seconds / 1e9:,.0f}",
                    f"{by_name['copy'] / row.seconds:.0%}" if "copy" in by_name else "–",
                    f"{row.seconds / by_name['s5eqx']:.2f}" if "s5eqx" in by_name else "–",
                    "–" if row.error is None else f"{row.error:.1e}",
                    "–" if row.compile_seconds is None else f"{row.compile_seconds:.1f}",
                    "–" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:,.0f}",
                ]
                cells[2] += f" ({row.remark})" if row.remark else ""
            lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def summary(rows):
    """One line: the least share of the copy's bandwidth on 100 MB and more, and the least gains."""
    seconds = {(row.case, row.program): row.seconds for row in rows if row.seconds}
    parts = []
    for direction in ("forward", "backward"):
        cases = [c for c, program in seconds if program == "s5eqx" and c.direction == direction]
        large = [seconds[c, "copy"] / seconds[c, "s5eqx"] for c in cases if c.bytes >= 100e6]
        gains = [
            seconds[c, "associative_scan"] / seconds[c, "s5eqx"] for c in cases if (c, "associative_scan") in seconds
        ]
        if large:
            parts.append(f"{direction} >= {min(large):.0%} of copy from 100 MB on")
        if gains:
            parts.append(f"{direction} {min(gains):.1f}-{max(gains):.1f}x associative_scan")
    failed = [row for row in rows if row.program == "s5eqx" and row.seconds is None]
    return "; ".join(parts + [f"{len(failed)} cases of s5eqx NOT run"] * bool(failed)) or "nothing to compare"


def commit():
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return os.environ.get("S5EQX_COMMIT") or done.stdout.strip() or "unknown"


def where(device):
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device.device_kind,
        "jax": jax.__version__,
        "runtime": device.client.platform_version.replace("\n", ", "),
        "command": shlex.join(["python", *sys.argv]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="that a median is taken over")
    parser.add_argument("--sets", type=int, default=8, help="of inputs that take turns where they fit the cache")
    parser.add_argument("--seconds", type=float, default=420, help="after which no further program is begun")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--platform", default="cuda", help="cpu: to try the script out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to try the script out")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    cases = TINY if options.tiny else CASES
    # PyTorch first, while jax has not yet taken the device's memory.
    torch_rows = [] if options.platform == "cpu" else measure_torch([c for c in cases if c.varying])
    device = jax.devices(options.platform)[0]
    with jax.default_device(device):
        rows = measure_all(cases, Effort(options.rounds, options.sets), deadline) + torch_rows
    machine = where(device)
    print("\n".join(f"- {name}: {value}" for name, value in machine.items()), "\n")
    print(table(rows), "\n")
    if options.json:
        records = [{**dataclasses.asdict(row), "case": row.case._asdict()} for row in rows]
        options.json.write_text(json.dumps({"where": machine, "rows": records}, indent=1))
    print(summary(rows))
    sys.exit(any(row.program == "s5eqx" and row.seconds is None for row in rows))


if __name__ == "__main__":
    main()
