"""What the scripts of the synthetic tasks do with a task: train it with one seed or several, test it, write it down."""

import dataclasses
import datetime
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _command import Place, parse
from _models import Settings, TrainSettings, trainer
from _reproduce import PAGE, Ours, check_page, machine, record, spread, write

from s5eqx.data import SeriesBatch
from s5eqx.data.synthetics import AbstractSynthetic, AbstractTokenTask
from s5eqx.interop import save
from s5eqx.train import (
    Run,
    Trainer,
    check_lengths,
    commit,
    fit,
    interruption,
    open_run,
    peak_memory,
    resume_command,
)

RESULT = "result.json"
S = TypeVar("S", bound=Settings)


@dataclasses.dataclass(frozen=True)
class Where(Place):
    seeds: int = 1
    """Train so many times, with seeds from `seed` on; the result is their mean and standard deviation."""
    record: Path | None = None
    """Page to write the result into, such as experiments/REPRODUCE.md."""


def main(
    presets: Mapping[str, S],
    task_of: Callable[[S, int], AbstractSynthetic],
    size: str,
    description: str | None,
    *,
    began: float,
) -> None:
    """Trains what the command line says, once for each seed, and prints the result as JSON on the last line.

    **Arguments:**

    - `presets`: the settings by name.
    - `task_of`: the task that the settings describe, at a length.
    - `size`: the setting that is the length of training.
    - `description`: for `--help`.
    - `began`: `time.perf_counter()` when the process started.
    """
    preset, s, where = parse(presets, Where(), description, sys.argv)
    try:
        if where.record is not None:
            check_page(where.record)
        found = _train(preset, s, where, task_of, getattr(s, size), began=began)
        if found is not None:
            run, results = found
            print(json.dumps(_summary(run, results) if len(results) > 1 else results[0]))
            if where.record is not None:
                record(where.record, _ours(words(presets, preset, s, where.seeds), results))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _train(
    preset: str, s: Settings, where: Where, task_of: Callable, length: int, *, began: float
) -> tuple[Run, list[dict]] | None:
    """The run and the result of each seed, or nothing if someone interrupted."""
    if where.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {where.seeds}")
    longest = max(task_of(s, n).sequence_length for n in (length, *s.test_lengths))

    @functools.cache
    def built(s: Settings) -> Trainer:
        return trainer(s, task_of(s, length), longest)

    check_lengths(built(s), **s.pace)  # and all that the model refuses, before there is a folder
    if s.stop_at is not None and (issubclass(task_of(s, length).batch, SeriesBatch) or not 0 < s.stop_at <= 1):
        raise ValueError(f"stop_at is an accuracy between 0 and 1, of a task that has one; got {s.stop_at}")
    settings, several = {"preset": preset, **dataclasses.asdict(s)}, where.seeds > 1
    whole = open_run(
        {**settings, "seeds": where.seeds} if several else settings,
        folder=where.run,
        stem=f"{Path(sys.argv[0]).stem}-{preset}-{s.mixer}",
        resume=where.resume,
        overwrite=where.overwrite,
    )
    code = commit(Path(__file__), apart_from=[PAGE])
    results = []
    with interruption() as asked:
        for seed in range(s.seed, s.seed + where.seeds):
            of_seed, run = dataclasses.replace(s, seed=seed), whole
            if several:
                folder = whole.folder / f"seed{seed}"
                if (folder / RESULT).exists():
                    results.append(json.loads((folder / RESULT).read_text()))
                    continue
                run = open_run(settings | {"seed": seed}, folder=folder, resume=(folder / "settings.json").exists())
            result = None if asked else train_one(run, built(of_seed), of_seed, task_of, code, began=began)
            if result is None:
                print(f"continue with:\n{resume_command(whole.folder, sys.argv)}")
                return None
            results.append(result)
            began = time.perf_counter()
    return whole, results


def train_one(
    run: Run, trainer: Trainer, s: TrainSettings, task_of: Callable, code: str | None, *, began: float
) -> dict | None:
    """Trains with one seed; the result, which is in the run's folder too, or nothing if someone interrupted."""
    print(f"run in {run.folder}, curves with: tensorboard --logdir {run.folder}", flush=True)
    result = fit(
        trainer,
        **s.pace,
        run=run,
        target=s.target,
        seconds_before=time.perf_counter() - began,
    )
    if result.interrupted:
        print(f"stopped at step {result.step}")
        return None
    memory, trained = peak_memory(), time.perf_counter()
    leaves, model, task = trainer.flatten(result.state), trainer.model(result.state), trainer.task
    save(run.folder / "model.safetensors", model)
    last = result.history[-1]
    measure = "accuracy" if "test/accuracy" in last else "loss"
    summary: dict[str, Any] = {f"test_{name}": last[f"test/{name}"] for name in dict.fromkeys((measure, "loss"))}
    if measure == "accuracy":
        first = trainer.evaluate(leaves, 500)["accuracy"] if task.num_test > 500 else last["test/accuracy"]
        summary |= {"test_accuracy_first_500": first, "seconds_to_99": result.seconds_to(0.99)}
    if isinstance(task, AbstractTokenTask):
        show(model, task)
        if task.answer_length > 1:
            summary["test_whole_answers"] = whole_answers(model, task, trainer.eval_batch_size)
    if s.test_lengths:
        summary["test_lengths"] = {f"{n}": _at_length(trainer, leaves, task_of(s, n)) for n in s.test_lengths}
    speed = result.steps_per_second or last["speed/steps_per_second"]  # of a run that was at its end
    summary |= {
        "curve": [
            (r["step"], round(r["seconds"], 1), r[f"test/{measure}"]) for r in result.history if "test/loss" in r
        ],
        "steps": result.step,
        "seconds": round(result.seconds + time.perf_counter() - trained, 2),
        "steps_per_second": round(speed, 2),
        "tokens_per_second": round(speed * trainer.tokens_per_step),
        "peak_memory_MiB": None if memory is None else round(memory / 2**20),
        "parameters": trainer.num_parameters,
        "commit": code,
        "versions": run.versions,
        "settings": run.settings,
    }
    draw(result.history, measure, run.folder / "curve.png")
    write(run.folder / RESULT, json.dumps(summary, indent=2) + "\n")
    return summary


def _at_length(trainer: Trainer, leaves: list, task: AbstractSynthetic) -> float:
    """Accuracy or loss on examples of another length, in batches of as many tokens."""
    size = max(1, trainer.eval_batch_size * trainer.task.sequence_length // task.sequence_length)
    found = trainer.evaluate(leaves, task=task, batch_size=size)
    return found.get("accuracy", found["loss"])


def whole_answers(model, task, batch_size: int) -> float:
    """The share of the test examples whose answer is right in all of its tokens, each after the true ones before."""

    @jax.jit
    def right(indices):
        batch = task.test(indices)
        said = jnp.argmax(jax.vmap(lambda x: model(x))(batch.inputs), axis=-1)
        return jnp.all((said == batch.targets) | (batch.weights == 0), axis=1) & (indices < task.num_test)

    starts = range(0, task.num_test, batch_size)
    return sum(int(right(start + np.arange(batch_size, dtype=np.int32)).sum()) for start in starts) / task.num_test


def show(model, task, number: int = 3):
    """Prints a few examples: what is shown, the expected answer, what the model says."""
    batch, run, asked = task.test(jnp.arange(min(number, task.num_test))), eqx.filter_jit(model), task.asked()
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        words = task.decode(inputs)
        said = jnp.argmax(run(inputs), axis=-1)
        expected, got = (" ".join(task.decode(np.asarray(row)[asked])) for row in (targets, said))
        shown = " ".join(words if len(words) < 40 else [*words[:12], "...", *words[-12:]])
        print(f"{shown}   expected {expected}, got {got}")


def draw(history: list[dict], measure: str, file: Path):
    """The curves of training and test."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for split, label in (("train", "training, all that counts"), ("test", "test, the answer")):
        points = [
            (record["step"], record[f"{split}/{measure}"]) for record in history if f"{split}/{measure}" in record
        ]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel=measure)
    if measure == "accuracy":
        axes.set_ylim(0, 1.02)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _summary(run: Run, results: list[dict]) -> dict:
    """Mean and deviation over the seeds, written beside their folders."""

    def over_seeds(values: list[float]) -> dict:
        return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "seeds": values}

    names = ("test_accuracy", "test_accuracy_first_500", "test_whole_answers", "test_loss", "seconds")
    found = {name: over_seeds([result[name] for result in results]) for name in names if name in results[0]}
    lengths = results[0].get("test_lengths", {})
    summary = {
        **{name: of["mean"] for name, of in found.items()},
        "over_seeds": found,
        "test_lengths": {n: over_seeds([result["test_lengths"][n] for result in results]) for n in lengths},
        "commit": results[-1]["commit"],
        "versions": results[-1]["versions"],
        "settings": run.settings,
    }
    write(run.folder / RESULT, json.dumps(summary, indent=2) + "\n")
    return summary


def words(presets: Mapping[str, Settings], preset: str, s: Settings, seeds: int) -> list[str]:
    """The shortest arguments that say these settings."""
    found = [] if preset == next(iter(presets)) else [preset]
    for field in dataclasses.fields(s):
        value, name = getattr(s, field.name), field.name.replace("_", "-")
        if value == getattr(presets[preset], field.name):
            continue
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [*found, *(["--seeds", f"{seeds}"] if seeds > 1 else [])]


def _ours(arguments: list[str], results: list[dict]) -> Ours:
    """A line of the page for these results."""
    measure = "test_accuracy" if "test_accuracy" in results[0] else "test_loss"
    return Ours(
        command=shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *arguments]),
        value=spread([result[measure] for result in results], percent=measure == "test_accuracy"),
        seeds=len(results),
        steps=f"{statistics.mean(result['steps'] for result in results):,.0f}",
        seconds=statistics.mean(result["seconds"] for result in results),
        machine=machine(results[-1]["versions"]),
        commit=results[-1]["commit"] or "unknown",
        date=f"{datetime.date.today()}",
    )
