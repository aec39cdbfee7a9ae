"""The diagonal scan against what JAX offers: `jax.lax.associative_scan` and `jax.lax.scan`.

    python experiments/bench_scan.py

Times complex64, time-invariant scans, forward and forward + backward (gradients of a and b), all programs
interleaved in one run, and does so twice: with the allocator settings of `_timing.TUNED` and without. `b + 1`, which
reads and writes as much as a forward scan and does nothing else, says how fast memory is. Then compares the errors at
|a| = 0.99999 against a float64 recurrence. Two minutes on two cores. `--json FILE` keeps the numbers.
"""

import dataclasses
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _timing import TUNED, check_settings, in_a_process_of_its_own, interleaved_medians, where

from s5eqx.ops import diagonal_scan

SHAPES = ((1, 131072, 16), (16, 1024, 64), (16, 4000, 64), (4, 22, 16), (1, 1048576, 16))


@dataclasses.dataclass(frozen=True)
class Settings:
    repeats: int = 9
    """Rounds a median is taken over."""
    json: Path | None = None
    """File to write all numbers to."""
    child: bool = False
    """Measure in this process and print JSON; the script calls itself so."""


def associative(a, b):
    def combine(early, late):
        return early[0] * late[0], late[0] * early[1] + late[1]

    return jax.lax.associative_scan(combine, (jnp.broadcast_to(a, b.shape), b), axis=1)[1]


def sequential(a, b):
    def step(x, b_t):
        x = a * x + b_t
        return x, x

    _, x = jax.lax.scan(step, jnp.zeros_like(b[:, 0]), jnp.swapaxes(b, 0, 1))
    return jnp.swapaxes(x, 0, 1)


PROGRAMS = {"s5eqx": diagonal_scan, "associative_scan": associative, "lax.scan": sequential}


def forward_and_backward(scan, a, b, g):
    x, pullback = jax.vjp(scan, a, b)
    return x, pullback(g)


def draw(shape, modulus, seed=0):
    rng = np.random.default_rng(seed)
    noise = lambda s: (rng.standard_normal(s) + 1j * rng.standard_normal(s)).astype(np.complex64)
    a = (modulus * np.exp(2j * np.pi * rng.random(shape[-1]))).astype(np.complex64)
    return jnp.asarray(a), jnp.asarray(noise(shape)), jnp.asarray(noise(shape))


def measure_speed(repeats):
    rows = []
    for shape in SHAPES:
        a, b, g = draw(shape, 0.999)
        rounds = 50 * repeats if b.size < 10_000 else repeats
        forward = {name: partial(jax.jit(scan), a, b) for name, scan in PROGRAMS.items()}
        forward["b + 1"] = partial(jax.jit(lambda b: b + 1), b)
        both = {name: partial(jax.jit(partial(forward_and_backward, scan)), a, b, g) for name, scan in PROGRAMS.items()}
        rows.append({"shape": shape, "pass": "forward", **interleaved_medians(forward, rounds)})
        rows.append({"shape": shape, "pass": "forward + backward", **interleaved_medians(both, rounds)})
    return rows


def measure_error(length=131072, modulus=0.99999):
    a, b, _ = draw((1, length, 16), modulus)
    exact, x = np.empty(b.shape, np.complex128), np.zeros(16, np.complex128)
    wide_a, wide_b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
    for t in range(length):
        x = wide_a * x + wide_b[0, t]
        exact[0, t] = x
    error = lambda x: float(np.linalg.norm(np.asarray(x) - exact) / np.linalg.norm(exact))
    return {name: error(jax.jit(scan)(a, b)) for name, scan in PROGRAMS.items()}


def report(rows):
    print(
        f"{'(B, L, P)':<18}{'pass':<20}"
        + "".join(f"{name:>18}" for name in PROGRAMS)
        + f"{'over assoc.':>13}{'over best':>11}{'of b + 1':>11}"
    )
    gains = []
    for row in rows:
        ours, *others = (row[name] for name in PROGRAMS)
        gains.append(others[0] / ours)
        times = "".join(f"{1e3 * row[name]:>15.3f} ms" for name in PROGRAMS)
        over = f"{gains[-1]:>12.1f}x{min(others) / ours:>10.2f}x"
        of_memory = f"{100 * row['b + 1'] / ours:>9.0f} %" if "b + 1" in row else ""
        print(f"{tuple(row['shape'])!s:<18}{row['pass']:<20}{times}{over}{of_memory}")
    mean = lambda values: math.exp(statistics.fmean(map(math.log, values)))
    print(f"geometric means over associative_scan: forward {mean(gains[::2]):.1f}x, ", end="")
    print(f"forward + backward {mean(gains[1::2]):.1f}x, all {mean(gains):.1f}x\n")


def main(settings: Settings):
    check_settings(settings)
    if settings.child:
        print(json.dumps(measure_speed(settings.repeats)))
        return
    result: dict = {"where": where()}
    print(f"{result['where']}\ncomplex64, time-invariant\n")
    arguments = ["--child", "--repeats", str(settings.repeats)]
    for name, tuned in (("tuned", True), ("default", False)):
        print(f"allocator: GLIBC_TUNABLES={TUNED}" if tuned else "allocator: as it comes")
        result[name] = in_a_process_of_its_own(sys.argv[0], arguments, tuned=tuned)
        report(result[name])
    result["error"] = measure_error()
    print("relative error at L=131072, |a|=0.99999, against float64: ", end="")
    print(", ".join(f"{name} {error:.1e}" for name, error in result["error"].items()))
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings))
