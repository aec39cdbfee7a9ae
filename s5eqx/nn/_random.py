"""Random numbers: one distribution that several initialisers share, and keys that may be absent."""

import math

import jax.random as jr
from jax.typing import DTypeLike

from s5eqx._typing import Array, Float, PRNGKeyArray


def truncated_normal(
    key: PRNGKeyArray, shape: tuple[int, ...], variance: float, dtype: DTypeLike
) -> Float[Array, "..."]:
    """Normals cut at two standard deviations, scaled to `variance` after the cut."""
    std_of_cut = 0.87962566103423978
    return math.sqrt(variance) / std_of_cut * jr.truncated_normal(key, -2.0, 2.0, shape, dtype)


def split(key: PRNGKeyArray | None, num: int) -> list[PRNGKeyArray | None]:
    """`num` keys, or `num` times None: a layer that draws nothing needs no key."""
    return [None] * num if key is None else list(jr.split(key, num))
