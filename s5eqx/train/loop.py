"""The loop around the training step: progress, evaluation, logs, checkpoints, and stopping well."""

import contextlib
import dataclasses
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from s5eqx.train.checkpoint import Checkpoints
from s5eqx.train.log import Logger
from s5eqx.train.monitor import spectral_radius
from s5eqx.train.run import Run, flat
from s5eqx.train.signals import interruption
from s5eqx.train.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Target:
    """Training is over when the test accuracy is at least `accuracy` in `hold` evaluations in a row."""

    accuracy: float
    hold: int = 1

    def reached(self, history: list[dict]) -> bool:
        last = [record["test/accuracy"] for record in history if "test/accuracy" in record][-self.hold :]
        return len(last) == self.hold and min(last) >= self.accuracy


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of `fit`.

    `history` has a record for each time something was logged: `step`, `seconds` of training until then,
    means of the metrics since the last record (`train/loss`, ...) and, after an evaluation, `test/loss` and
    `test/accuracy`. `steps_per_second` leaves out compilation and evaluations.
    """

    state: TrainState
    step: int
    history: list[dict]
    seconds: float
    steps_per_second: float
    interrupted: bool

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds until an evaluation first had this accuracy; `None` if none had."""
        times = [r["seconds"] for r in self.history if r.get("test/accuracy", -1.0) >= accuracy]
        return times[0] if times else None


def fit(
    trainer: Trainer,
    *,
    steps: int,
    eval_every: int,
    log_every: int,
    checkpoint_every: int,
    run: Run | None = None,
    keep: int = 3,
    target: Target | None = None,
    progress: bool = True,
    seconds_before: float = 0.0,
) -> Result:
    """Trains until `steps` are done, the target is reached, or someone interrupts.

    Ctrl-C and SIGTERM let the dispatch end, save a checkpoint and return a result that is `interrupted`. A
    resumed run continues from its newest good checkpoint, and its end is the same bit for bit as without
    the stop. Only the progress bar is shown, on standard error.

    **Arguments:**

    - `steps`: when to end, counted from the beginning of the run.
    - `eval_every`, `log_every`, `checkpoint_every`: in steps. These and `steps` are multiples of
      `trainer.steps_per_dispatch`. The last step is always evaluated, logged and saved.
    - `run`: where logs and checkpoints go; `None` for nowhere.
    - `keep`: how many checkpoints to keep.
    - `target`: when to stop early.
    - `progress`: show the progress bar.
    - `seconds_before`: what to count as training time before the call, such as since the process started.
    """
    stride = trainer.steps_per_dispatch
    lengths = dict(
        steps=steps, eval_every=eval_every, log_every=log_every, checkpoint_every=checkpoint_every
    )
    for name, length in lengths.items():
        if length < 1 or length % stride:
            raise ValueError(
                f"{name} must be a multiple of the trainer's steps_per_dispatch={stride}, got {length}"
            )

    started = time.perf_counter() - seconds_before
    history: list[dict] = []
    with contextlib.ExitStack() as stack:
        checkpoints = logger = None
        leaves, step = None, 0
        if run is not None:
            checkpoints = stack.enter_context(Checkpoints(run.folder / "checkpoints", keep=keep))
            logger = stack.enter_context(Logger(run.folder))
            logger.table("settings", flat({**run.settings, "versions": run.versions}))
            restored = checkpoints.restore(trainer.skeleton) if run.resumed else None
            if restored is not None:
                state, metadata = restored
                leaves, step = trainer.flatten(state), int(state.step)
                history = metadata["history"]
                started -= metadata["seconds"]
        if leaves is None:
            leaves = trainer.init()

        saved = step if run is not None and run.resumed and step else -1
        busy, counted = 0.0, 0
        pending: list[dict] = []
        shown: dict[str, str] = {}
        asked = stack.enter_context(interruption())
        bar = stack.enter_context(
            tqdm(
                total=steps, initial=step, disable=not progress, unit=" steps", file=sys.stderr, dynamic_ncols=True
            )
        )
        first = True
        while step < steps and not asked and not (target and target.reached(history)):
            since = time.perf_counter()
            leaves, metrics = trainer.run(leaves)
            pending.append(jax.tree.map(np.asarray, metrics))
            if not first:
                busy, counted = busy + time.perf_counter() - since, counted + stride
            first = False
            step += stride
