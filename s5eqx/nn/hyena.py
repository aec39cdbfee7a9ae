"""Hyena: long operators interleaved with gates."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, PRNGKeyArray, PyTree, checked
from s5eqx.nn._check import check_mixer, check_rate
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._heads import check_apart, contract, init_pairs, outer, run_pairs
from s5eqx.nn._random import split
from s5eqx.nn.bank import AbstractFilterBank, MixerBank
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.implicit_filter import ImplicitFilter
from s5eqx.nn.linear import linear
from s5eqx.nn.s5 import S5
from s5eqx.nn.s5_init import AbstractCInit, TruncatedNormal
from s5eqx.nn.short_conv import ShortConv


class Hyena(AbstractComposedMixer):
    """The Hyena recurrence of order `N >= 2`. With `x_0, ..., x_{N-1}, v` the pieces of
    `short_conv(in_proj(u))`, each of width `D`,

        v <- operator_o(dropout(v * x_{N-1-o}))     for o = 0 ... N-2
        y  = out_proj(activation(v * x_0)).

    With several heads (order 2 only, as in MultiHyena) `x_1`, `v` and `x_0` are keys, values and queries: the
    operator, which then has one channel a head, runs on the outer products of keys and values.

    The state is the tail of the short convolution and one state for each operator.

    Source: Poli et al., "Hyena Hierarchy" (arXiv 2302.10866); Massaroli et al., "Laughing Hyena" (arXiv 2310.18780)
    for the heads; the `development` branch of the S5 code for S5 operators.

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
    num_heads: int = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        bank: AbstractFilterBank,
        *,
        order: int = 2,
        num_heads: int = 1,
        short_filter: int = 3,
        activation: Callable = eqx.nn.Identity(),
        dropout: float = 0.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `bank`: its `operators()` are `order - 1` causal mixers of this width; with heads, of `num_heads` channels.
        - `order`: `N`, the number of gates.
        - `num_heads`: 1 is the Hyena of the paper, with a filter a channel; more share a filter in each head.
        - `short_filter`: taps of the short convolution, in samples; 0 leaves it out.
        - `activation`: a module that acts on the last product.
        - `dropout`: the probability to drop an entry of a product before its operator.
        """
        if width < 1 or short_filter < 0:
            raise ValueError(f"width must be positive and short_filter at least 0; got {width} and {short_filter}.")
        _check_heads(width, num_heads, order)
        in_key, conv_key, out_key = jr.split(key, 3)
        self.in_proj = eqx.nn.Linear(width, (order + 1) * width, key=in_key)
        self.short_conv = ShortConv((order + 1) * width, short_filter, key=conv_key) if short_filter else None
        self.bank = bank
        self.activation = activation
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.out_proj = eqx.nn.Linear(width, width, key=out_key)
        self.num_heads = num_heads
        if not isinstance(bank, AbstractFilterBank):
            raise ValueError(
                f"bank must be a filter bank, such as `MixerBank((mixer, ...))`; got a {type(bank).__name__}."
            )
        operators = eqx.filter_eval_shape(bank.operators)
        if len(operators) != order - 1:
            raise ValueError(
                f"A Hyena layer of order {order} takes a bank of {order - 1} operators; got {len(operators)}. "
                "Change the bank or the order."
            )
        channels = width if num_heads == 1 else num_heads
        for o, operator in enumerate(operators):
            check_mixer(operator, channels, self.in_proj.weight.dtype, f"operator {o} of the bank")
            if num_heads > 1:
                check_apart(operator)

    def init_state(self) -> PyTree[Array]:
        tail = None if self.short_conv is None else self.short_conv.init_state()
        return tail, tuple(init_pairs(operator, self._head_dim) for operator in self.bank.operators())

    def forward(self, run, state, x, key):
        tail, states = state
        operators = self.bank.operators()
        keys = split(key, 2 * len(operators))
        z = linear(self.in_proj, x)
        if self.short_conv is not None:
            tail, z = run(self.short_conv, tail, z, None)
        x_0, *gates, v = jnp.split(z, len(operators) + 2, axis=-1)
        head_dim, new_states = self._head_dim, []
        for operator, operator_state in zip(operators, states, strict=True):
            v = self.dropout(outer(gates.pop(), v, head_dim), key=keys.pop())
            operator_state, v = run_pairs(run, operator, operator_state, v, head_dim, keys.pop())
            new_states.append(operator_state)
        y = self.activation(contract(x_0, v, head_dim))
        return (tail, tuple(new_states)), linear(self.out_proj, y)

    @property
    def _head_dim(self):
        return 1 if self.num_heads == 1 else len(self.out_proj.weight) // self.num_heads


@checked
def hyena(
    width: int,
    max_length: int,
    *,
    order: int = 2,
    num_heads: int = 1,
    short_filter: int = 3,
    features: int = 5,
    filter_width: int = 64,
    num_hidden: int = 2,
    frequency: float = 10.0,
    modulate: bool = True,
    fast_decay: float = 0.3,
    slow_decay: float = 1.5,
    shift: float = 0.0,
    normalize: bool = False,
    use_bias: bool = True,
    train_positions: bool = False,
    activation: Callable = eqx.nn.Identity(),
    dropout: float = 0.0,
    key: PRNGKeyArray,
) -> Hyena:
    """Hyena as published: a `Hyena` layer over an `ImplicitFilter`. **Arguments:** those of the two.

    Source: Poli et al., "Hyena Hierarchy" (arXiv 2302.10866).
    """
    _check_heads(width, num_heads, order)
    layer_key, bank_key = jr.split(key)
    bank = ImplicitFilter(
        width if num_heads == 1 else num_heads,
        max_length,
        order=order,
        features=features,
        filter_width=filter_width,
        num_hidden=num_hidden,
        frequency=frequency,
        modulate=modulate,
        fast_decay=fast_decay,
        slow_decay=slow_decay,
        shift=shift,
        normalize=normalize,
        use_bias=use_bias,
        train_positions=train_positions,
        key=bank_key,
    )
    return Hyena(
        width,
        bank,
        order=order,
        num_heads=num_heads,
        short_filter=short_filter,
        activation=activation,
        dropout=dropout,
        key=layer_key,
    )


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
    _check_heads(width, 1, order)
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


def _check_heads(width, num_heads, order):
    if order < 2:
        raise ValueError(f"order must be at least 2, a gate before the operator and one after; got {order}.")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must be positive and divide the width {width}; got {num_heads}.")
    if num_heads > 1 and order > 2:
        raise ValueError(f"Heads need order 2: keys, values and queries; got num_heads={num_heads}, order={order}.")
