"""Inside `jax.shard_map`: over which mesh axes a value varies from device to device, and how to say that it does."""

import equinox as eqx
import jax
import jax.numpy as jnp

from s5eqx._typing import Array


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which `x` varies."""
    aval = jax.typeof(x)
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma


def varying_over(axes: frozenset[str], x: jax.Array) -> jax.Array:
    """`x`, varying over `axes` too."""
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]  # jax < 0.9


def varying_like(x: jax.Array, constant: jax.Array) -> jax.Array:
    """`constant`, varying over the mesh axes that `x` varies over: a loop's carry must."""
    return varying_over(varying_axes(x), constant)


def error_if(x: Array, wrong: Array, message: str) -> jax.Array:
    """`eqx.error_if` for integers, inside `jax.shard_map` too.

    What Equinox's error branch returns does not vary, so both branches return a zero that does not, to be added.
    """
    return jnp.asarray(x) + eqx.error_if(jnp.zeros((), x.dtype), wrong, message)
