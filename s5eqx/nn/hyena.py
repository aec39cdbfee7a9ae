"""Hyena: long operators interleaved with gates."""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, PRNGKeyArray, PyTree, checked
from s5eqx.nn._check import check_mixer, check_rate
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._random import split
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.linear import linear
from s5eqx.nn.s5 import S5
from s5eqx.nn.s5_init import AbstractCInit, TruncatedNormal
from s5eqx.nn.short_conv import ShortConv


class AbstractFilterBank(eqx.Module):
    """Owns the `N - 1` long operators of a Hyena layer, so that they may share parameters."""

    @abc.abstractmethod
    def operators(self) -> tuple[AbstractCausalMixer, ...]:
        """The operators, the one that is applied first in front."""


class MixerBank(AbstractFilterBank):
    """A bank of independent operators."""

    mixers: tuple[AbstractCausalMixer, ...]

    def operators(self) -> tuple[AbstractCausalMixer, ...]:
        return self.mixers


class Hyena(AbstractComposedMixer):
    """The Hyena recurrence of order `N >= 2`. With `x_0, ..., x_{N-1}, v` the pieces of
    `short_conv(in_proj(u))`, each of width `D`,

        v <- operator_o(dropout(v * x_{N-1-o}))     for o = 0 ... N-2
        y  = out_proj(activation(v * x_0)).

    The state is the tail of the short convolution and one state for each operator.

    Source: Poli et al., "Hyena Hierarchy" (arXiv 2302.10866); its S5 form in the `development` branch of the
    S5 code.

    Differs from the reference: `step` includes the short convolution and keeps a state for every order, so it
    equals the parallel form for all orders; no input is cut to a maximal length.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    in_proj: eqx.nn.Linear
    short_conv: ShortConv | None
    bank: AbstractFilterBank
    activation: Callable
    dropout: eqx.nn.Dropout
    out_proj: eqx.nn.Linear

    def __init__(
        self,
        width: int,
        bank: AbstractFilterBank,
        *,
        order: int = 2,
        short_filter: int = 3,
        activation: Callable = eqx.nn.Identity(),
        dropout: float = 0.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `bank`: its `operators()` are `order - 1` causal mixers of this width.
        - `order`: `N`, the number of gates.
        - `short_filter`: taps of the short convolution, in samples; 0 leaves it out.
        - `activation`: a module that acts on the last product.
        - `dropout`: the probability to drop an entry of a product before its operator.
        """
        if width < 1 or short_filter < 0:
            raise ValueError(f"width must be positive and short_filter at least 0; got {width} and {short_filter}.")
        if order < 2:
            raise ValueError(f"order must be at least 2, a gate before the operator and one after; got {order}.")
        in_key, conv_key, out_key = jr.split(key, 3)
        self.in_proj = eqx.nn.Linear(width, (order + 1) * width, key=in_key)
        self.short_conv = ShortConv((order + 1) * width, short_filter, key=conv_key) if short_filter else None
        self.bank = bank
        self.activation = activation
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.out_proj = eqx.nn.Linear(width, width, key=out_key)
        operators = bank.operators()
        if len(operators) != order - 1:
            raise ValueError(
                f"A Hyena layer of order {order} takes a bank of {order - 1} operators; got {len(operators)}. "
                "Change the bank or the order."
            )
        for o, operator in enumerate(operators):
            check_mixer(operator, width, self.in_proj.weight.dtype, f"operator {o} of the bank")

    def init_state(self) -> PyTree[Array]:
        tail = None if self.short_conv is None else self.short_conv.init_state()
        return tail, tuple(operator.init_state() for operator in self.bank.operators())

    def forward(self, run, state, x, key):
        tail, states = state
        operators = self.bank.operators()
        keys = split(key, 2 * len(operators))
        z = linear(self.in_proj, x)
        if self.short_conv is not None:
            tail, z = run(self.short_conv, tail, z, None)
        *gates, v = jnp.split(z, len(operators) + 2, axis=-1)
        last_gate, new_states = gates.pop(0), []
        for operator, operator_state in zip(operators, states, strict=True):
            v = self.dropout(v * gates.pop(), key=keys.pop())
            operator_state, v = run(operator, operator_state, v, keys.pop())
            new_states.append(operator_state)
        return (tail, tuple(new_states)), linear(self.out_proj, self.activation(v * last_gate))


@checked
def hyena_s5(
    width: int,
    state_size: int,
    *,
    order: int = 2,
    short_filter: int = 3,
    num_blocks: int = 1,
    conj_sym: bool = True,
    C_init: AbstractCInit = TruncatedNormal(),
    discretisation: AbstractDiscretisation = ZOH(),
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    clip_eigs: bool = True,
    step_rescale: float = 1.0,
    activation: Callable = eqx.nn.Identity,
    dropout: float = 0.0,
    key: PRNGKeyArray,
) -> Hyena:
    """Hyena-S5: a Hyena layer whose long operators are `order - 1` separate `S5` layers.

    **Arguments:** those of `Hyena` and `S5`. `activation` is a factory, called as
    `activation(width, key=key)` for each `S5`: `HalfGLU2`, or `lambda width, *, key: Gelu()`.

    Source: the `development` branch of the S5 code.
    """
    if order < 2:
        raise ValueError(f"order must be at least 2: a gate before the operator, one after; got {order}.")
    layer_key, *operator_keys = jr.split(key, order)
    operators = []
    for operator_key in operator_keys:
        s5_key, activation_key = jr.split(operator_key)
        operators.append(
            S5(
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
                activation=activation(width, key=activation_key),
                key=s5_key,
            )
        )
    bank = MixerBank(tuple(operators))
    return Hyena(width, bank, order=order, short_filter=short_filter, dropout=dropout, key=layer_key)
