"""Causal multi-head attention with a cache of stated length."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from s5eqx._typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree, checked
from s5eqx._varying import error_if
from s5eqx.nn._check import check_rate
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._position import positions
from s5eqx.nn._select import drop
from s5eqx.nn.linear import linear
from s5eqx.nn.rotary import Rotary
from s5eqx.nn.short_conv import ShortConv

Cache = Float[Array, "C H head_dim"]
State = tuple[PyTree[Array], Int[Array, ""], Cache, Cache]


class Attention(AbstractCausalMixer):
    """With `q, k, v` the pieces of `short_conv(Wqkv u)`, each split into `H` heads of `D / H` entries,

        y[t] = out_proj(sum_s dropout(w[t, s]) v[s]),   w[t, :] = softmax_s(q[t] . k[s] / sqrt(D / H))

    over the tokens `s <= t` of the same sequence, or the last `window` of them. `rotary` turns `q` and `k` by the
    token's position in its sequence.

    The state is the tail of the short convolution, the position of the next token, and the last `C` keys and values,
    `C` the smaller of `max_length` and `window`; the token at position `p` is in row `p mod C`.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762); with a short convolution, the attention
    layers of Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052).

    Differs from the reference: what is masked has weight zero, where the code subtracts 10,000 from its score. A value
    that is not finite still spoils all outputs of a call, since zero times it is no number.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    Wqkv: eqx.nn.Linear
    short_conv: ShortConv | None
    rotary: Rotary | None
    dropout: eqx.nn.Dropout
    out_proj: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)
    max_length: int | None = eqx.field(static=True)
    window: int | None = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        *,
        max_length: int | None = None,
        window: int | None = None,
        use_bias: bool = True,
        rotary: Rotary | None = None,
        short_conv: int = 0,
        dropout: float = 0.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `num_heads`: `H`; divides `width`.
        - `max_length`: the longest sequence, in tokens; None takes any, with a `window`.
        - `window`: how many tokens one attends to, itself included; None for all before it, with a `max_length`.
        - `use_bias`: whether the two dense layers have a bias.
        - `rotary`: `Rotary(dim)`, or None for no positions.
        - `short_conv`: taps of a short convolution on `q`, `k` and `v`, in samples; 0 leaves it out.
        - `dropout`: the probability to drop a weight.
        """
        if width < 1 or num_heads < 1 or width % num_heads:
            raise ValueError(f"width must be a positive multiple of num_heads; got {width} and {num_heads}.")
        given = [length for length in (max_length, window) if length is not None]
        if not given or min(given) < 1:
            raise ValueError(
                "The cache holds the smaller of max_length and window: give at least one, as a positive number; "
                f"got max_length={max_length} and window={window}."
            )
        if rotary is not None and rotary.dim > width // num_heads:
            raise ValueError(
                f"Rotary positions turn at most all {width // num_heads} entries of a head; got dim={rotary.dim}."
            )
        if short_conv < 0:
            raise ValueError(f"short_conv is a number of taps, or 0 for none; got {short_conv}.")
        qkv_key, conv_key, out_key = jr.split(key, 3)
        self.Wqkv = eqx.nn.Linear(width, 3 * width, use_bias=use_bias, key=qkv_key)
        self.short_conv = ShortConv(3 * width, short_conv, key=conv_key) if short_conv else None
        self.rotary = rotary
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.out_proj = eqx.nn.Linear(width, width, use_bias=use_bias, key=out_key)
        self.num_heads = num_heads
        self.max_length = max_length
        self.window = window

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        key_padding_mask: Bool[Array, " L"] | None = None,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        """The whole sequence in parallel, from the empty state.

        No token attends to one whose `key_padding_mask` is False, not even that token itself. Where nothing is left to
        attend to, all heads give zero.
        """
        z = linear(self.Wqkv, x)
        if self.short_conv is not None:
            z = self.short_conv(z, reset=reset)
        _, position = self._positions(None, len(x), reset)
        q, k, v = self._heads(z, position)
        if reset is None and key_padding_mask is None and len(x) <= self._capacity:
            return self._attend(q, k, v, None, key)
        seen = self._seen(position, 0)
        if key_padding_mask is not None:
            seen &= key_padding_mask[None]
            k, v = (jnp.where(key_padding_mask[:, None, None], rows, jnp.zeros_like(rows)) for rows in (k, v))
        return self._attend(q, k, v, seen, key)

    def init_state(self) -> State:
        tail = None if self.short_conv is None else self.short_conv.init_state()
        width, heads = self.Wqkv.weight.shape[1], self.num_heads
        cache = jnp.zeros((self._capacity, heads, width // heads), self.Wqkv.weight.dtype)
        return tail, jnp.zeros((), jnp.int32), cache, jnp.zeros_like(cache)

    @checked
    def prefill(
        self,
        state: State,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[State, Float[Array, "L D"]]:
        tail, index, old_keys, old_values = state
        z = linear(self.Wqkv, x)
        if self.short_conv is not None:
            tail, z = self.short_conv.prefill(tail, z, reset=reset)
        after, position = self._positions(index, len(x), reset)
        q, k, v = self._heads(z, position)
        k, v = (jnp.concatenate([jnp.roll(old, -index, axis=0), new]) for old, new in ((old_keys, k), (old_values, v)))
        y = self._attend(q, k, v, self._seen(position, self._capacity), key)
        keys, values = k[len(x) :], v[len(x) :]
        if reset is not None:
            own = ~jnp.any(reset) | (jnp.arange(self._capacity, 0, -1, dtype=jnp.int32) <= after)
            keys, values = (jnp.where(own[:, None, None], rows, jnp.zeros_like(rows)) for rows in (keys, values))
        return (tail, after, jnp.roll(keys, after, axis=0), jnp.roll(values, after, axis=0)), y

    @checked
    def step(
        self,
        state: State,
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[State, Float[Array, " D"]]:
        tail, index, keys, values = drop(state, reset)
        z = linear(self.Wqkv, x_t)
        if self.short_conv is not None:
            tail, z = self.short_conv.step(tail, z)
        after, (position,) = self._positions(index, 1, None)
        q, k, v = self._heads(z, position)
        row = position % self._capacity
        keys = lax.dynamic_update_index_in_dim(keys, k, row, axis=0)
        values = lax.dynamic_update_index_in_dim(values, v, row, axis=0)
        seen = (row - jnp.arange(self._capacity, dtype=jnp.int32)) % self._capacity <= position
        y = self._attend(q[None], keys, values, seen[None], key)
        return (tail, after, keys, values), y[0]

    @property
    def _capacity(self):
        return min(length for length in (self.max_length, self.window) if length is not None)

    def _positions(self, index, steps, reset):
        """As `positions`, from the start where `index` is None, and none beyond `max_length`."""
        after, here = positions(jnp.zeros((), jnp.int32) if index is None else index, steps, reset)
        if self.max_length is None:
            return after, here
        message = (
            f"A sequence is longer than the attention's max_length, {self.max_length} tokens. Build the layer with a "
            "larger max_length, reset its state, or give it a window and no max_length."
        )
        if reset is None and steps > self.max_length:
            raise ValueError(f"{message} Got {steps}.")
        if index is None and reset is None:
            return after, here
        return after, error_if(here, jnp.any(here >= self.max_length), message)

    def _heads(self, z, position):
        heads = (3, self.num_heads, z.shape[-1] // (3 * self.num_heads))
        q, k, v = jnp.moveaxis(z.reshape(*position.shape, *heads), -3, 0)
        return (q, k, v) if self.rotary is None else (self.rotary(q, position), self.rotary(k, position), v)

    def _seen(self, position, past):
        """Which of `past` rows and the new tokens each new token attends to."""
        time = jnp.arange(len(position), dtype=jnp.int32)
        age = (past + time)[:, None] - jnp.arange(past + len(position), dtype=jnp.int32)[None]
        return (age >= 0) & (age <= jnp.minimum(position, self._capacity - 1)[:, None])

    def _attend(self, q, k, v, seen, key):
        """`y` of the queries `q`; where `seen` is None, each sees the rows up to its own."""
        if q.dtype != jnp.float64 and (self.dropout.inference or self.dropout.p == 0):
            mask = None if seen is None else seen[None]
            with jax.numpy_dtype_promotion("standard"):  # in bfloat16 it does not run under the strict setting
                y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=seen is None)
        else:
            dtype = np.promote_types(q.dtype, np.float32)
            mask = jnp.tri(len(q), dtype=bool) if seen is None else seen
            scores = jnp.einsum("thi,shi->hts", q, k, preferred_element_type=dtype) / math.sqrt(q.shape[-1])
            scores = jnp.where(mask[None], scores, jnp.finfo(dtype).min)
            weights = self.dropout(jax.nn.softmax(scores), key=key).astype(v.dtype)
            y = jnp.einsum("hts,shi->thi", weights, v)
        if seen is not None:
            y = jnp.where(jnp.any(seen, axis=1)[:, None, None], y, jnp.zeros_like(y))
        return linear(self.out_proj, y.reshape(len(y), y.shape[1] * y.shape[2]))
