"""Checkpoints: the arrays of a state by orbax, written in the background, with a page of JSON beside them."""

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import orbax.checkpoint as ocp

from s5eqx._typing import PyTree
from s5eqx.train._leaves import is_array_or_shape
from s5eqx.train._page import check_arrays, describe, first_difference, own
from s5eqx.train.processes import done_by_all, is_first

# Under these names orbax writes the two parts of a checkpoint, and what it has not finished.
ARRAYS, PAGE, UNFINISHED = "state", "metadata", "*.orbax-checkpoint-tmp*"


class Checkpoints:
    """The newest checkpoints of a run and its best, in one folder, one sub-folder a step.

    Beside the arrays stands what describes them: path, shape, dtype and checksum of every leaf, and the
    `metadata` of the caller (settings, versions). Nothing is pickled. A save is complete or absent.

    Where several processes train one model, all of them save and restore, in a folder that all can reach.

    **Arguments:**

    - `folder`: where the checkpoints live; made if need be.
    - `keep`: how many to keep, the newest. The one with the least loss is kept as well.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"a run keeps at least 1 checkpoint, got keep={keep}")
        self.folder = Path(folder).absolute()
        self._losses: dict[int, float] = {}
        self._writing: int | None = None
        options = ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=_NewestAndBest(keep, self._losses),
            # Otherwise, where a folder cannot be made, orbax's threads wait many minutes for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        for step in self.steps():
            self._note_loss(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object):
        try:
            self.wait()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order, with the one that is being written."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the least loss of those that have a checkpoint; `None` if no loss is known."""
        return min((step for step in self.steps() if step in self._losses), key=self._losses.__getitem__, default=None)

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def newest(self) -> Path | None:
        """The newest checkpoint that is complete; `None` if there is none."""
        complete = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
        return self.path(max(complete)) if complete else None

    def wait(self) -> None:
        """Returns when all is written. An `OSError` says what could not be, and what is left."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever stood in orbax's way
            raise self._failure(error) from error

    def save(self, step: int, state: PyTree, metadata: dict, *, loss: float | None = None) -> None:
        """Writes the arrays of `state`, in the background: it owns a copy, and they may be donated at once.

        Checkpoints of this step or later ones are replaced. That the save before failed is told here, by an `OSError`.

        **Arguments:**

        - `metadata`: what to keep beside the arrays, fit for JSON.
        - `loss`: by which the best checkpoint is the best; less is better.
        """
        self.wait()
        self._clear(step)
        arrays, leaves = own(state)
        page = json.loads(json.dumps({"leaves": leaves, "loss": loss, "metadata": metadata}))
        if loss is not None:
            self._losses[step] = loss
        self._writing = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(page))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # as in `wait`
            raise self._failure(error) from error

    def restore(self, like: PyTree) -> tuple[PyTree, dict] | None:
        """The newest state that can be read, and its metadata; `None` if there is no checkpoint.

        `like` is a state of the same structure; its arrays may be `jax.ShapeDtypeStruct`. Arrays are spread over
        devices as those of `like`, or go to this process's first device where it does not say. All that is not
        an array is taken from it. A damaged checkpoint is named in a warning, and the one before it is used.
        """
        self.wait()
        steps = self.steps()
        for step in reversed(steps):
            if (found := self._read(step, like)) is not None:
                return found
        if steps:
            raise ValueError(f"every checkpoint in {self.folder} is damaged (steps {steps}); start a new run")
        return None

    def restore_best(self, like: PyTree) -> tuple[PyTree, dict] | None:
        """The state with the least loss, and its metadata; `None` if no loss is known, or, with a warning, if it is
        damaged. `like` is as for `restore`."""
        self.wait()
        step = self.best()
        return None if step is None else self._read(step, like)

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict] | None:
        """State and metadata of a checkpoint; `None`, with a warning, if it is damaged."""
        try:
            page = done_by_all(lambda: self._page(step))
        except Exception as error:  # whatever is wrong with the file
            return self._warn(step, error)
        self._check_structure(step, page["leaves"], like)
        try:
            state = done_by_all(lambda: self._arrays(step, like))
            check_arrays(page["leaves"], state)
        except Exception as error:  # or with the arrays
            return self._warn(step, error)
        return state, page["metadata"]

    def _page(self, step: int) -> dict:
        page = json.loads((self.path(step) / PAGE / PAGE).read_text())
        return {name: page[name] for name in ("leaves", "loss", "metadata")}

    def _arrays(self, step: int, like: PyTree) -> PyTree:
        # Not through the manager, where a process that can read waits for one that cannot.
        shapes, static = eqx.partition(like, is_array_or_shape)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
            for x in jax.tree.leaves(shapes)
        ]
        handler = ocp.StandardCheckpointHandler()
        path: Any = self.path(step) / ARRAYS
        arrays = handler.restore(path, args=ocp.args.StandardRestore(wanted))
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), arrays), static)

    def _note_loss(self, step: int) -> None:
        with contextlib.suppress(Exception):  # a damaged one is not the best
            loss = done_by_all(lambda: self._page(step))["loss"]
            if loss is not None:
                self._losses[step] = loss

    def _check_structure(self, step: int, leaves: list[dict], like: PyTree) -> None:
        if difference := first_difference(leaves, describe(like)):
            raise ValueError(
                f"checkpoint {self.path(step)} is of another model or optimiser: {difference}; "
                f"build what was saved, or start a new run"
            )

    def _warn(self, step: int, error: Exception) -> None:
        reason = _first_line(error)
        warnings.warn(f"checkpoint {self.path(step)} is damaged and will not be used: {reason}", stacklevel=4)

    def _clear(self, step: int) -> None:
        """Removes the checkpoints of this step and later ones, and what killed processes left behind."""
        for stale in self.steps():
            if stale >= step:
                self._manager.delete(stale)
                self._losses.pop(stale, None)
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        if is_first():
            for part in self.folder.glob(UNFINISHED):
                shutil.rmtree(part, ignore_errors=True)

    def _failure(self, error: Exception) -> OSError:
        self._remove_unfinished()
        newest = self.newest()
        left = "there is none before it" if newest is None else f"the last good one is {newest}"
        return OSError(
            f"the checkpoint of step {self._writing} could not be written to {self.folder}: {_first_line(error)}; "
            f"{left}. Make room there, or whatever the reason asks for, and resume the run"
        )


@dataclasses.dataclass(frozen=True)
class _NewestAndBest:
    """Which checkpoints orbax keeps."""

    newest: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min((step for step in steps if step in self.losses), key=self.losses.__getitem__, default=None)
        return [step == best or step in steps[-self.newest :] for step in steps]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
