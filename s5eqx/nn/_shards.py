"""A sequence whose length is split over devices: each runs its piece from the state that enters it."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from s5eqx._typing import Array, Bool, Float, PyTree
from s5eqx.nn._composed import AbstractComposed, Run
from s5eqx.nn._mixer import AbstractCausalMixer


@runtime_checkable
class _Splits(Protocol):
    entering_state: Callable[..., Any]


def in_shards(axis_name: str, reset: Bool[Array, " L"] | None) -> Run:
    """Whole sequences, as a `Run` inside `jax.shard_map`: `x` is this device's piece, in the order of the mesh axis.

    A mixer without a state acts on each step alone. Any other must have `entering_state(x, axis_name=..., reset=...)`,
    the state that the pieces of the devices before this one leave.
    """

    def run(mixer, state, x, key):
        if isinstance(mixer, AbstractComposed):
            return mixer.forward(run, state, x, key)
        return mixer.prefill(_entering(mixer, x, axis_name, reset), x, reset=reset, key=key)

    return run


def _entering(
    mixer: AbstractCausalMixer, x: Float[Array, "L D"], axis_name: str, reset: Bool[Array, " L"] | None
) -> PyTree[Array]:
    if isinstance(mixer, _Splits):
        return mixer.entering_state(x, axis_name=axis_name, reset=reset)
    state = mixer.init_state()
    if jax.tree.leaves(state):
        raise ValueError(
            f"A sequence can be split over devices where every mixer is an S5, a short convolution or acts on each "
            f"step alone, as in Hyena-S5; got {type(mixer).__name__}. Split the batch instead, or change the mixer."
        )
    return state
