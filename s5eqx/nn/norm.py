"""Layer normalisation on rows."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from s5eqx._typing import Array, Float, checked


@checked
def layer_norm(layer: eqx.nn.LayerNorm, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """`(x - mean) / sqrt(var + eps) * weight + bias` on the last axis, with the biased variance.

    `layer` only holds the weights. The statistics are at least float32; the result has the dtype of `x`. The
    backward pass computes it again from `x`, which costs less than to keep it.
    """
    return _normalise(layer.weight, layer.bias, x, layer.eps)


@partial(jax.checkpoint, static_argnums=3)
def _normalise(weight, bias, x, eps):
    dtype = np.promote_types(x.dtype, np.float32)
    z = x.astype(dtype)
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    z = z * lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + eps)
    weight, bias = (jnp.broadcast_to(p.astype(dtype), z.shape) for p in (weight, bias))
    return (z * weight + bias).astype(x.dtype)
