"""The files that training writes into a run's folder and continues from."""

import contextlib
from typing import NamedTuple

from s5eqx._typing import PyTree
from s5eqx.train.checkpoint import Checkpoints
from s5eqx.train.log import Logger
from s5eqx.train.run import Run, flat


class Start(NamedTuple):
    """Where a resumed run continues."""

    state: PyTree
    step: int
    history: list[dict]
    seconds: float


class Files:
    """Logs and checkpoints of a run; with no run, nothing is written."""

    def __init__(self, run: Run | None, *, keep: int):
        self._run, self._stack = run, contextlib.ExitStack()
        if run is not None:
            self._checkpoints = self._stack.enter_context(Checkpoints(run.folder / "checkpoints", keep=keep))
            self._logger = self._stack.enter_context(Logger(run.folder))
            self._logger.table("settings", flat({**run.settings, "versions": run.versions}))

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_):
        self._stack.close()

    def restore(self, like: PyTree) -> Start | None:
        """The newest good checkpoint of a run that is resumed; `None` if there is nothing to continue."""
        found = self._checkpoints.restore(like) if self._run is not None and self._run.resumed else None
        if found is None:
            return None
        state, metadata = found
        return Start(state, int(state.step), metadata["history"], metadata["seconds"])

    def log(self, step: int, values: dict[str, float]) -> None:
        """A point of each curve."""
        if self._run is not None:
            self._logger.scalars(step, values)

    def save(self, step: int, state: PyTree, *, history: list[dict], seconds: float) -> None:
        """A checkpoint."""
        if self._run is not None:
            about = {"settings": self._run.settings, "versions": self._run.versions}
            self._checkpoints.save(step, state, {**about, "history": history, "seconds": seconds})
