"""Kernels under `jit` with sharded operands: each device runs the kernel on what it holds of batch and state.

XLA knows nothing of the inside of an FFI call and gathers its operands. `custom_partitioning` tells it what the axes
mean: some may be split, and the length may not. Results without an axis that is split are summed over the devices.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec

try:
    from jax._src.dispatch import prim_requires_devices_during_lowering
except ImportError:  # then no lowering sees devices, and XLA gathers: slower, and as right
    prim_requires_devices_during_lowering = set()
try:
    from jax._src.sharding_impls import parse_flatten_op_sharding
except ImportError:  # then nobody says how an array is split, and XLA gathers
    parse_flatten_op_sharding = None


def sees_devices(primitive: Primitive) -> None:
    """Lets the lowering of `primitive` see the mesh. JAX has no public way to say so."""
    prim_requires_devices_during_lowering.add(primitive)


def partitioned(
    ctx, primitive: Primitive, axes: str, lead: int, split: str, params: dict[str, Any]
) -> Callable[..., list[jax.Array]] | None:
    """The call of `primitive` as something that XLA can partition; None where the bare call serves.

    That is on one device, under `shard_map`, where every device runs the kernel on its own anyway (over axes that it
    leaves automatic XLA gathers), and in an export, which must not hold callbacks into this process. Also under the
    old partitioner of XLA, which knows no sharding rules: it gathers.
    """
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return None
    context = ctx.module_context.axis_context
    devices, mesh = (getattr(context, name, None) for name in ("device_assignment", "abstract_mesh"))
    if not devices or len(devices) == 1 or mesh is None or ctx.module_context.lowering_parameters.for_export:
        return None
    inputs, outputs = (part.split() for part in axes.split("->"))
    sizes = {}  # an operand that is shared along an axis has a size of 1 there
    for letters, aval in zip(inputs, ctx.avals_in, strict=True):
        sizes |= {letter: max(n, sizes.get(letter, 0)) for letter, n in zip(letters, aval.shape, strict=False)}
    if 0 in ctx.avals_in[lead].shape:
        return None
    given = [i for i, aval in enumerate(ctx.avals_in) if aval.size]  # an empty reset is made anew on each device
    operands = [_factors(inputs[i], ctx.avals_in[i].shape, sizes, f"operand{i}") for i in given]
    results = [_factors(outputs[i], aval.shape, sizes, f"result{i}") for i, aval in enumerate(ctx.avals_out)]

    def whole_call(*present):
        rest = iter(present)
        operands = (next(rest) if aval.size else jnp.zeros(aval.shape, aval.dtype) for aval in ctx.avals_in)
        return primitive.bind(*operands, **params)

    def partition(mesh, operand_shapes, result_shapes):
        spec = _spec(operand_shapes[lead].sharding, mesh)
        held = {letter: how for letter, how in zip(inputs[lead], spec, strict=False) if letter in split and how}
        names = lambda letter: held[letter] if isinstance(held[letter], tuple) else (held[letter],)
        shard = lambda factors: NamedSharding(mesh, PartitionSpec(*map(held.get, factors)))

        def local(*present):
            shares = whole_call(*present)
            lacking = ([n for letter in held if letter not in letters for n in names(letter)] for letters in outputs)
            return [jax.lax.psum(x, over) if over else x for x, over in zip(shares, lacking, strict=True)]

        return mesh, local, [*map(shard, results)], tuple(map(shard, operands))

    rule = " -> ".join(", ".join(map(" ".join, side)) for side in (operands, results))
    whole = tuple(factor for factor in dict.fromkeys(chain(*operands, *results)) if factor not in split)
    spread = custom_partitioning(whole_call)
    spread.def_partition(
        partition=partition, decode_shardings=False, sharding_rule=rule, need_replication_factors=whole
    )

    def run(*operands):
        # The program holds no more of the call than the address of a callback. Its cache would confuse two of them.
        with set_xla_metadata(s5eqx=f"{primitive} {params}"):
            return spread(*(operands[i] for i in given))

    return run


def _spec(sharding, mesh):
    """How an array is split, in the axes of the mesh; as not at all where these cannot say it, and XLA gathers."""
    tiling = getattr(sharding, "_hlo_sharding", None)  # private, as the decoder is: without it XLA gathers
    if tiling is None or parse_flatten_op_sharding is None:
        return PartitionSpec()
    try:
        return parse_flatten_op_sharding(tiling, mesh)[0]
    # The decoder has no other way to say that the mesh cannot: one of its axes is split over two of the array (an
    # assertion), it does not divide the tiles (IndivisibleError, a ValueError), or the tiles have manual subgroups.
    except (AssertionError, ValueError, NotImplementedError):
        return PartitionSpec()


def _factors(letters, shape, sizes, own):
    """What XLA may split alike: the letter of each axis, or a name of its own where it is shared or holds pairs."""
    return [
        letter if sizes.get(letter) == n else f"{own}axis{i}"
        for i, (letter, n) in enumerate(zip(f"{letters}2", shape, strict=False))
    ]
