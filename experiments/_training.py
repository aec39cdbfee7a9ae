"""What the scripts of the synthetic tasks do with a task: train it with one seed or several, test it, write it down."""

import dataclasses
import datetime
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
from _models import Settings, trainer
from _reproduce import Ours, machine, record, spread

from s5eqx.data.synthetics import AbstractSynthetic, AbstractTokenTask
from s5eqx.interop import save
from s5eqx.train import Run, Target, Trainer, commit, fit, open_run, peak_memory, resume_command

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
    preset, settings, where = parse(presets, Where(), description, sys.argv)
    try:
        _train(preset, settings, where, task_of, getattr(settings, size), began=began)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _train(preset: str, s: Settings, where: Where, task_of: Callable, length: int, *, began: float) -> None:
    if where.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {where.seeds}")
    if where.record is not None and not where.record.absolute().parent.is_dir():
        raise ValueError(f"record must be a file in a folder that exists, got {where.record}")
    if s.stop_at is not None and not 0 < s.stop_at <= 1:
        raise ValueError(f"stop_at is an accuracy between 0 and 1, got {s.stop_at}")
    longest = max(task_of(s, n).sequence_length for n in (length, *s.test_lengths))
    made = trainer(s, task_of(s, length), longest)  # refuses what cannot be, before there is a folder
    settings, several = {"preset": preset, **dataclasses.asdict(s)}, where.seeds > 1
    whole = open_run(
        {**settings, "seeds": where.seeds} if several else settings,
        folder=where.run,
        stem=f"{Path(sys.argv[0]).stem}-{preset}-{s.mixer}",
        resume=where.resume,
        overwrite=where.overwrite,
    )
    results = []
    for seed in range(s.seed, s.seed + where.seeds):
        of_seed, run = dataclasses.replace(s, seed=seed), whole
        if several:
            folder = whole.folder / f"seed{seed}"
            if (folder / RESULT).exists():
                results.append(json.loads((folder / RESULT).read_text()))
                continue
            made = trainer(of_seed, task_of(of_seed, length), longest)
            run = open_run(settings | {"seed": seed}, folder=folder, resume=(folder / "settings.json").exists())
        result = _one(run, made, of_seed, task_of, began=began)
        if result is None:
            print(f"continue with:\n{resume_command(whole.folder, sys.argv)}")
            return
        results.append(result)
        began = time.perf_counter()
    print(json.dumps(_summary(whole, results) if several else results[0]))
    if where.record is not None:
        record(where.record, _ours(sys.argv, results))


def _one(run: Run, trainer: Trainer, s: Settings, task_of: Callable, *, began: float) -> dict | None:
    """Trains with one seed; the result, which is in the run's folder too, or nothing if someone interrupted."""
    print(f"run in {run.folder}, curves with: tensorboard --logdir {run.folder}", flush=True)
    result = fit(
        trainer,
        steps=s.steps,
        eval_every=s.eval_every,
        log_every=s.log_every,
        checkpoint_every=s.checkpoint_every,
        run=run,
        target=None if s.stop_at is None else Target(s.stop_at),
        seconds_before=time.perf_counter() - began,
    )
    if result.interrupted:
        print(f"stopped at step {result.step}")
        return None
    trained = time.perf_counter()
    leaves, model = trainer.flatten(result.state), trainer.model(result.state)
    test, task = trainer.evaluate(leaves), trainer.task
    summary: dict[str, Any] = {f"test_{name}": test[name] for name in ("accuracy", "loss") if name in test}
    if isinstance(task, AbstractTokenTask):
        if task.answer_length > 1:
            summary["test_whole_answers"] = whole_answers(model, task, trainer.eval_batch_size)
        show(model, task)
    if "accuracy" in test:
        summary["test_accuracy_first_500"] = trainer.evaluate(leaves, 500)["accuracy"]
        summary["seconds_to_99"] = result.seconds_to(0.99)
    if s.test_lengths:
        summary["test_lengths"] = {length: _at_length(trainer, leaves, task_of(s, length)) for length in s.test_lengths}
    measure = "accuracy" if "accuracy" in test else "loss"
    summary |= {
        "curve": [
            (r["step"], round(r["seconds"], 1), r[f"test/{measure}"]) for r in result.history if "test/loss" in r
        ],
        "steps": result.step,
        "seconds": round(result.seconds + time.perf_counter() - trained, 2),
        "steps_per_second": round(result.steps_per_second, 2),
        "tokens_per_second": round(result.steps_per_second * trainer.tokens_per_step),
        "peak_memory_MiB": round(peak_memory() / 2**20),
        "parameters": trainer.num_parameters,
        "commit": commit(Path(__file__)),
        "versions": run.versions,
        "settings": run.settings,
    }
    draw(result.history, measure, run.folder / "curve.png")
    save(run.folder / "model.safetensors", model)
    (run.folder / RESULT).write_text(json.dumps(summary, indent=2) + "\n")
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
    summary = {}
    for name in ("test_accuracy", "test_accuracy_first_500", "test_whole_answers", "test_loss", "seconds"):
        values = [result[name] for result in results if name in result]
        if values:
            summary |= {name: statistics.mean(values), f"{name}_sd": statistics.stdev(values), f"{name}_seeds": values}
    lengths = results[0].get("test_lengths", {})
    if lengths:
        # Numbers are strings in a result that was read again.
        by_name = [{str(length): found for length, found in result["test_lengths"].items()} for result in results]
        summary["test_lengths"] = {n: statistics.mean(found[n] for found in by_name) for n in by_name[0]}
    summary |= {name: results[-1][name] for name in ("commit", "versions")} | {"settings": run.settings}
    (run.folder / RESULT).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _ours(argv: list[str], results: list[dict]) -> Ours:
    """A line of the page for these results."""
    measure = "test_accuracy" if "test_accuracy" in results[0] else "test_loss"
    script, *words = argv
    places = {"--run", "--record"}
    kept, skip = [], False
    for word in words:
        skip, drop = word in places, skip or word in places or word in ("--resume", "--overwrite")
        if not drop:
            kept.append(word)
    versions = results[-1]["versions"]
    return Ours(
        command=shlex.join(["python", f"experiments/{Path(script).name}", *kept]),
        value=spread([result[measure] for result in results], percent=measure == "test_accuracy"),
        seeds=len(results),
        steps=f"{statistics.mean(result['steps'] for result in results):,.0f}",
        seconds=statistics.mean(result["seconds"] for result in results),
        machine=machine(versions),
        commit=results[-1]["commit"] or "unknown",
        date=f"{datetime.date.today()}",
    )
