"""S5 in both directions: every output sees the whole sequence."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike

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

    `intervals` are those of `S5`. The backward system comes to t from t+1, so that z[t] takes `intervals[t+1]`. The
    first and the last sample of a sequence are come to from nowhere: both take the interval of the first, which scales
    no decay, only the gain of their inputs. In a packed sequence each has its own first interval, at its reset.

    Source: Smith et al., "S5" (arXiv 2208.04933), and the `main` branch of its code.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("C_backward",)
    resets: ClassVar[bool] = True
    takes_intervals: ClassVar[bool] = True

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
        intervals: Float[Array, " L"] | None = None,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        backward = eqx.tree_at(lambda s5: (s5.C, s5.D), self.forward, (self.C_backward, jnp.zeros_like(self.forward.D)))
        # Backward in time the flag of t+1 drops what enters t. The one that wraps round drops an empty state.
        flipped = None if reset is None else jnp.roll(reset[::-1], 1)
        behind = None if intervals is None else _behind(jnp.asarray(intervals), reset)[::-1]
        empty = self.forward.init_state()
        _, y = self.forward.linear_part(empty, x, intervals=intervals, reset=reset)
        _, y_backward = backward.linear_part(empty, x[::-1], intervals=behind, reset=flipped)
        return self.forward.activation(y + y_backward[::-1])


def _behind(intervals, reset):
    """The interval behind each sample, which is the one in front of the next; behind the last of a sequence, the one
    in front of its first."""
    following = jnp.roll(intervals, -1)
    if reset is None:
        return following
    index = jnp.arange(len(intervals))
    is_first = reset | (index == 0)
    first = lax.cummax(jnp.where(is_first, index, 0))
    return jnp.where(jnp.roll(is_first, -1), intervals[first], following)
