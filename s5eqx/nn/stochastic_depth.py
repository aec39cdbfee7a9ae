"""Stochastic depth: drop a whole branch of a block."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.nn._check import check_rate


class StochasticDepth(eqx.Module):
    """`x / (1 - p)` with probability `1 - p`, else 0: one draw for the whole array, expectation `x`.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).

    Differs from the reference: the S5 code keeps the branch with probability `p`.
    """

    rate: float
    inference: bool

    def __init__(self, rate: float = 0.0, inference: bool = False):
        """**Arguments:** `rate`, the probability `p` to drop, in `[0, 1)`; `inference`, never drop."""
        self.rate = check_rate(rate, "rate")
        self.inference = inference

    @checked
    def __call__(self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None) -> Float[Array, "..."]:
        if self.inference or self.rate == 0:
            return x
        if key is None:
            raise RuntimeError(
                "StochasticDepth needs a key while training. Pass `key`, or set inference with `eqx.nn.inference_mode`."
            )
        return jnp.where(jr.bernoulli(key, 1 - self.rate), x / (1 - self.rate), jnp.zeros_like(x))
