"""Mixers made of mixers: the three ways to run a part, as one signature, and the layer that uses it."""

import abc
from collections.abc import Callable
from typing import Any

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, PyTree, checked
from s5eqx.nn._mixer import AbstractCausalMixer, refuse_reset

Run = Callable[[AbstractCausalMixer, PyTree[Array], Any, PRNGKeyArray | None], tuple[PyTree[Array], Any]]


def in_parallel(reset: Bool[Array, " L"] | None) -> Run:
    """The whole sequence; the state passes by unchanged."""
    return lambda mixer, state, x, key: (state, mixer(x, reset=reset, key=key))


def in_chunks(reset: Bool[Array, " L"] | None) -> Run:
    return lambda mixer, state, x, key: mixer.prefill(state, x, reset=reset, key=key)


def in_steps(reset: Bool[Array, ""] | None) -> Run:
    return lambda mixer, state, x_t, key: mixer.step(state, x_t, reset=reset, key=key)


class AbstractComposed(AbstractCausalMixer):
    """What is made of causal mixers, and writes its maths once, in `forward`."""

    @abc.abstractmethod
    def forward(self, run: Run, state: PyTree[Array], x: Any, key: PRNGKeyArray | None) -> tuple[PyTree[Array], Any]:
        """State and output, with `run(mixer, state, x, key) -> (state, y)` for each part; `x` is (L, D) or (D,)."""


class AbstractComposedMixer(AbstractComposed):
    """A causal mixer made of causal mixers, which gets its three calls from `forward`."""

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        refuse_reset(self, reset)
        return self.forward(in_parallel(reset), self.init_state(), x, key)[1]

    @checked
    def prefill(
        self,
        state: PyTree[Array],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree[Array], Float[Array, "L D"]]:
        refuse_reset(self, reset)
        return self.forward(in_chunks(reset), state, x, key)

    @checked
    def step(
        self,
        state: PyTree[Array],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree[Array], Float[Array, " D"]]:
        refuse_reset(self, reset)
        return self.forward(in_steps(reset), state, x_t, key)
