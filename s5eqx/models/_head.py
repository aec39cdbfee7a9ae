"""The dense layers that read an encoder out."""

import equinox as eqx
import numpy as np

from s5eqx._typing import Array, Float, PRNGKeyArray
from s5eqx.nn.linear import linear
from s5eqx.nn.tree import cast


def dense(width: int, num_out: int, name: str, key: PRNGKeyArray) -> eqx.nn.Linear:
    """From `width` to `num_out` channels, which the user calls `name`."""
    if num_out < 1:
        raise ValueError(f"{name} must be at least 1; got {num_out}.")
    return eqx.nn.Linear(width, num_out, key=key)


def wide(layer: eqx.nn.Linear, h: Float[Array, "*rows D"]) -> Float[Array, "*rows D_out"]:
    """The layer in the precision of `h`, or in float32 where that is lower."""
    h = h.astype(np.promote_types(h.dtype, np.float32))
    return linear(cast(layer, h.dtype), h)
