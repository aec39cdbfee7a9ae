"""The S5 layer u -> y as it is usually written, as real products around the scan kernel, and fused.

    python experiments/bench_layer.py

`as written` multiplies complex matrices a step at a time under `jax.vmap` and runs `jax.lax.associative_scan`; `real
GEMM + scan` is a real matrix product, `ops.diagonal_scan_pairs` and another product; `fused` is `ops.ssm`. The weights
are the same. Reports medians interleaved in one run, of the forward pass and of y with all gradients; compile seconds
of the latter, and temporaries by XLA's memory analysis, which does not see the few MB that a kernel allocates for
itself; all with the allocator settings of `_timing.TUNED` and without. Then compares errors against a float64
recurrence. Three minutes on two cores. `--json FILE` keeps the numbers, `--plot FILE.png` draws them.
"""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import _as_written
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _timing import TUNED, check_settings, in_a_process_of_its_own, interleaved_medians, where

from s5eqx.ops import diagonal_scan_pairs, ssm

MODULUS = 0.999
PANELS = (("forward", 1e3, "ms"), ("forward + backward", 1e3, "ms"), ("temporaries", 2**-20, "MiB"))
NAMES = ("y", "u", "Lambda_bar", "B_bar", "C", "D")


@dataclasses.dataclass(frozen=True)
class Settings:
    shapes: tuple[tuple[int, int, int, int], ...] = ((16, 4000, 64, 16), (1, 131072, 64, 16), (16, 1024, 768, 64))
    """Batch, length in steps, channels and states of the layers that are timed."""
    long: int = 131072
    """Length, in steps, of the one whose errors are measured at |Lambda_bar| = 0.99999."""
    repeats: int = 9
    """Rounds a median is taken over."""
    json: Path | None = None
    """File to write all numbers to."""
    plot: Path | None = None
    """File to draw them in."""
    child: bool = False
    """Measure in this process and print JSON; the script calls itself so."""


def real_products(u, Lambda_bar, B_bar, C, D):
    """Of one sequence, or of several."""
    pairs = lambda z: jnp.stack([z.real, z.imag], axis=-1)
    rows = u.reshape(-1, len(D))
    w_in, w_out = pairs(B_bar).swapaxes(0, 1).reshape(len(D), -1), pairs(C.conj()).reshape(len(D), -1).T
    x = diagonal_scan_pairs(pairs(Lambda_bar), (rows @ w_in).reshape(*u.shape[:-1], -1, 2))
    return (x.reshape(len(rows), -1) @ w_out + D * rows).reshape(u.shape)


def fused(u, Lambda_bar, B_bar, C, D):
    return ssm(u, Lambda_bar, B_bar, C, D)[0]


PROGRAMS = {"as written": _as_written.recurrences, "real GEMM + scan": real_products, "fused": fused}


def sequential(u, Lambda_bar, B_bar, C, D):
    """One step after the other: what all must equal."""

    def step(x, u_t):
        x = Lambda_bar * x + u_t.astype(x.dtype) @ B_bar.T
        return x, (x @ C.T).real + D * u_t

    _, y = jax.lax.scan(step, jnp.zeros((len(u), len(Lambda_bar)), C.dtype), jnp.swapaxes(u, 0, 1))
    return jnp.swapaxes(y, 0, 1)


def forward_and_backward(layer, g, *inputs):
    """y, which the next layer wants, and the gradients."""
    y, pull = jax.vjp(layer, *inputs)
    return y, *pull(g)


def draw(shape, modulus, seed=0):
    """The cotangent of y, then u, Lambda_bar, B_bar, C and D."""
    batch, length, width, states = shape
    rng = np.random.default_rng(seed)
    real = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    weight = lambda *shape: ((real(*shape) + 1j * real(*shape)) / shape[1] ** 0.5).astype(np.complex64)
    Lambda_bar = (modulus * np.exp(2j * np.pi * rng.random(states))).astype(np.complex64)
    u, g = real(batch, length, width), real(batch, length, width)
    return g, u, Lambda_bar, weight(states, width), weight(width, states), real(width)


def measure_speed(settings):
    rows = []
    jax.block_until_ready(jax.jit(jnp.exp)(1.0))  # whose compilation pays for the start of the compiler
    for shape in settings.shapes:
        g, *inputs = map(jnp.asarray, draw(shape, MODULUS))
        row = {"shape": shape, "compile": {}, "temporaries": {}}
        forward, both = {}, {}
        for name, layer in PROGRAMS.items():
            forward[name] = partial(jax.jit(layer), *inputs)
            start = time.perf_counter()
            compiled = jax.jit(partial(forward_and_backward, layer)).lower(g, *inputs).compile()
            row["compile"][name] = time.perf_counter() - start
            memory = compiled.memory_analysis()
            row["temporaries"][name] = memory.temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]
            both[name] = partial(compiled, g, *inputs)
        row["forward"] = interleaved_medians(forward, settings.repeats)
        row["forward + backward"] = interleaved_medians(both, settings.repeats)
        rows.append(row)
    return rows


def measure_error(shape, modulus):
    """The largest difference over the largest value, of y and of every gradient."""
    drawn = draw(shape, modulus)
    wide = [z.astype(np.complex128 if np.iscomplexobj(z) else np.float64) for z in drawn]
    exact = jax.jit(partial(forward_and_backward, sequential))(*wide)
    errors = {}
    for name, layer in PROGRAMS.items():
        results = jax.jit(partial(forward_and_backward, layer))(*drawn)
        pairs = zip(NAMES, results, exact, strict=True)
        errors[name] = {what: float(np.max(np.abs(x - z)) / np.max(np.abs(z))) for what, x, z in pairs}
    return {"shape": shape, "modulus": modulus, "errors": errors}


def report_speed(rows):
    print(f"{'(B, L, D, P)':<24}{'':<20}" + "".join(f"{name:>26}" for name in PROGRAMS))
    for row in rows:
        label = str(tuple(row["shape"]))
        for what, scale, unit in (*PANELS, ("compile", 1, "s")):
            usual = row[what]["as written"]
            cells = "".join(f"{scale * v:>11.2f} {unit:<3} {f'{usual / v:.2f}':>9}x" for v in row[what].values())
            print(f"{label:<24}{what:<20}{cells}")
            label = ""
    print()


def report_errors(results):
    print("relative error against float64: y, and the worst gradient")
    for result in results:
        cells = []
        for name, error in result["errors"].items():
            worst = max(NAMES[1:], key=lambda gradient, error=error: error[gradient])
            cells.append(f"{name} {error['y']:.1e}, {error[worst]:.1e} ({worst})")
        print(f"{result['shape']!s:<24}|Lambda_bar| = {result['modulus']:<8}  " + "; ".join(cells))


def draw_bars(rows, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    for axis, (what, scale, unit) in zip(axes, PANELS, strict=True):
        for i, name in enumerate(PROGRAMS):
            places = np.arange(len(rows)) + (i - 1) * 0.27
            bars = axis.bar(places, [scale * row[what][name] for row in rows], 0.25, label=name)
            axis.bar_label(bars, fmt=lambda v: f"{v:.3g}" if v < 1000 else f"{v:.0f}", fontsize=7)
        axis.set(title=f"{what}, {unit}", yscale="log")
        axis.set_xticks(range(len(rows)), [", ".join(map(str, row["shape"])) for row in rows], fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(PROGRAMS))
    figure.supxlabel("batch, length, channels, states", fontsize=9)
    figure.savefig(file, dpi=150)


def main(settings: Settings):
    check_settings(settings)
    if settings.child:
        print(json.dumps(measure_speed(settings)))
        return
    result: dict = {"where": where()}
    print(f"{result['where']}\nfloat32, |Lambda_bar| = {MODULUS}; beside each, how many times less than as written\n")
    for name, tuned in (("tuned", True), ("default", False)):
        print(f"allocator: GLIBC_TUNABLES={TUNED}" if tuned else "allocator: as it comes")
        result[name] = in_a_process_of_its_own(sys.argv[0], [*sys.argv[1:], "--child"], tuned=tuned)
        report_speed(result[name])
    jax.config.update("jax_enable_x64", True)  # for the judge; what is judged is float32 as before
    cut = dict.fromkeys((1, min(length, 1000), width, states) for _, length, width, states in settings.shapes)
    cases = (*((shape, MODULUS) for shape in cut), ((1, settings.long, 8, 4), 0.99999))
    result["errors"] = [measure_error(*case) for case in cases]
    report_errors(result["errors"])
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=1))
    if settings.plot:
        draw_bars(result["default"], settings.plot)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
