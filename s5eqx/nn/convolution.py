"""A long causal convolution with an explicit kernel."""

import abc
from typing import ClassVar

import jax.numpy as jnp

from s5eqx import ops
from s5eqx._typing import Array, Bool, Float, Int, PRNGKeyArray, checked
from s5eqx._varying import error_if
from s5eqx.nn._mixer import AbstractCausalMixer, refuse_reset

State = tuple[Int[Array, ""], Float[Array, "past D"]]


class AbstractConvolution(AbstractCausalMixer):
    """A causal mixer that convolves with its `taps()` and does nothing else, whose state is that of `Convolution`.
    Output `i` hears input `i mod D`."""

    @property
    @abc.abstractmethod
    def max_length(self) -> int:
        """The longest sequence, in steps."""

    @abc.abstractmethod
    def taps(self) -> tuple[Float[Array, "K out"], Float[Array, " out"]]:
        """The kernel of each output, and its skip, which acts beside tap 0."""


class Convolution(AbstractConvolution):
    """`y[t] = sum_j kernel[j] u[t-j] + skip u[t]` for each channel, with zeros before the start.

    A sequence is at most as long as the kernel. The state is the number of inputs so far and the window of the last
    `K - 1` of them, so a step costs O(K). It cannot be reset: an FFT has no state to drop at a step.

    Source: the long convolution of Poli et al., "Hyena Hierarchy" (arXiv 2302.10866).
    """

    recurrence: ClassVar[tuple[str, ...]] = ("kernel", "skip")
    resets: ClassVar[bool] = False

    kernel: Float[Array, "K D"]
    skip: Float[Array, " D"]

    @property
    def max_length(self) -> int:
        return self.kernel.shape[-2]

    def taps(self) -> tuple[Float[Array, "K D"], Float[Array, " D"]]:
        return self.kernel, self.skip

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        refuse_reset(self, reset)
        self._check_length(len(x))
        u = x.astype(self.skip.dtype)
        return (ops.causal_convolution(u, self.kernel) + self.skip[None] * u).astype(x.dtype)

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
        u = x.astype(self.skip.dtype)
        y = ops.causal_convolution(u, self.kernel, window) + self.skip[None] * u
        return (position, jnp.concatenate([window, u])[len(x) :]), y.astype(x.dtype)

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
        u = x_t.astype(self.skip.dtype)
        inputs = jnp.concatenate([window, u[None]])
        y_t = jnp.sum(self.kernel[::-1] * inputs, axis=0) + self.skip * u
        return (position, inputs[1:]), y_t.astype(x_t.dtype)

    def _check_length(self, steps):
        if steps > len(self.kernel):
            raise ValueError(
                f"A sequence must be no longer than the kernel, {len(self.kernel)} steps; got {steps}. Build "
                "the layer with a larger max_length."
            )

    def _advance(self, state, steps):
        self._check_length(steps)
        position, window = state
        position = error_if(
            position + steps,
            position + steps > len(self.kernel),
            f"A sequence is longer than its convolution's kernel, {len(self.kernel)} steps. Build the layer with a "
            "larger max_length, or start from a new state.",
        )
        return position, window
