"""From examples on the host to arrays on the devices, each process reading what its own devices hold."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from s5eqx._typing import Int
from s5eqx.data import AbstractBatch
from s5eqx.train.mesh import DATA, SEQUENCE, on


def to_devices(
    examples: Callable[[Int[np.ndarray, " B"]], AbstractBatch], indices: Int[np.ndarray, "*steps B"], mesh: Mesh | None
) -> AbstractBatch:
    """The batch `examples(indices)`, whose arrays are (*steps, B, ...).

    On a mesh they lie as the trainer takes them, rows over one axis and length over the other, and `examples` is asked
    for the rows of this process alone.
    """
    if mesh is None:
        batch = examples(indices.reshape(-1))
        return jax.tree.map(lambda a: jax.device_put(a.reshape(*indices.shape, *a.shape[1:])), batch)
    leaves, structure = jax.tree.flatten(examples(indices.reshape(-1)[:1]))
    read: dict[tuple, list[np.ndarray]] = {}  # rows once, for all devices that hold some of them

    def piece(leaf: int, where: Any) -> np.ndarray:
        rows, columns = where[: indices.ndim], where[indices.ndim :]  # slices
        name = tuple((s.start, s.stop) for s in rows)
        if name not in read:
            asked = indices[rows]
            batch = examples(asked.reshape(-1))
            read[name] = [a.reshape(*asked.shape, *a.shape[1:]) for a in jax.tree.leaves(batch)]
        return read[name][leaf][(slice(None),) * indices.ndim + columns]

    def spread(leaf: int, like: np.ndarray) -> jax.Array:
        axes = (*(None,) * (indices.ndim - 1), DATA, *((SEQUENCE,) if like.ndim > 1 else ()))
        shape = (*indices.shape, *like.shape[1:])
        return jax.make_array_from_callback(shape, on(mesh, PartitionSpec(*axes)), lambda where: piece(leaf, where))

    return jax.tree.unflatten(structure, [spread(*item) for item in enumerate(leaves)])
