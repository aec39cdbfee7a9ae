"""The long causal convolution on a GPU: by FFT, and by matrix products of order 2 and 3, in three passes, in groups.

    python tests/gpu/bench_conv.py [--tiny --platform cpu]

Medians of the value and of the value with both gradients, temporaries, and the error of the value against double
precision in the first channel. Products in float32 and, as `precision="tensorfloat32"`, on tensor cores. Prints
markdown; below it, what `ops.Measured` takes of those that are as precise as an FFT.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from bench import compiled, distance, median_seconds, microseconds, where

from s5eqx import ops

SHAPES = ((8, 1024, 768), (8, 8192, 768), (4, 65536, 128), (1, 1048576, 64))
TINY = ((2, 300, 3),)
PROGRAMS = {
    "FFT": ops.FFT(),
    **{f"order {order}, float32": ops.Monarch(order) for order in (2, 3)},
    **{f"order {order}, TF32": ops.Monarch(order, precision="tensorfloat32") for order in (2, 3)},
    "three passes": ops.ThreePass(32),
    "FFT, 16 channels": ops.Chunked(ops.FFT(), 16),
}


def draw(shape):
    """u, k, and the cotangent of y."""
    keys = jr.split(jr.key(0), 3)
    return [jr.normal(key, s, jnp.float32) for key, s in zip(keys, (shape, shape[1:], shape), strict=True)]


def exact(u, k):
    """Of the first channel, in double precision."""
    u, k = (np.asarray(a[..., :1], np.float64) for a in (u, k))
    size = 2 * len(k)
    spectrum = np.fft.rfft(u, size, axis=-2) * np.fft.rfft(k, size, axis=-2)
    return np.fft.irfft(spectrum, size, axis=-2)[..., : len(k), :]


def with_gradients(convolve, u, k, g):
    y, pull = jax.vjp(convolve, u, k)
    return y, pull(g)


def report(shape, rounds, deadline):
    u, k, g = draw(shape)
    truth = exact(u, k)
    for name, algorithm in PROGRAMS.items():
        if time.perf_counter() > deadline:
            print(f"| {shape} | {name} | not run: out of time" + " |" * 5, flush=True)
            continue
        convolve = functools.partial(ops.causal_convolution, algorithm=algorithm)
        try:
            one, _ = compiled(convolve, u, k)
            two, _ = compiled(functools.partial(with_gradients, convolve), u, k, g)
            calls = functools.partial(one, u, k), functools.partial(two, u, k, g)
            seconds = [median_seconds(call, rounds)[0] for call in calls]
            memory = [program.memory_analysis().temp_size_in_bytes / 1e6 for program in (one, two)]
            error = distance(np.asarray(one(u, k)[..., :1]), truth)
            cells = [*map(microseconds, seconds), *(f"{size:,.0f}" for size in memory), f"{error:.1e}"]
        except jax.errors.JaxRuntimeError as failure:  # out of memory, most likely
            cells = [f"not run: {str(failure).splitlines()[0][:90]}", *[""] * 4]
        print(f"| {shape} | {name} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="that a median is taken over")
    parser.add_argument("--seconds", type=float, default=600, help="after which nothing more is begun")
    parser.add_argument("--platform", default="cuda", help="cpu: to try the script out")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: to try the script out")
    options = parser.parse_args()
    device = jax.devices(options.platform)[0]
    print("\n".join(f"- {name}: {value}" for name, value in where(device).items()), "\n")
    columns = ["(B, L, D)", "program", "value µs", "with gradients µs", "temp. MB", "with gradients", "error"]
    for cells in columns, ["---"] * len(columns):
        print("| " + " | ".join(cells) + " |")
    deadline, fastest = time.perf_counter() + options.seconds, {}
    with jax.default_device(device):
        for shape in TINY if options.tiny else SHAPES:
            report(shape, options.rounds, deadline)
            if time.perf_counter() < deadline:
                fastest[shape] = ops.Measured().fastest(shape, shape[1:], 2 * shape[1] - 1)
    print("\n- Measured takes " + "; ".join(f"{algorithm} for {shape}" for shape, algorithm in fastest.items()))


if __name__ == "__main__":
    main()
