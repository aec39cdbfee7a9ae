"""A short causal convolution, each channel with its own taps."""

from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._random import truncated_normal
from s5eqx.nn._select import drop, keep_rows


class ShortConv(AbstractCausalMixer):
    """`y[t] = bias + sum_k weight[k] x[t - (K-1) + k]`, with zeros before the start.

    `weight` is `(K, D)`, oldest tap first: the last one multiplies the current sample. The state is the tail,
    the last `K - 1` inputs, in the dtype of the parameters.

    Source: the short filter of Poli et al., "Hyena Hierarchy" (arXiv 2302.10866).

    Differs from the reference: a sum of `K` products, not a grouped convolution, which XLA runs many times
    slower on CPU.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    weight: Float[Array, "K D"]
    bias: Float[Array, " D"]

    def __init__(self, width: int, kernel_size: int, *, key: PRNGKeyArray):
        """**Arguments:** `width` channels; `kernel_size >= 1` taps, in samples. The taps are drawn as
        truncated normals of variance `1 / kernel_size`; the bias is zero.
        """
        if width < 1 or kernel_size < 1:
            raise ValueError(f"width and kernel_size must be at least 1; got width={width}, kernel_size={kernel_size}.")
        dtype = jnp.result_type(float)
        self.weight = truncated_normal(key, (kernel_size, width), 1 / kernel_size, dtype)
        self.bias = jnp.zeros(width, dtype)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        return self.prefill(self.init_state(), x, reset=reset)[1]

    def init_state(self) -> Float[Array, "tail D"]:
        return jnp.zeros_like(self.weight[1:])

    @checked
    def prefill(
        self,
        state: Float[Array, "tail D"],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "tail D"], Float[Array, "L D"]]:
        x, taps = x.astype(state.dtype), self.weight[:, None]
        # y[t] = w_K x[t] + (w_{K-1} x[t-1] + (...)): a partial sum waits a step for each further tap. Nothing but x
        # is kept for the backward pass, and a reset drops the partial sum that comes from before it.
        y = taps[0] * x
        for k in range(1, len(taps)):
            before = jnp.sum(self.weight[:k] * state[-k:], axis=0, keepdims=True)
            late = jnp.concatenate([before, y])[: len(x)]
            y = (late if reset is None else keep_rows(~reset, late)) + taps[k] * x
        tail = jnp.concatenate([state, x])[len(x) :]
        if reset is not None:
            # Samples of one sequence share a number; what the tail still holds belongs to sequence 0.
            sequence = jnp.pad(jnp.cumsum(reset, dtype=jnp.int32), (len(state), 0))
            tail = keep_rows(sequence[len(x) :] == sequence[-1:], tail)
        return tail, y + self.bias[None]

    def entering_state(
        self, x: Float[Array, "L D"], *, axis_name: str, reset: Bool[Array, " L"] | None = None
    ) -> Float[Array, "tail D"]:
        """The state before this device's piece `x` of a sequence that is split, in order, over a mesh axis: the last
        samples of the device before it."""
        state = self.init_state()
        if len(x) < len(state):
            raise ValueError(
                f"A device must hold at least the {len(state)} samples that a convolution of {len(self.weight)} taps "
                f"looks back; got pieces of {len(x)}. Split the sequence over fewer devices."
            )
        tail, _ = self.prefill(state, x, reset=reset)
        return lax.ppermute(tail, axis_name, [(i, i + 1) for i in range(lax.axis_size(axis_name) - 1)])

    @checked
    def step(
        self,
        state: Float[Array, "tail D"],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "tail D"], Float[Array, " D"]]:
        state = drop(state, reset)
        window = jnp.concatenate([state, x_t.astype(state.dtype)[None]])
        return window[1:], jnp.sum(self.weight * window, axis=0) + self.bias
