"""Which leaves of a state are arrays, and which of them are trained, whether they exist yet or not."""

import equinox as eqx
import jax
import jax.numpy as jnp

from s5eqx._typing import PyTree


def is_array_or_shape(leaf: object) -> bool:
    """True of arrays, and of the `jax.ShapeDtypeStruct` that stands for one in a skeleton."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def trainable(model: PyTree) -> PyTree:
    """The leaves that training changes, floating-point arrays or their shapes; `None` for the others."""
    return eqx.filter(model, lambda leaf: is_array_or_shape(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact))
