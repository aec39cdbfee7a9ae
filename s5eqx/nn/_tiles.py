"""Steps whose long convolutions remember nothing: what their past adds comes from outside, one row for all of them.

The window of past inputs makes a step of a convolution cost O(window). A loop that knows all steps to come can do
better with `ops.tile_in_block` and `ops.tile_of_blocks`, for all convolutions of a model at once: their channels lie
side by side in one array of slots. `lay_tape` makes that array from the state of a model that has read its prompt,
and `in_tiles` runs the model's step on a row of it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from s5eqx import ops
from s5eqx._typing import Array, Float, PRNGKeyArray, PyTree
from s5eqx.nn._composed import AbstractComposed, Run
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn.convolution import AbstractConvolution


class Slot(eqx.Module):
    """In place of a convolution's state: before a step what the past adds to its output, after it the input.

    `tap` is what multiplies the input at once: tap 0 and the skip.
    """

    row: Float[Array, "*lead out"]
    tap: Float[Array, "*lead out"]


class _Tape(eqx.Module):
    """What a convolution's past adds to each of the next outputs, and the taps that reach as far."""

    pending: Float[Array, "*lead T out"]
    kernel: Float[Array, "*lead T out"]
    tap: Float[Array, "*lead out"]


def in_tiles(
    mixer: AbstractCausalMixer, state: PyTree[Array], x_t: Any, key: PRNGKeyArray | None
) -> tuple[PyTree[Array], Any]:
    """A step, as a `Run`: convolutions read their slot and leave their input in it, all else steps as ever."""
    if isinstance(mixer, AbstractConvolution):
        u = jnp.tile(x_t.astype(state.tap.dtype), state.tap.size // x_t.size)
        return Slot(u, state.tap), (state.row + state.tap * u).astype(x_t.dtype)
    if isinstance(mixer, AbstractComposed):
        return mixer.forward(in_tiles, state, x_t, key)
    return mixer.step(state, x_t, key=key)


def lay_tape(
    model: AbstractCausalMixer, state: PyTree[Array], x_t: Any, steps: int
) -> tuple[PyTree[Array], Float[Array, "C steps"], Float[Array, "C steps"]]:
    """The state for `in_tiles`, what the past adds to each of the next `steps` outputs, and the kernels, zero beyond
    their end. `C` counts the channels of all convolutions. `x_t` is any input of a step."""
    with_tapes, _ = _tapes(steps)(model, state, x_t, None)
    tapes = [node for node in jax.tree.leaves(with_tapes, is_leaf=_is_tape) if _is_tape(node)]
    to_slot = lambda node, old: Slot(jnp.zeros_like(node.tap), node.tap) if _is_tape(node) else old
    state = jax.tree.map(to_slot, with_tapes, state, is_leaf=_is_tape)
    pending, kernel = ([jnp.moveaxis(getattr(tape, name), -2, -1) for tape in tapes] for name in ("pending", "kernel"))
    return state, _side_by_side(pending, steps), _side_by_side(kernel, steps)


def get_row(state: PyTree[Array]) -> Float[Array, " C"]:
    """The rows of all slots of a state."""
    return _side_by_side([slot.row for slot in _slots(state)])


def set_row(state: PyTree[Array], row: Float[Array, " C"]) -> PyTree[Array]:
    """The state with `row` cut up among its slots."""
    slots = _slots(state)
    ends = np.cumsum([slot.row.size for slot in slots])
    pieces = iter(jnp.split(row, ends[:-1]) if slots else ())
    one = lambda node: Slot(next(pieces).reshape(node.row.shape).astype(node.row.dtype), node.tap)
    return jax.tree.map(lambda node: one(node) if _is_slot(node) else node, state, is_leaf=_is_slot)


def _tapes(steps: int) -> Run:
    """A run that computes nothing but the tapes, in place of the convolutions' states."""

    def run(mixer, state, x_t, key):
        if isinstance(mixer, AbstractComposed):
            return mixer.forward(run, state, x_t, key)
        y = eqx.filter_eval_shape(lambda mixer, state, x_t: mixer.step(state, x_t, key=key)[1], mixer, state, x_t)
        if isinstance(mixer, AbstractConvolution):
            state = _tape(mixer, state, steps)
        return state, jnp.zeros(y.shape, y.dtype)

    return run


def _tape(conv, state, steps):
    _, window = state
    kernel, skip = conv.taps()
    window = jnp.tile(window, (1, len(skip) // window.shape[1]))
    pending = ops.causal_convolution(jnp.zeros((steps, len(skip)), skip.dtype), kernel, window)
    kernel = kernel.astype(skip.dtype)
    reach = jnp.pad(kernel[:steps], ((0, max(0, steps - len(kernel))), (0, 0)))
    return _Tape(pending, reach, kernel[0] + skip)


def _side_by_side(arrays, *steps):
    """The arrays' channels, all axes but that of the steps, on one axis."""
    dtype = np.result_type(*(a.dtype for a in arrays)) if arrays else np.float32
    flat = [a.astype(dtype).reshape(-1, *steps) for a in arrays]
    return jnp.concatenate(flat) if flat else jnp.zeros((0, *steps), dtype)


def _slots(state):
    return [node for node in jax.tree.leaves(state, is_leaf=_is_slot) if _is_slot(node)]


def _is_slot(node):
    return isinstance(node, Slot)


def _is_tape(node):
    return isinstance(node, _Tape)
