"""The files that training writes into a run's folder and continues from."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from s5eqx._typing import PyTree
from s5eqx.train.checkpoint import Checkpoints
from s5eqx.train.log import Logger
from s5eqx.train.processes import is_first
from s5eqx.train.run import Run, flat


class Start(NamedTuple):
    """Where a resumed run continues."""

    state: PyTree
    step: int
    diary: dict
    seconds: float


class Files:
    """Logs and checkpoints of a run; with no run, nothing is written. Of several processes the first one logs."""

    def __init__(self, run: Run | None, *, keep: int):
        self._run, self._stack = run, contextlib.ExitStack()
        self._checkpoints: Checkpoints | None = None
        self._logger: Logger | None = None
        if run is not None and is_first():
            self._logger = self._stack.enter_context(Logger(run.folder))
            self._logger.table("settings", flat({**run.settings, "versions": run.versions}))
        if run is not None:
            self._checkpoints = self._stack.enter_context(Checkpoints(run.folder / "checkpoints", keep=keep))

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error):
        self._stack.__exit__(*error)

    def restore(self, like: PyTree) -> Start | None:
        """The newest good checkpoint of a run that is resumed; `None` if there is nothing to continue."""
        if self._run is None or self._checkpoints is None or not self._run.resumed:
            return None
        found = self._checkpoints.restore(like)
        if found is None:
            return None
        state, metadata = found
        return Start(state, int(state.step), metadata["diary"], metadata["seconds"])

    def best(self, like: PyTree, *, last: int) -> PyTree | None:
        """The state with the least evaluated loss; `None` if that is the one after `last` steps, or is not there."""
        if self._checkpoints is None or self._checkpoints.best() in (None, last):
            return None
        found = self._checkpoints.restore_best(like)
        return None if found is None else found[0]

    def log(self, step: int, values: Mapping[str, float], texts: Mapping[str, str] | None = None) -> None:
        """A point of each curve, and texts."""
        if self._logger is not None:
            self._logger.scalars(step, values)
            for tag, text in (texts or {}).items():
                self._logger.text(step, tag, text)

    def save(self, step: int, state: PyTree, *, diary: dict, seconds: float, loss: float | None) -> None:
        """A checkpoint, written while training goes on."""
        if self._run is not None and self._checkpoints is not None:
            about = {"settings": self._run.settings, "versions": self._run.versions}
            self._checkpoints.save(step, state, {**about, "diary": diary, "seconds": seconds}, loss=loss)

    def wait(self) -> None:
        """Returns when all is written."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def last_good(self) -> Path | None:
        """The newest checkpoint, when it is complete; `None` if there is none."""
        if self._checkpoints is None:
            return None
        with contextlib.suppress(OSError):  # which then is an older one
            self._checkpoints.wait()
        return self._checkpoints.newest()
