"""The three ways to run a causal mixer, as one signature.

A layer made of mixers writes its own maths once, with `run(mixer, state, x, key) -> (state, y)` for each of
its parts, and gets `__call__`, `prefill` and `step` from the three functions here.
"""

from collections.abc import Callable

from s5eqx._typing import Array, Bool, PRNGKeyArray, PyTree
from s5eqx.nn._mixer import AbstractCausalMixer

Run = Callable[[AbstractCausalMixer, PyTree[Array], Array, PRNGKeyArray | None], tuple[PyTree[Array], Array]]


def in_parallel(reset: Bool[Array, " L"] | None) -> Run:
    """The whole sequence; the state passes by unchanged."""
    return lambda mixer, state, x, key: (state, mixer(x, reset=reset, key=key))


def in_chunks(reset: Bool[Array, " L"] | None) -> Run:
    return lambda mixer, state, x, key: mixer.prefill(state, x, reset=reset, key=key)


def in_steps(reset: Bool[Array, ""] | None) -> Run:
    return lambda mixer, state, x_t, key: mixer.step(state, x_t, reset=reset, key=key)
