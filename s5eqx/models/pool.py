"""One vector for a whole sequence."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from s5eqx._typing import Array, Float, Int, checked
from s5eqx.nn._select import before_padding, keep_rows


class AbstractPool(eqx.Module):
    """Reduces the first `length` steps, or all where it is None, to a vector in at least float32."""

    @abc.abstractmethod
    def __call__(self, h: Float[Array, "L D"], length: Int[Array, ""] | None = None) -> Float[Array, " D"]:
        """The vector. What comes after `length` has no effect; `length` lies in [1, L]."""


class MeanPool(AbstractPool):
    """The mean of the steps."""

    @checked
    def __call__(self, h: Float[Array, "L D"], length: Int[Array, ""] | None = None) -> Float[Array, " D"]:
        h = h.astype(np.promote_types(h.dtype, np.float32))
        if length is None:
            return jnp.mean(h, axis=0)
        return jnp.sum(keep_rows(before_padding(length, len(h)), h), axis=0) / length.astype(h.dtype)


class LastPool(AbstractPool):
    """The last step, which has seen the whole sequence where the mixers are causal."""

    @checked
    def __call__(self, h: Float[Array, "L D"], length: Int[Array, ""] | None = None) -> Float[Array, " D"]:
        last = h[-1] if length is None else h[length.astype(jnp.int32) - 1]
        return last.astype(np.promote_types(h.dtype, np.float32))
