"""S5 in both directions: every output sees the whole sequence."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike

from s5eqx import ops
from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractMixer
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.s5 import S5
from s5eqx.nn.s5_init import AbstractCInit, TruncatedNormal


class BidirectionalS5(AbstractMixer):
    """One system, run forward and backward:

        x[t] = Lambda_bar x[t-1] + B_bar u[t],   z[t] = Lambda_bar z[t+1] + B_bar u[t]
        y[t] = f Re(C x[t] + C_backward z[t]) + D u[t]

    followed by `activation(y)`. `[C, C_backward]` is the output matrix with 2P columns of the paper's code.
    It is no causal mixer: it has no state and no step. In a packed sequence `reset[t]` separates t-1 from
    t in both directions.

    Source: Smith et al., "S5" (arXiv 2208.04933), and the `main` branch of its code.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("C_backward",)
    resets: ClassVar[bool] = True

    forward: S5
    C_backward: Float[Array, "D P 2"]

    def __init__(
        self,
        width: int,
        state_size: int,
        *,
        num_blocks: int = 1,
        conj_sym: bool = True,
        C_init: AbstractCInit = TruncatedNormal(),
        discretisation: AbstractDiscretisation = ZOH(),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        clip_eigs: bool = True,
        step_rescale: float = 1.0,
        activation: Callable = eqx.nn.Identity(),
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:** those of `S5`."""
        forward_key, backward_key = jr.split(key)
        build = lambda key: S5(
            width,
            state_size,
            num_blocks=num_blocks,
            conj_sym=conj_sym,
            C_init=C_init,
            discretisation=discretisation,
            dt_min=dt_min,
            dt_max=dt_max,
            clip_eigs=clip_eigs,
            step_rescale=step_rescale,
            activation=activation,
            dtype=dtype,
            key=key,
        )
        self.forward = build(forward_key)
        self.C_backward = build(backward_key).C

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        backward = eqx.tree_at(lambda s5: (s5.C, s5.D), self.forward, (self.C_backward, jnp.zeros_like(self.forward.D)))
        # Backward in time the flag of t+1 drops what enters t. The one that wraps round drops an empty state.
        flipped = None if reset is None else jnp.roll(reset[::-1], 1)
        y = _linear(self.forward, x, reset) + _linear(backward, x[::-1], flipped)[::-1]
        return self.forward.activation(y)


def _linear(s5, x, reset):
    Lambda_bar, B_bar, C = s5.discretised()
    return ops.ssm(x, Lambda_bar, B_bar, C, s5.D, reset=reset)[0]
