"""What the page of a checkpoint says of the leaves of a state, and how leaves are held against it."""

import equinox as eqx
import jax
import jax.numpy as jnp

from s5eqx._typing import PyTree
from s5eqx.train._leaves import is_array_or_shape
from s5eqx.train.checksum import checksum


def describe(state: PyTree) -> list[dict]:
    """Path, shape and dtype of every array, whether it exists yet or not."""
    shapes = eqx.filter(state, is_array_or_shape)
    return [
        {"path": jax.tree_util.keystr(path), "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    ]


def own(state: PyTree) -> tuple[list[jax.Array], list[dict]]:
    """The arrays of a state, which no later step overwrites, and their descriptions with checksums."""
    owned = [_own(array) for array in _arrays(state)]
    totals = [{"checksum": int(total)} for _, total in owned]
    return [array for array, _ in owned], [a | b for a, b in zip(describe(state), totals, strict=True)]


def first_difference(saved: list[dict], wanted: list[dict]) -> str | None:
    """How a state differs in structure from one that was saved; `None` if it does not."""
    for i in range(max(len(saved), len(wanted))):
        was = _text(saved[i]) if i < len(saved) else "nothing"
        now = _text(wanted[i]) if i < len(wanted) else "nothing"
        if was != now:
            return f"leaf {i} must be {now}, but the checkpoint has {was}"
    return None


def check_arrays(saved: list[dict], state: PyTree) -> None:
    """Raises if an array is not what was saved."""
    for described, array in zip(saved, _arrays(state), strict=True):
        if int(_own(array)[1]) != described["checksum"]:
            raise ValueError(f"{described['path']} does not have the checksum it was saved with")


@jax.jit
def _copied(array: jax.Array):
    return jnp.copy(array), checksum(array)


_checksum = jax.jit(checksum)


def _own(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Orbax copies an accelerator's memory before it returns; at the host's own it only looks.
    on_host = next(iter(array.devices())).platform == "cpu"
    return _copied(array) if on_host else (array, _checksum(array))


def _arrays(state: PyTree) -> list[jax.Array]:
    return jax.tree.leaves(eqx.filter(state, eqx.is_array))


def _text(leaf: dict) -> str:
    return f"{leaf['path']}: {leaf['dtype']}{leaf['shape']}"
