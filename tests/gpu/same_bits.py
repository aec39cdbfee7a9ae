"""Whether the kernels give the same bits every time while the device is busy with other work.

    python tests/gpu/same_bits.py

Forward and backward passes of the scan and of the state-space step, and final states, small and large, are repeated
while another process, and a second stream of this one where torch is installed, multiply matrices. The last line says
what was compared.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx.ops import diagonal_scan, final_state, ssm, use_backend

SHAPES = ((4, 22, 16), (300, 301, 5), (16, 1024, 64), (1, 3001, 17), (2, 70000, 16), (1, 1048576, 16))
TINY = ((4, 22, 16), (1, 3001, 17))


def multiply_for_ever(platform):
    """The load, in a process of its own: until the parent is gone."""
    parent = os.getppid()
    step = jax.jit(lambda x: x @ x / jnp.linalg.norm(x))
    with jax.default_device(jax.devices(platform)[0]):
        x = step(jr.normal(jr.key(0), (256, 256) if platform == "cpu" else (4096, 4096)))
    print("busy", flush=True)
    while os.getppid() == parent:
        x = jax.block_until_ready(step(x))


@contextlib.contextmanager
def busy_process(platform):
    command = [sys.executable, __file__, "--platform", platform, "--load"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout.readline().strip() != "busy":
            raise SystemExit("The process that keeps the device busy did not start; its errors are above.")
        yield
        if process.poll() is not None:
            raise SystemExit("The process that keeps the device busy ended before the comparisons did.")
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def busy_stream():
    import torch

    x, stop = torch.randn(2048, 2048, device="cuda"), threading.Event()

    def multiply():
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                for _ in range(20):
                    torch.mm(x, x)
                torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=multiply)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def draw(shape, dtype, varying):
    *rows, states = shape
    keys = jr.split(jr.key(0), 4)
    b, g = (jr.normal(key, shape, dtype) for key in keys[:2])
    a = jr.uniform(keys[2], shape if varying else (states,), jnp.float32, 0.9, 0.9999).astype(dtype)
    return a, b, jr.normal(keys[3], (rows[0], states), dtype), g


@jax.jit
def everything(a, b, x0, g):
    with use_backend("native"):
        x, pull = jax.vjp(diagonal_scan, a, b, x0)
        return x, pull(g), final_state(a, b, x0)


@jax.jit
def everything_of_ssm(*inputs):
    with use_backend("native"):
        outputs, pull = jax.vjp(ssm, *inputs)
        return outputs, pull(outputs)


def programs(shape):
    """Each with what it is, and its inputs."""
    for dtype, varying in ((jnp.complex64, False), (jnp.complex64, True), (jnp.float32, False)):
        kind = "time-varying" if varying else "time-invariant"
        yield f"{jnp.dtype(dtype)} {kind}", everything, draw(shape, dtype, varying)
    (batch, length, states), width = shape, 12
    a, _, x0, _ = draw(shape, jnp.complex64, False)
    u, keys = jr.normal(jr.key(1), (batch, length, width)), jr.split(jr.key(2))
    B, C = jr.normal(keys[0], (states, width), a.dtype), jr.normal(keys[1], (width, states), a.dtype)
    yield "state-space step", everything_of_ssm, (u, a, B, C, jnp.ones(width), x0)


@jax.jit
def differing_bits(x, y):
    def bits(z):
        parts = (z.real, z.imag) if jnp.iscomplexobj(z) else (z,)
        return [jax.lax.bitcast_convert_type(part, jnp.int32) for part in parts]

    differ = [jnp.sum(p != q) for p, q in zip(bits(x), bits(y), strict=True)]
    return sum(differ)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--platform", default="cuda", help="cpu: to try the script out")
    parser.add_argument("--tiny", action="store_true", help="two small shapes only")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        multiply_for_ever(options.platform)
    count, wrong = 0, []
    torch_too = options.platform == "cuda" and importlib.util.find_spec("torch") is not None
    second_stream = busy_stream() if torch_too else contextlib.nullcontext()
    with jax.default_device(jax.devices(options.platform)[0]), busy_process(options.platform), second_stream:
        for shape in TINY if options.tiny else SHAPES:
            for what, program, inputs in programs(shape):
                first = program(*inputs)
                counts = [jax.tree.map(differing_bits, program(*inputs), first) for _ in range(options.repeats)]
                differ = sum(map(int, jax.tree.leaves(counts)))
                finite = all(bool(jnp.isfinite(z).all()) for z in jax.tree.leaves(first))
                count += 1
                if differ or not finite:
                    wrong.append(f"{shape} {what}: {differ} words differ, all finite: {finite}")
                    print(wrong[-1], flush=True)
    load = "another process" + (" and a second stream" if torch_too else "")
    print(f"{options.repeats} repeats of {count} programs beside {load}: {len(wrong)} differ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
