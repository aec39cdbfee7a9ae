"""Checkpoints: the arrays of a state by orbax, written atomically, with a page of JSON beside them."""

import warnings
import zlib
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import orbax.checkpoint as ocp

from s5eqx._typing import PyTree
from s5eqx.train._leaves import is_array_or_shape


class Checkpoints:
    """The newest checkpoints of a run, in one folder, one sub-folder a step.

    Beside the arrays stands what describes them: path, shape, dtype and checksum of every leaf, and the
    `metadata` of the caller (settings, versions). Nothing is pickled. A save is complete or absent.

    **Arguments:**

    - `folder`: where the checkpoints live; made if need be.
    - `keep`: how many to keep, the newest.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"a run keeps at least 1 checkpoint, got keep={keep}")
        self.folder = Path(folder).absolute()
        # Writing blocks, since the arrays are donated to the next step.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_):
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, metadata: dict) -> None:
        """Writes the arrays of `state`. Checkpoints of this step or later ones are replaced.

        `metadata` must be fit for JSON.
        """
        for stale in self.steps():
            if stale >= step:
                self._manager.delete(stale)
        arrays = jax.tree.leaves(eqx.filter(state, eqx.is_array))
        leaves = [
            {**described, "crc32": _checksum(array)} for described, array in zip(_describe(state), arrays, strict=True)
        ]
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            metadata=ocp.args.JsonSave({"leaves": leaves, **metadata}),
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, like: PyTree) -> tuple[PyTree, dict] | None:
        """The newest state that can be read, and its metadata; `None` if there is no checkpoint.

        `like` is a state of the same structure; its arrays may be `jax.ShapeDtypeStruct`. All that is not
        an array is taken from it. A damaged checkpoint is named in a warning, and the one before it is used.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                metadata = self._read(step, "metadata", ocp.args.JsonRestore())
                leaves = metadata.pop("leaves")
            except Exception as error:  # whatever orbax finds wrong with the file
                self._warn(step, error)
                continue
            self._check_structure(step, leaves, _describe(like))
            try:
                return self._read_arrays(step, leaves, like), metadata
            except Exception as error:
                self._warn(step, error)
        if steps:
            raise ValueError(f"every checkpoint in {self.folder} is damaged (steps {steps}); start a new run")
        return None

    def _read(self, step: int, item: str, args):
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def _read_arrays(self, step: int, leaves: list[dict], like: PyTree) -> PyTree:
        shapes, static = eqx.partition(like, is_array_or_shape)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for x in jax.tree.leaves(shapes)]
        arrays = self._read(step, "state", ocp.args.StandardRestore(wanted))
        for described, array in zip(leaves, arrays, strict=True):
            if _checksum(array) != described["crc32"]:
                raise ValueError(f"{described['path']} does not have the checksum it was saved with")
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), arrays), static)

    def _check_structure(self, step: int, saved: list[dict], wanted: list[dict]) -> None:
        for i in range(max(len(saved), len(wanted))):
            was = _text(saved[i]) if i < len(saved) else "nothing"
            now = _text(wanted[i]) if i < len(wanted) else "nothing"
            if was != now:
                raise ValueError(
                    f"checkpoint {self.folder / str(step)} is of another model or optimiser: leaf {i} "
                    f"must be {now}, but the checkpoint has {was}; build what was saved, or start a new run"
                )

    def _warn(self, step: int, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"checkpoint {self.folder / str(step)} is damaged and will not be used: {reason}", stacklevel=3)


def _describe(state: PyTree) -> list[dict]:
    shapes = eqx.filter(state, is_array_or_shape)
    return [
        {"path": jax.tree_util.keystr(path), "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    ]


def _text(leaf: dict) -> str:
    return f"{leaf['path']}: {leaf['dtype']}{leaf['shape']}"


def _checksum(array) -> int:
    return zlib.crc32(np.asarray(array).tobytes())
