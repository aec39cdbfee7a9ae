"""The long causal convolution: by FFT, by matrix products of order 2 and 3, in three passes, a few channels at once.

    python experiments/bench_conv.py                                   # L = 1K ... 1M, 16 channels: ten minutes
    python experiments/bench_conv.py --lengths 1024 --channels 64 --batch 8
    python experiments/bench_conv.py --plot conv.png --json conv.json

Times float32, value alone and value with both gradients: medians, all algorithms interleaved in one run, with the
allocator settings of `_timing.TUNED` (`--no-tuned` without). Temporaries are what XLA allocates beside inputs and
results. The error is the largest distance from the FFT in double precision, as a share of the largest output. Prints
tables in Markdown; the last line says which one `ops.Measured()` takes where.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _timing import check_settings, in_a_process_of_its_own, interleaved_medians, over_lengths, where

from s5eqx import ops

ALGORITHMS: dict[str, ops.AbstractConvAlgorithm] = {
    "FFT": ops.FFT(),
    "order 2": ops.Monarch(2),
    "order 3": ops.Monarch(3),
    "three passes": ops.ThreePass(16),
    "FFT, 2 channels": ops.Chunked(ops.FFT(), 2),
    "order 3, 2 channels": ops.Chunked(ops.Monarch(3), 2),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = tuple(4**i for i in range(5, 11))
    """Steps of a sequence."""
    batch: int = 1
    """Sequences."""
    channels: int = 16
    """Channels of each, with a kernel of their own that is as long as the sequence."""
    repeats: int = 7
    """Rounds a median is taken over."""
    tuned: bool = True
    """Let the allocator keep what is freed."""
    json: Path | None = None
    """File to write all numbers to."""
    plot: Path | None = None
    """File to draw the times into."""
    child: bool = False
    """Measure in this process and print JSON; the script calls itself so."""


def convolution(algorithm: ops.AbstractConvAlgorithm, u, k):
    return ops.causal_convolution(u, k, algorithm=algorithm)


def with_gradients(algorithm: ops.AbstractConvAlgorithm, u, k, g):
    y, pullback = jax.vjp(partial(convolution, algorithm), u, k)
    return y, pullback(g)


def compiled(function: Callable, *arrays) -> tuple[Callable, float]:
    """The program, and MiB of its temporaries."""
    program = jax.jit(function).lower(*arrays).compile()
    analysis: Any = program.memory_analysis()
    return lambda: program(*arrays), analysis.temp_size_in_bytes / 2**20


def error(algorithm: ops.AbstractConvAlgorithm, u, k) -> float:
    """Of the first three channels."""
    u, k = np.asarray(u[..., :3]), np.asarray(k[..., :3])
    u_spectrum, k_spectrum = (np.fft.rfft(a.astype(np.float64), 2 * len(k), axis=-2) for a in (u, k))
    exact = np.fft.irfft(u_spectrum * k_spectrum, 2 * len(k), axis=-2)[:, : len(k)]
    return float(np.abs(jax.jit(partial(convolution, algorithm))(u, k) - exact).max() / np.abs(exact).max())


def measure(s: Settings) -> list[dict]:
    rows = []
    for length in s.lengths:
        rng = np.random.default_rng(0)
        shapes = (s.batch, length, s.channels), (length, s.channels), (s.batch, length, s.channels)
        u, k, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
        row: dict[str, Any] = {"length": length}
        for name, function, arrays in (("value", convolution, (u, k)), ("gradients", with_gradients, (u, k, g))):
            programs, temporaries = {}, {}
            for label, algorithm in ALGORITHMS.items():
                programs[label], temporaries[label] = compiled(partial(function, algorithm), *arrays)
            row[name] = {"seconds": interleaved_medians(programs, s.repeats), "MiB": temporaries}
        row["error"] = {label: error(algorithm, u, k) for label, algorithm in ALGORITHMS.items()}
        row["measured"] = repr(ops.Measured().fastest(u.shape, k.shape, 2 * length - 1))
        rows.append(row)
    return rows


def table(title: str, rows: list[dict], cell: Callable[[dict, str], str]) -> None:
    print(f"\n| {title} | {' | '.join(ALGORITHMS)} |\n|---|{'---|' * len(ALGORITHMS)}")
    for row in rows:
        print(f"| {row['length']:,} | {' | '.join(cell(row, label) for label in ALGORITHMS)} |")


def draw(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    lengths = [row["length"] for row in rows]
    for label in ALGORITHMS:
        axes.plot(lengths, [1e3 * row["gradients"]["seconds"][label] for row in rows], marker="o", label=label)
    axes.set(xscale="log", yscale="log", ylabel="ms, value and gradients")
    over_lengths(axes, lengths, xlabel="L", title="long convolution")
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(s: Settings):
    check_settings(s)
    if s.child:
        print(json.dumps(measure(s)))
        return
    arguments = ["--child", "--lengths", *map(str, s.lengths)]
    for name in ("batch", "channels", "repeats"):
        arguments += [f"--{name}", str(getattr(s, name))]
    place = where()
    print(
        f"{place}\nbatch {s.batch}, {s.channels} channels, float32, allocator {'tuned' if s.tuned else 'as it comes'}"
    )
    rows: Any = in_a_process_of_its_own(sys.argv[0], arguments, tuned=s.tuned)
    table("value, ms", rows, lambda row, label: f"{1e3 * row['value']['seconds'][label]:,.2f}")
    table("value and gradients, ms", rows, lambda row, label: f"{1e3 * row['gradients']['seconds'][label]:,.2f}")
    table("temporaries, value, MiB", rows, lambda row, label: f"{row['value']['MiB'][label]:,.1f}")
    table("temporaries, gradients, MiB", rows, lambda row, label: f"{row['gradients']['MiB'][label]:,.1f}")
    table("error", rows, lambda row, label: f"{row['error'][label]:.1e}")
    if s.json:
        s.json.write_text(json.dumps({"where": place, "settings": dataclasses.asdict(s), "rows": rows}, default=str))
    if s.plot:
        draw(rows, s.plot)
    print("\nMeasured takes " + ", ".join(f"{row['measured']} at {row['length']:,}" for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
