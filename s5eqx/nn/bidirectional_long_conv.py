"""The long-convolution layer in both directions: every output sees the whole sequence."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractMixer, refuse_reset
from s5eqx.nn._random import split
from s5eqx.nn.activations import Gelu
from s5eqx.nn.long_conv import LongConv
from s5eqx.nn.long_conv_init import AbstractKernelInit, AbstractSmooth, RandomKernel


class BidirectionalLongConv(AbstractMixer):
    """`LongConv` with a second kernel for each channel, which acts on what is strictly to come:

        y[t, c] = sum_j kbar[c, j] u[t-j] + sum_j kbar_backward[c, j] u[t+1+j] + D[c] u[t]

    It is no causal mixer: it has no state and no step.

    Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646).

    Differs from the reference: its one kernel of `2c` channels is two of `c`.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("kernel_backward",)
    resets: ClassVar[bool] = False

    forward: LongConv
    kernel_backward: Float[Array, "c D K"]

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        channels: int = 1,
        init: AbstractKernelInit = RandomKernel(),
        lam: float = 0.003,
        smooth: AbstractSmooth | None = None,
        kernel_dropout: float = 0.0,
        dropout: float = 0.0,
        activation: Callable = Gelu(),
        glu: bool = True,
        key: PRNGKeyArray,
    ):
        """**Arguments:** those of `LongConv`."""
        forward_key, backward_key = jr.split(key)
        self.forward = LongConv(
            width,
            max_length,
            channels=channels,
            init=init,
            lam=lam,
            smooth=smooth,
            kernel_dropout=kernel_dropout,
            dropout=dropout,
            activation=activation,
            glu=glu,
            key=forward_key,
        )
        kernel = self.forward.conv.kernel
        self.kernel_backward = init(channels, width, max_length, dtype=kernel.dtype, key=backward_key)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        refuse_reset(self, reset)
        forward_key, backward_key, mix_key = split(key, 3)
        conv = self.forward.conv
        no_skip = jnp.zeros_like(conv.D)
        backward = eqx.tree_at(lambda conv: (conv.kernel, conv.D), conv, (self.kernel_backward, no_skip))
        ahead = backward(x[::-1], key=backward_key)[::-1]  # from u[t] on: shifted by one, from u[t+1] on
        ahead = jnp.concatenate([ahead[1:], jnp.zeros_like(ahead[:1])])
        return self.forward.read_out(conv(x, key=forward_key) + ahead, key=mix_key)
