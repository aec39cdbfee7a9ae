"""Programs over eight virtual devices: prints, as JSON, what XLA made of them and how far they are from the truth.

A process of its own, since the number of devices is fixed when JAX starts: `python tests/eight_devices.py under_jit
layer long_sequences`, or some of these.
"""

import json
import os
import re
import sys
from functools import partial

import xla_flags

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {xla_flags.QUICK}"
os.environ["JAX_PLATFORMS"] = "cpu"

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from helpers import relative_error
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Split
from scan_problems import LAYOUTS, plain_scan, problem

from s5eqx.nn import S5
from s5eqx.ops import diagonal_scan, diagonal_scan_pairs, final_state, sharded_scan

jax.config.update("jax_disable_most_optimizations", True)  # of LLVM's; the collectives are XLA's matter

B, L, P, D = 16, 24, 8, 4
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
devices = np.array(jax.devices())
AUTO = Mesh(devices.reshape(4, 2), ("data", "model"))
LINE = Mesh(devices, ("all",))
EXPLICIT = Mesh(devices.reshape(4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def compare(f, operands, splits, mesh):
    """The collectives of `f` on split operands, and its distance from the same on one device."""
    split = [jax.device_put(z, NamedSharding(mesh, s)) for z, s in zip(operands, splits, strict=True)]
    compiled = jax.jit(f).lower(*split).compile()
    text = compiled.as_text()
    pairs = zip(jax.tree.leaves(compiled(*split)), jax.tree.leaves(jax.jit(f)(*operands)), strict=True)
    counts = {name: len(re.findall(rf"= [^=]* {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return counts | {"error": max(float(relative_error(x, y)) for x, y in pairs)}


def gradient_of(scan, reset=None):
    loss = lambda a, b, x0: jnp.sum(jnp.abs(jnp.sin(scan(a, b, x0, reset=reset))))
    return jax.grad(loss, (0, 1, 2))


def under_jit():
    single, pairs = LAYOUTS["complex64"], LAYOUTS["pairs32"]
    p = problem(single, (B,), L, P, reset=(B, L))
    varying = problem(single, (B,), L, P, a=(B, L, P))
    arrays, stored = p.arrays, [*map(pairs.store, p.arrays)]
    batch = (Split(), Split("data"), Split("data"))
    state = (Split("model"), Split(None, None, "model"), Split(None, "model"))
    both = (Split("model"), Split("data", None, "model"), Split("data", "model"))
    time = (Split(), Split(None, "data"), Split())
    with_reset = lambda a, b, x0, reset: gradient_of(diagonal_scan, reset)(a, b, x0)
    for name, mesh in (("auto", AUTO), ("explicit", EXPLICIT)):
        yield f"forward, batch and state, {name}", compare(diagonal_scan, arrays, both, mesh)
        yield f"gradient, batch and state, {name}", compare(gradient_of(diagonal_scan), arrays, both, mesh)
    yield "gradient, batch", compare(gradient_of(diagonal_scan), arrays, batch, AUTO)
    yield "forward, state", compare(diagonal_scan, arrays, state, AUTO)
    yield "gradient, pairs", compare(gradient_of(diagonal_scan_pairs), stored, both, AUTO)
    yield "gradient, final state", compare(gradient_of(final_state), arrays, both, AUTO)
    own = (Split("data", None, "model"), *both[1:], Split("data"))
    yield "gradient, time-varying, resets", compare(with_reset, (*varying.arrays, p.reset), own, AUTO)
    yield "gradient, time is split", compare(gradient_of(diagonal_scan), arrays, time, AUTO)
    heads = problem(single, (B, 2), L, P).arrays
    nested = jax.vmap(jax.vmap(diagonal_scan, (None, 0, 0)), (None, 0, 0))
    yield "forward, heads in a split batch", compare(nested, heads, batch, EXPLICIT)
    # One mesh axis over the batch and over the states: the axes of a mesh cannot say that.
    apart = lambda a, b: diagonal_scan(a, b.reshape(L, 2, 4 * P).swapaxes(0, 1)).swapaxes(0, 1).reshape(b.shape)
    wide = (np.tile(arrays[0], 4), problem(single, (), L, 8 * P).b)
    yield "forward, a mesh axis split in two", compare(apart, wide, (Split(), Split(None, "all")), LINE)


def layer():
    keys = jr.split(jr.key(0))
    u = jr.normal(keys[0], (B, L, D))
    parameters, static = eqx.partition(S5(D, 2 * P, key=keys[1]), eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(parameters)

    def gradient(u, *leaves):
        def loss(leaves):
            model = eqx.combine(jax.tree.unflatten(tree, leaves), static)
            return jnp.sum(jnp.sin(jax.vmap(model)(u)))

        return jax.grad(loss)(leaves)

    for name, mesh in (("auto", AUTO), ("explicit", EXPLICIT)):
        yield f"S5, {name}", compare(gradient, (u, *leaves), (Split("data"), *(Split(),) * len(leaves)), mesh)


def long_sequences():
    """L = 262,144 over all devices, |a| = 0.99999: states and cotangents against a loop in double precision."""
    mesh = Mesh(devices, ("time",))
    for name, a_shape in (("time-invariant", (2,)), ("time-varying", (262_144, 2))):
        p = problem(LAYOUTS["complex64"], (), 262_144, 2, a=a_shape, radius=(0.99999, 0.99999))
        specs = (Split("time") if len(a_shape) > 1 else Split(), Split("time"), Split())
        split = jax.shard_map(
            partial(sharded_scan, axis_name="time"), mesh=mesh, in_specs=specs, out_specs=Split("time")
        )

        def everything(f, dtype, p=p):
            x, pull = jax.vjp(f, *(jnp.asarray(z, dtype) for z in p.arrays))
            return x, *pull(jnp.asarray(p.g, dtype))

        ours = jax.jit(lambda f=split, run=everything: run(f, jnp.complex64))()
        with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
            truth = jax.jit(lambda run=everything: run(plain_scan, jnp.complex128))()
        errors = [float(relative_error(x, y)) for x, y in zip(ours, truth, strict=True)]
        yield f"long, {name}", dict(zip(("x", "a", "b", "x0"), errors, strict=True))


if __name__ == "__main__":
    print(json.dumps({name: result for part in sys.argv[1:] for name, result in globals()[part]()}))
