"""The loop around the training step: progress, evaluation, logs, checkpoints, and stopping well."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import numpy as np
from tqdm import tqdm

from s5eqx.train.diary import Diary
from s5eqx.train.files import Files
from s5eqx.train.monitor import all_finite, peak_memory, spectral_radius
from s5eqx.train.nonfinite import bad_step, bad_weights
from s5eqx.train.processes import in_any_process, is_first
from s5eqx.train.profile import Profile
from s5eqx.train.result import Result, Target
from s5eqx.train.run import Run
from s5eqx.train.signals import interruption
from s5eqx.train.step import Trainer


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
    observe: Callable[[eqx.Module], Mapping[str, float | str]] | None = None,
    profile: int = 0,
    progress: bool = True,
    seconds_before: float = 0.0,
) -> Result:
    """Trains until `steps` are done, the target is reached, or someone interrupts.

    Ctrl-C and SIGTERM let the dispatch end, save a checkpoint and return a result that is `interrupted`. A
    resumed run continues from its newest good checkpoint, and ends with the same bits as without the stop.
    Nothing is shown but the progress bar, on standard error.

    A loss or a gradient that is not finite is a `FloatingPointError`, which says where it came and what is left;
    `trainer.skip_nonfinite` such steps in a row are passed over. A checkpoint that cannot be written is an `OSError`.

    Several processes that train one model all call this alike. A signal to one stops all.

    **Arguments:**

    - `steps`: when to end, counted from the beginning of the run.
    - `eval_every`, `log_every`, `checkpoint_every`: in steps. These and `steps` are multiples of
      `trainer.steps_per_dispatch`. The end is always evaluated and saved, and so is the least loss so far.
    - `run`: where logs and checkpoints go; `None` for nowhere.
    - `keep`: how many checkpoints to keep, beside that of the least evaluated loss.
    - `target`: when to stop early.
    - `observe`: called at each evaluation with the model as it is evaluated; numbers that it returns become curves,
      strings become texts.
    - `profile`: trace so many dispatches, after the first one of this process, for TensorBoard's profile page.
    - `progress`: show the progress bar.
    - `seconds_before`: time to count as training before the call, such as that since the process started.
    """
    stride, split = trainer.steps_per_dispatch, trainer.task.split
    check_lengths(trainer, steps=steps, eval_every=eval_every, log_every=log_every, checkpoint_every=checkpoint_every)
    with contextlib.ExitStack() as stack:
        traced = stack.enter_context(Profile(None if run is None else run.folder, profile))
        files = stack.enter_context(Files(run, keep=keep))
        start = files.restore(trainer.skeleton)
        leaves, saved = (trainer.init(), None) if start is None else (trainer.flatten(start.state), start.step)
        step = 0 if start is None else start.step
        diary = Diary(
            split,
            tokens_per_step=trainer.tokens_per_step,
            tolerated=trainer.skip_nonfinite,
            page=None if start is None else start.diary,
        )
        began = time.perf_counter() - seconds_before - (0.0 if start is None else start.seconds)
        signs = jax.jit(lambda leaves: _signs(trainer.unflatten(leaves).model))
        hidden = not progress or not is_first()
        bar = stack.enter_context(tqdm(total=steps, initial=step, unit=" steps", file=sys.stderr, disable=hidden))
        asked = stack.enter_context(interruption())

        def evaluated() -> dict[str, float | str]:
            found = {} if observe is None else observe(trainer.model(trainer.unflatten(leaves)))
            return {**{f"{split}/{name}": value for name, value in trainer.evaluate(leaves).items()}, **found}

        def write(values: Mapping[str, float | str]):
            radius, _ = signs(leaves)
            numbers = {} if radius is None else {"model/max_abs_Lambda_bar": float(radius)}
            if (memory := peak_memory()) is not None:
                numbers["memory/peak_MiB"] = memory / 2**20
            numbers |= {name: float(value) for name, value in values.items() if not isinstance(value, str)}
            texts = {name: value for name, value in values.items() if isinstance(value, str)}
            files.log(step, diary.write(step, time.perf_counter() - began, numbers), texts)

        def save():
            if not signs(leaves)[1]:
                raise bad_weights(step, good=files.last_good())
            seconds = time.perf_counter() - began
            state = trainer.unflatten(leaves)
            files.save(step, state, diary=diary.page(), seconds=seconds, loss=diary.evaluated(step))

        def done():
            return step >= steps or (target is not None and target.reached(diary.history, split))

        stop = in_any_process(bool(asked))
        batches = None if done() or stop else trainer.batches(step)
        while not done() and not stop:
            since = time.perf_counter()
            with traced.dispatch():
                leaves, metrics = trainer.run(leaves, batches)
                step += stride
                batches = trainer.batches(step) if step < steps else None  # read while the devices compute
                metrics = {name: np.asarray(values) for name, values in metrics.items()}
            bad = diary.add(step, metrics, time.perf_counter() - since)
            if bad is not None:
                loss, norm = (float(metrics[name][bad - step]) for name in ("loss", "grad_norm"))
                raise bad_step(bad, loss, norm, trainer=trainer, good=files.last_good())
            stop = in_any_process(bool(asked))
            is_best = False
            if step % eval_every == 0 or step == steps:
                write(evaluated())
                is_best = diary.is_best
            elif step % log_every == 0:
                write({})
            if step % checkpoint_every == 0 or is_best:
                save()
                saved = step
            bar.set_postfix_str(diary.summary, refresh=False)
            bar.update(stride)
        if saved != step:
            save()
        files.wait()
        state = trainer.unflatten(leaves)
        best = files.best(trainer.skeleton, last=step)
        return Result(
            state=state,
            best=state if best is None else best,
            step=step,
            history=diary.history,
            seconds=time.perf_counter() - began,
            steps_per_second=diary.steps_per_second,
            interrupted=stop and not done(),
            split=split,
        )


def check_lengths(trainer: Trainer, **lengths: int) -> None:
    """Refuses lengths in steps that `fit` would refuse, for who would rather know before a run has a folder."""
    stride = trainer.steps_per_dispatch
    for name, length in lengths.items():
        if length < 1 or length % stride:
            raise ValueError(f"{name} must be a multiple of the trainer's steps_per_dispatch={stride}, got {length}")


def _signs(model: eqx.Module):
    return spectral_radius(model), all_finite(model)
