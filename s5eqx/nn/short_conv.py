"""A short causal convolution, each channel with its own taps."""

from typing import ClassVar

import jax.numpy as jnp

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._random import truncated_normal


class ShortConv(AbstractCausalMixer):
    """`y[t] = bias + sum_k weight[k] x[t - (K-1) + k]`, with zeros before the start.

    `weight` is `(K, D)`, oldest tap first: the last one multiplies the current sample. The state is the tail,
    the last `K - 1` inputs, in the dtype of the parameters.

    Source: the short filter of Poli et al., "Hyena Hierarchy" (arXiv 2302.10866).

    Differs from the reference: a sum of `K` shifted products, not a grouped convolution, which XLA runs many
    times slower on CPU.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()

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
        length = len(x)
        window = jnp.concatenate([state, x.astype(state.dtype)])  # window[K-1+t] is x[t]
        shifted = [window[k : k + length] for k in range(len(self.weight))]
        tail = window[length:]
        if reset is not None:
            # Samples of one sequence share a number; what the tail still holds belongs to sequence 0.
            sequence = jnp.pad(jnp.cumsum(reset, dtype=jnp.int32), (len(state), 0))
            now = sequence[len(state) :]
            shifted = [_where(sequence[k : k + length] == now, s) for k, s in enumerate(shifted)]
            tail = _where(sequence[length:] == sequence[-1:], tail)
        y = sum(w[None] * s for w, s in zip(self.weight, shifted, strict=True))
        return tail, y + self.bias[None]

    @checked
    def step(
        self,
        state: Float[Array, "tail D"],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "tail D"], Float[Array, " D"]]:
        if reset is not None:
            state = jnp.where(reset, jnp.zeros_like(state), state)
        window = jnp.concatenate([state, x_t.astype(state.dtype)[None]])
        return window[1:], jnp.sum(self.weight * window, axis=0) + self.bias


def _where(keep, rows):
    return jnp.where(keep[:, None], rows, jnp.zeros_like(rows))
