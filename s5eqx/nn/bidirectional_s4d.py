"""S4D in both directions: every output sees the whole sequence."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractMixer
from s5eqx.nn._select import keep_rows
from s5eqx.nn.activations import Gelu
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.s4d import S4D
from s5eqx.nn.s4d_init import AbstractAInit, AbstractBInit, AbstractRealPart, ExpReal, LinInit, OnesBInit


class BidirectionalS4D(AbstractMixer):
    """`S4D` whose systems have a second read-out, `C_backward`, on what is strictly to come. With `k` and `k_backward`
    the kernels of the two,

        y[t] = sum_j k[j] u[t-j] + sum_j k_backward[j] u[t+1+j] + D u[t].

    It is no causal mixer: it has no state and no step. In a packed sequence `reset[t]` separates t-1 from t in both
    directions.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893);
    the bidirectional layer of the S4 code.

    Differs from the reference: its `C` of `2c` channels is `[C, C_backward]`.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("C_backward",)
    resets: ClassVar[bool] = True

    forward: S4D
    C_backward: Float[Array, "c D P 2"]

    def __init__(
        self,
        width: int,
        state_size: int = 64,
        *,
        num_ssm: int | None = None,
        channels: int = 1,
        A_init: AbstractAInit = LinInit(),
        B_init: AbstractBInit = OnesBInit(),
        train_B: bool = False,
        discretisation: AbstractDiscretisation = ZOH(),
        real_part: AbstractRealPart = ExpReal(),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bandlimit: float | None = None,
        activation: Callable = Gelu(),
        dropout: float = 0.0,
        glu: bool = True,
        key: PRNGKeyArray,
    ):
        """**Arguments:** those of `S4D`."""
        build = lambda key: S4D(
            width,
            state_size,
            num_ssm=num_ssm,
            channels=channels,
            A_init=A_init,
            B_init=B_init,
            train_B=train_B,
            discretisation=discretisation,
            real_part=real_part,
            dt_min=dt_min,
            dt_max=dt_max,
            bandlimit=bandlimit,
            activation=activation,
            dropout=dropout,
            glu=glu,
            key=key,
        )
        forward_key, backward_key = jr.split(key)
        self.forward = build(forward_key)
        self.C_backward = build(backward_key).ssm.C

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        ssm = self.forward.ssm
        backward = eqx.tree_at(lambda ssm: (ssm.C, ssm.D), ssm, (self.C_backward, None))
        # Backward in time the flag of t+1 drops what enters t. The one that wraps round drops an empty state.
        flipped = None if reset is None else jnp.roll(reset[::-1], 1)
        ahead = backward(x[::-1], reset=flipped)[::-1]  # from u[t] on: shifted by one, from u[t+1] on
        ahead = jnp.concatenate([ahead[1:], jnp.zeros_like(ahead[:1])])
        if reset is not None:
            ahead = keep_rows(~jnp.roll(reset, -1), ahead)
        return self.forward.read_out(ssm(x, reset=reset) + ahead, key=key)
