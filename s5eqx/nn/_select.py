"""What is dropped is dropped by selection: whatever it holds, NaN too, nothing of it is left, nor any gradient."""

import jax
import jax.numpy as jnp

from s5eqx._typing import Array, Bool, Float, Int, PyTree


def drop(state: PyTree[Array], reset: Bool[Array, ""] | None) -> PyTree[Array]:
    """Zeros in place of the state that enters a step, where `reset` is true."""
    if reset is None:
        return state
    return jax.tree.map(lambda a: jnp.where(reset, jnp.zeros_like(a), a), state)


def keep_rows(keep: Bool[Array, " L"], rows: Float[Array, "L D"]) -> Float[Array, "L D"]:
    """The rows that are to be kept, and zeros in place of the others."""
    return jnp.where(keep[:, None], rows, jnp.zeros_like(rows))


def before_padding(length: Int[Array, ""], steps: int) -> Bool[Array, " L"]:
    """True at the first `length` of so many steps."""
    return jnp.arange(steps, dtype=jnp.int32) < length.astype(jnp.int32)
