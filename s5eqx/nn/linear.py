"""A dense layer on rows: one matrix product instead of a mapped matrix-vector product."""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike

from s5eqx._typing import Array, Float, checked


@checked
def linear(
    layer: eqx.nn.Linear, x: Float[Array, "*rows D"], *, precision: str | None = None
) -> Float[Array, "*rows D_out"]:
    """`x W.T + b` on the last axis of `x`. `precision` is that of `jnp.matmul`.

    `layer` only holds the weights. `jax.vmap(layer)(x)` computes the same; this form stays two-dimensional
    on CPU, where that is the faster one.
    """
    y = times_transposed(x, layer.weight, precision=precision)
    return y if layer.bias is None else y + jnp.broadcast_to(layer.bias, y.shape)


def times_transposed(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "D_out D"],
    *,
    precision: str | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*rows D_out"]:
    """`x W.T`, of type `dtype` where that is given."""
    # In a loop over steps XLA would transpose the weights anew for every vector.
    factors = (weight, x) if x.ndim == 1 else (x, weight.T)
    return jnp.matmul(*factors, precision=precision, preferred_element_type=dtype)
