"""A dense layer on rows: one matrix product instead of a mapped matrix-vector product."""

import equinox as eqx
import jax.numpy as jnp

from s5eqx._typing import Array, Float, checked


@checked
def linear(
    layer: eqx.nn.Linear, x: Float[Array, "*rows D"], *, precision: str | None = None
) -> Float[Array, "*rows D_out"]:
    """`x W.T + b` on the last axis of `x`. `precision` is that of `jnp.matmul`.

    `layer` only holds the weights. `jax.vmap(layer)(x)` computes the same; this form stays two-dimensional
    on CPU, where that is the faster one.
    """
    # In a loop over steps XLA would transpose the weights anew for every vector.
    factors = (layer.weight, x) if x.ndim == 1 else (x, layer.weight.T)
    y = jnp.matmul(*factors, precision=precision)
    return y if layer.bias is None else y + jnp.broadcast_to(layer.bias, y.shape)
