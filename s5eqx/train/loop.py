"""The loop around the training step: progress, evaluation, logs, checkpoints, and stopping well."""

import contextlib
import dataclasses
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from s5eqx.train.diary import Diary
from s5eqx.train.files import Files
from s5eqx.train.monitor import spectral_radius
from s5eqx.train.run import Run
from s5eqx.train.signals import interruption
from s5eqx.train.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Target:
    """Training is over when the test accuracy is at least `accuracy` in `hold` evaluations in a row."""

    accuracy: float
    hold: int = 1

    def reached(self, history: list[dict]) -> bool:
        tested = [record["test/accuracy"] for record in history if "test/accuracy" in record]
        return len(tested) >= self.hold and min(tested[-self.hold :]) >= self.accuracy


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of `fit`.

    `history` has a record for each time something was logged: `step`, `seconds` of training until then, the
    means of the metrics since the last record (`train/loss`, ...) and, after an evaluation, `test/loss` and
    `test/accuracy`. `steps_per_second` is that of this process, without compilation and evaluation.
    """

    state: TrainState
    step: int
    history: list[dict]
    seconds: float
    steps_per_second: float
    interrupted: bool

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds until an evaluation first had this accuracy; `None` if none had."""
        reached = (r["seconds"] for r in self.history if r.get("test/accuracy", -1.0) >= accuracy)
        return next(reached, None)


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
    resumed run continues from its newest good checkpoint, and ends with the same bits as without the stop.
    Nothing is shown but the progress bar, on standard error.

    **Arguments:**

    - `steps`: when to end, counted from the beginning of the run.
    - `eval_every`, `log_every`, `checkpoint_every`: in steps. These and `steps` are multiples of
      `trainer.steps_per_dispatch`. The end is always evaluated and saved.
    - `run`: where logs and checkpoints go; `None` for nowhere.
    - `keep`: how many checkpoints to keep.
    - `target`: when to stop early.
    - `progress`: show the progress bar.
    - `seconds_before`: time to count as training before the call, such as that since the process started.
    """
    stride = trainer.steps_per_dispatch
    lengths = {
        "steps": steps,
        "eval_every": eval_every,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
    }
    for name, length in lengths.items():
        if length < 1 or length % stride:
            raise ValueError(f"{name} must be a multiple of the trainer's steps_per_dispatch={stride}, got {length}")

    with contextlib.ExitStack() as stack:
        files = stack.enter_context(Files(run, keep=keep))
        start = files.restore(trainer.skeleton)
        leaves, saved = (trainer.init(), None) if start is None else (trainer.flatten(start.state), start.step)
        step = 0 if start is None else start.step
        diary = Diary([] if start is None else start.history)
        began = time.perf_counter() - seconds_before - (0.0 if start is None else start.seconds)
        radius = jax.jit(lambda leaves: spectral_radius(trainer.unflatten(leaves).model))
        bar = stack.enter_context(tqdm(total=steps, initial=step, unit=" steps", file=sys.stderr, disable=not progress))
        asked = stack.enter_context(interruption())

        def write(test: dict[str, float]):
            largest = radius(leaves)
            values = {} if largest is None else {"model/max_abs_Lambda_bar": float(largest)}
            values |= {f"test/{name}": value for name, value in test.items()}
            files.log(step, diary.write(step, time.perf_counter() - began, values))

        def save():
            state = trainer.unflatten(leaves)
            files.save(step, state, history=diary.history, seconds=time.perf_counter() - began)

        def done():
            return step >= steps or (target is not None and target.reached(diary.history))

        while not done() and not asked:
            since = time.perf_counter()
            leaves, metrics = trainer.run(leaves)
            step += stride
            diary.add(step, jax.tree.map(np.asarray, metrics), time.perf_counter() - since)
            if step % eval_every == 0 or step == steps:
                write(trainer.evaluate(leaves))
            elif step % log_every == 0 or asked:
                write({})
            if step % checkpoint_every == 0:
                save()
                saved = step
            bar.set_postfix_str(diary.summary, refresh=False)
            bar.update(stride)
        if saved != step:
            save()
        return Result(
            state=trainer.unflatten(leaves),
            step=step,
            history=diary.history,
            seconds=time.perf_counter() - began,
            steps_per_second=diary.steps_per_second,
            interrupted=bool(asked) and not done(),
        )
