"""A long causal convolution with an explicit kernel."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from s5eqx import ops
from s5eqx._typing import Array, Bool, Float, Int, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer, refuse_reset

State = tuple[Int[Array, ""], Float[Array, "past D"]]


class Convolution(AbstractCausalMixer):
    """`y[t] = sum_j kernel[j] u[t-j] + skip u[t]` for each channel, with zeros before the start.

    A sequence is at most as long as the kernel. The state is the number of inputs so far and the window of the last
    `K - 1` of them, so a step costs O(K). It cannot be reset: an FFT has no state to drop at a step.

    Source: the long convolution of Poli et al., "Hyena Hierarchy" (arXiv 2302.10866).
    """

    recurrence: ClassVar[tuple[str, ...]] = ("kernel", "skip")
    resets: ClassVar[bool] = False

    kernel: Float[Array, "K D"]
    skip: Float[Array, " D"]

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        refuse_reset(self, reset)
        if len(x) > len(self.kernel):
            raise ValueError(
                f"A sequence must be no longer than the kernel, {len(self.kernel)} steps; got {len(x)}. Build "
                "the layer with a larger max_length."
            )
        return ops.causal_convolution(x, self.kernel) + self._skip(x)

    def init_state(self) -> State:
        return jnp.zeros((), jnp.int32), jnp.zeros_like(self.kernel[1:])

    @checked
    def prefill(
        self,
        state: State,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[State, Float[Array, "L D"]]:
        refuse_reset(self, reset)
        position, window = self._advance(state, len(x))
        inputs = jnp.concatenate([window, x.astype(window.dtype)])
        y = ops.causal_convolution(inputs, self.kernel)[len(window) :].astype(x.dtype)
        return (position, inputs[len(x) :]), y + self._skip(x)

    @checked
    def step(
        self,
        state: State,
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[State, Float[Array, " D"]]:
        refuse_reset(self, reset)
        position, window = self._advance(state, 1)
        inputs = jnp.concatenate([window, x_t.astype(window.dtype)[None]])
        y_t = jnp.sum(self.kernel[::-1] * inputs, axis=0).astype(x_t.dtype)
        return (position, inputs[1:]), y_t + self._skip(x_t)

    def _skip(self, x):
        return (jnp.broadcast_to(self.skip, x.shape) * x.astype(self.skip.dtype)).astype(x.dtype)

    def _advance(self, state, steps):
        position, window = state
        position = eqx.error_if(
            position + steps,
            position + steps > len(self.kernel),
            f"A sequence is longer than its convolution's kernel, {len(self.kernel)} steps. Build the layer with a "
            "larger max_length, or start from a new state.",
        )
        return position, window
