"""The devices that one training step is spread over: the batch over some, the length of each sequence over others."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from s5eqx._typing import PyTree

DATA, SEQUENCE = "data", "sequence"
"""The axes of a mesh: devices along `data` hold different sequences, along `sequence` pieces of the same."""

REPLICATED = PartitionSpec()
ROWS = PartitionSpec(DATA)
TOKENS = PartitionSpec(DATA, SEQUENCE)


def make_mesh(data: int | None = None, sequence: int = 1) -> Mesh:
    """A mesh of `data` by `sequence` devices, of all processes.

    **Arguments:**

    - `data`: over how many devices the batch is split; `None` for all that are left.
    - `sequence`: over how many devices the length is split. Neighbours along it exchange states, so it comes last,
      where devices are closest.
    """
    devices = jax.devices()
    if sequence < 1 or (data is not None and data < 1):
        raise ValueError(f"a mesh has at least 1 device along each axis, got data={data}, sequence={sequence}")
    all_of_them = data is None or jax.process_count() > 1
    data = max(1, len(devices) // sequence) if data is None else data
    if data * sequence > len(devices):
        raise ValueError(
            f"a mesh of data={data} by sequence={sequence} needs {data * sequence} devices, there are {len(devices)}; "
            f"take fewer, or start more processes"
        )
    if all_of_them and data * sequence < len(devices):
        raise ValueError(
            f"the mesh must take all {len(devices)} devices where data is None or there are several processes, got "
            f"data={data} by sequence={sequence}; take a sequence that divides them"
        )
    return Mesh(np.array(devices[: data * sequence]).reshape(data, sequence), (DATA, SEQUENCE))


def check_mesh(mesh: Mesh, rows: dict[str, int], length: int) -> None:
    """Refuses a mesh that does not divide the numbers of `rows` or the length of a sequence."""
    if tuple(mesh.axis_names) != (DATA, SEQUENCE):
        raise ValueError(f"the mesh must have the axes {DATA!r} and {SEQUENCE!r}, got {mesh.axis_names}; see make_mesh")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"the axes of the mesh must be of type Auto, got {mesh.axis_types}; take s5eqx.train.make_mesh in place of "
            f"jax.make_mesh, or give that its axis_types"
        )
    for name, size in rows.items():
        if size % mesh.shape[DATA]:
            raise ValueError(
                f"{name}={size} sequences cannot be split evenly over data={mesh.shape[DATA]} devices; take a multiple"
            )
    if length % mesh.shape[SEQUENCE]:
        raise ValueError(
            f"sequences of {length} tokens cannot be split evenly over sequence={mesh.shape[SEQUENCE]} devices; "
            f"take a multiple"
        )


def on(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """How an array lies on the mesh."""
    return NamedSharding(mesh, spec)


def on_one_device(tree: PyTree) -> PyTree:
    """Arrays that all devices hold, as this process's first one has them."""
    return jax.tree.map(lambda a: a.addressable_data(0) if isinstance(a, jax.Array) else a, tree)
