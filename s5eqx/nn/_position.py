"""Positions of tokens, where several sequences may be packed into one row."""

import jax.numpy as jnp
from jax import lax

from s5eqx._typing import Array, Bool, Int


def positions(
    before: Int[Array, ""], steps: int, reset: Bool[Array, " L"] | None
) -> tuple[Int[Array, ""], Int[Array, " L"]]:
    """The position of the token after these, and that of each of them in its own sequence, which `before` tokens of the
    first one precede."""
    time = jnp.arange(steps, dtype=jnp.int32)
    here = before + time if reset is None else time - lax.cummax(jnp.where(reset, time, -before))
    return jnp.concatenate([before[None], here + 1])[-1], here
