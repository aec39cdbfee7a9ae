"""Transform Once and a Fourier neural operator of as many parameters, on fields that a spectral solver made.

    python experiments/operators.py                               # both equations: 5 minutes of one core
    python experiments/operators.py --equations heat --seeds 3    # one of them, with error bars
    python experiments/operators.py --run runs/mine --resume      # goes on where it was stopped
    python experiments/operators.py --help                        # every setting

Two operators are learned from pairs of fields: Burgers' equation on a circle, from a smooth field to the fronts that it
becomes, and the heat equation on a square between insulated walls. Both models see the same examples in the same
order and keep the same frequencies. Transform Once goes to them and back once, in the basis that suits the equation
(Fourier, cosine), with dense layers between; the Fourier neural operator goes there and back in each of its layers.
The hidden units of Transform Once are as many as make its parameters those of the other.

The learning rate, 1e-2, is the best of 1e-3, 3e-3, 1e-2 and 3e-2 on Burgers for both models (`--steps 1000 --t1-lr ...
--fno-lr ...`); on heat both are a tenth better at 3e-2.

The table has the mean relative L2 error on unseen examples, on the grid of training and on one twice as fine; and
medians of the time of a step and of a forward pass on one batch, both models in turns. Finished models are kept, and
not computed again. The last line of standard output is all of it as JSON.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _command import Place, check_file, parse
from _field_pictures import Row, draw
from _reproduce import write
from _timing import interleaved_medians

from s5eqx.data import Burgers, Heat
from s5eqx.interop import load, save
from s5eqx.models import FNO
from s5eqx.nn import Cosine, Fourier, TransformOnce
from s5eqx.train import (
    DefaultGroups,
    Trainer,
    WarmupCosine,
    check_lengths,
    commit,
    fit,
    interruption,
    open_run,
    relative_error,
    resume_command,
)

Equation = Literal["burgers", "heat"]
Model = Literal["t1", "fno"]
NAMES: dict[Model, str] = {"t1": "Transform Once", "fno": "FNO"}
RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    equations: tuple[Equation, ...] = ("burgers", "heat")
    """Which equations."""
    models: tuple[Model, ...] = ("t1", "fno")
    """Which models: Transform Once, Fourier neural operator."""
    seeds: int = 1
    """Train each model so many times, with seeds from `seed` on."""
    burgers_resolution: int = 128
    """Samples of a field in training; a divisor of 128."""
    burgers_band: int = 32
    """Frequencies kept, from 0 on, in cycles a circle."""
    burgers_width: int = 24
    """Channels of the Fourier neural operator."""
    heat_resolution: int = 32
    """Samples along each axis in training, at least 32."""
    heat_band: int = 10
    """Frequencies kept along each axis, from 0 on, in cycles a side."""
    heat_width: int = 16
    """Channels of the Fourier neural operator."""
    fno_layers: int = 4
    """Blocks of the Fourier neural operator."""
    t1_layers: int = 6
    """Dense layers of Transform Once."""
    num_examples: int = 8000
    """Training examples of each equation."""
    num_test: int = 200
    """Unseen test examples of each equation."""
    batch_size: int = 20
    """Examples a step."""
    t1_lr: float = 1e-2
    """Peak learning rate of Transform Once."""
    fno_lr: float = 1e-2
    """Peak learning rate of the Fourier neural operator."""
    weight_decay: float = 1e-4
    """AdamW's decay of matrices, a unit of learning rate."""
    steps: int = 3000
    """Training steps."""
    warmup: int = 100
    """Steps of linear warm-up, before a cosine to zero."""
    steps_per_dispatch: int = 20
    """Steps between two returns to Python; divides `steps` and the two intervals below."""
    eval_every: int = 200
    """Steps between points of the curves."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    repeats: int = 5
    """Rounds of the timing: a round is `steps_per_dispatch` steps, or 10 forward passes, of each model."""
    seed: int = 0
    """Chooses the data and, with those after it, the initial weights."""

    @property
    def pace(self) -> dict[str, Any]:
        """How long `fit` trains, and when it looks up."""
        return {name: getattr(self, name) for name in ("steps", "eval_every", "checkpoint_every")}


@dataclasses.dataclass(frozen=True)
class Where(Place):
    plot: Path | None = None
    """Draw the picture into this file too."""


PRESETS = {"both": Settings()}


@dataclasses.dataclass(frozen=True)
class Problem:
    """An equation, and what the models are told of it."""

    task: Burgers | Heat
    fine: Burgers | Heat
    """The same test examples on a grid twice as fine."""
    basis: Fourier | Cosine
    band: int
    width: int
    offset: float


@functools.cache
def problem(s: Settings, equation: Equation) -> Problem:
    sizes: Any = {"seed": s.seed, "num_examples": s.num_examples, "num_test": s.num_test}
    if equation == "burgers":
        of = lambda resolution: Burgers(resolution=resolution, **sizes)
        n, rest = s.burgers_resolution, (Fourier(), s.burgers_band, s.burgers_width, 0.0)
    else:
        of = lambda resolution: Heat(resolution=resolution, **sizes)
        n, rest = s.heat_resolution, (Cosine(), s.heat_band, s.heat_width, 0.5)
    return Problem(of(n), of(2 * n), *rest)


def matching_hidden(parameters: int, modes: int, num_layers: int) -> int:
    """The most hidden units with which Transform Once has no more parameters than this, on so many modes in and out."""
    count = lambda h: (2 * modes + 1) * h + (modes + 1) * modes + max(num_layers - 2, 0) * (h + 1) * h
    if count(1) > parameters:
        raise ValueError(
            f"with {modes} modes Transform Once has at least {count(1):,} parameters, the Fourier neural operator "
            f"{parameters:,}; keep a smaller band, or give the latter more width"
        )
    return next(h for h in itertools.count(1) if count(h + 1) > parameters)


def build(s: Settings, equation: Equation, model: Model) -> Callable:
    """The model as a function of a key."""
    p = problem(s, equation)
    grid, axes = p.task.grid, len(p.task.grid)
    sizes = {"width": p.width, "num_layers": s.fno_layers, "hidden": 4 * p.width}
    fno = lambda key: FNO(1, 1, grid, (p.band,) * axes, **sizes, offset=p.offset, key=key)
    if model == "fno":
        return fno
    parameters = sum(a.size for a in jax.tree.leaves(eqx.filter_eval_shape(fno, jr.key(0))))
    kept = sum(p.basis.frequencies(2 * p.band) < p.band)
    modes, bases = (int(kept),) * axes, (p.basis,) * axes
    hidden = matching_hidden(parameters, math.prod(modes), s.t1_layers)
    # Of the smooth input fields next to all lies in the band.
    options = {"hidden": hidden, "num_layers": s.t1_layers, "kept_energy": 1.0}
    return lambda key: TransformOnce(1, 1, grid, modes, bases, **options, key=key)


def trainer(s: Settings, equation: Equation, model: Model, seed: int) -> Trainer:
    lr = s.t1_lr if model == "t1" else s.fno_lr
    return Trainer(
        build(s, equation, model),
        problem(s, equation).task,
        DefaultGroups(lr, WarmupCosine(s.steps, s.warmup), weight_decay=s.weight_decay),
        batch_size=s.batch_size,
        steps_per_dispatch=s.steps_per_dispatch,
        eval_batch_size=s.num_test,
        seed=seed,
        loss=relative_error,
    )


Cell = tuple[Equation, Model, int]


def cells(s: Settings) -> list[Cell]:
    """All that is trained: equation, model and seed."""
    return list(itertools.product(s.equations, s.models, range(s.seed, s.seed + s.seeds)))


def train(s: Settings, cell: Cell, folder: Path) -> bool:
    """Trains one model, or goes on with it, and writes its result into its folder; False if someone interrupted."""
    trained = trainer(s, *cell)
    run = open_run({"cell": cell}, folder=folder, resume=(folder / "settings.json").exists())
    trained.batches(0)  # makes the data, which is no part of training
    result = fit(trained, **s.pace, log_every=s.eval_every, run=run)
    if result.interrupted:
        print(f"stopped at step {result.step} of {' '.join(map(str, cell))}")
        return False
    leaves, fine = trained.flatten(result.state), problem(s, cell[0]).fine
    points = [record for record in result.history if "test/loss" in record]
    summary = {
        "error": points[-1]["test/loss"],
        "error_on_fine_grid": trained.evaluate(leaves, task=fine)["loss"],
        "training_error": points[-1]["train/loss"],
        "parameters": trained.num_parameters,
        "seconds": round(result.seconds, 1),
        "curve": [(round(record["seconds"], 2), record["test/loss"]) for record in points],
    }
    save(folder / "model.safetensors", trained.model(result.state))
    write(folder / RESULT, json.dumps(summary, indent=2) + "\n")
    print(f"{' '.join(map(str, cell))}: error {summary['error']:.4f} in {summary['seconds']:.0f} s", flush=True)
    return True


def milliseconds(s: Settings, equation: Equation) -> dict[Model, dict[str, float]]:
    """Of a training step and of a forward pass on a batch, for each model: medians, in turns."""
    trainers: dict[Model, Trainer] = {model: trainer(s, equation, model, s.seed) for model in s.models}
    leaves = {model: trained.init() for model, trained in trainers.items()}
    models = {model: trained.model(trained.unflatten(trained.init())) for model, trained in trainers.items()}
    task = problem(s, equation).task
    inputs = jnp.asarray(task.test(np.arange(s.batch_size, dtype=np.int32)).inputs)
    batches = trainers[s.models[0]].batches(0)

    def steps(model):
        leaves[model], metrics = trainers[model].run(leaves[model], batches)
        return metrics

    forward = eqx.filter_jit(lambda model, inputs: jax.vmap(model)(inputs))
    step = interleaved_medians({model: functools.partial(steps, model) for model in s.models}, s.repeats)
    calls = interleaved_medians({m: functools.partial(forward, models[m], inputs) for m in s.models}, 10 * s.repeats)
    return {
        model: {"step": 1e3 * step[model] / s.steps_per_dispatch, "forward": 1e3 * calls[model]} for model in s.models
    }


def table(s: Settings, found: dict[Cell, dict], times: dict[Equation, dict]) -> str:
    """A line for each equation and model, in Markdown."""
    columns = ("equation", "model", "parameters", "relative L2 error", "on a grid twice as fine")
    columns += ("ms a training step", "ms a forward pass", "seconds of training")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for equation, model in itertools.product(s.equations, s.models):
        runs = [result for cell, result in found.items() if cell[:2] == (equation, model)]
        time = times[equation][model]

        def mean(name: str, runs=runs) -> str:
            values = [run[name] for run in runs]
            deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.4f}{deviation}"

        cells = (equation, NAMES[model], f"{runs[0]['parameters']:,}", mean("error"), mean("error_on_fine_grid"))
        cells += (f"{time['step']:.2f}", f"{time['forward']:.2f}", f"{statistics.mean(r['seconds'] for r in runs):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(s: Settings, found: dict[Cell, dict], folder: Path, equation: Equation) -> Row:
    """The first unseen example, what each model makes of it, and all curves."""
    batch = problem(s, equation).task.test(np.arange(1, dtype=np.int32))
    truth = batch.targets[0, ..., 0]
    said = {}
    for model in s.models:
        trained = load(place(folder, (equation, model, s.seed)) / "model.safetensors")
        said[NAMES[model]] = np.asarray(trained(batch.inputs[0]))[..., 0]
    curves = {NAMES[m]: [found[cell]["curve"] for cell in cells(s) if cell[:2] == (equation, m)] for m in s.models}
    fields = {"input": batch.inputs[0, ..., 0], "truth": truth, **said}
    return Row(equation, fields, {f"error of {name}": y - truth for name, y in said.items()}, curves)


def place(folder: Path, cell: Cell) -> Path:
    """The folder of one model."""
    return folder / "-".join(map(str, cell))


def main(preset: str, s: Settings, where: Where) -> None:
    for name in ("equations", "models"):
        given = getattr(s, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name} must be at least one, and each of them once, got {given}")
    for name in ("seeds", "repeats"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(s, name)}")
    check_file("plot", where.plot)
    for cell in cells(s):  # what cannot be is refused before there is a folder
        check_lengths(trainer(s, *cell), **s.pace)
    settings = {"preset": preset, **dataclasses.asdict(s)}
    code = commit(Path(__file__))
    run = open_run(settings, folder=where.run, stem="operators", resume=where.resume, overwrite=where.overwrite)
    print(f"run in {run.folder}", flush=True)
    with interruption() as asked:
        for cell in cells(s):
            done = (place(run.folder, cell) / RESULT).exists()
            if not done and (asked or not train(s, cell, place(run.folder, cell))):
                print(f"continue with:\n{resume_command(run.folder, sys.argv)}")
                return
    found = {cell: json.loads((place(run.folder, cell) / RESULT).read_text()) for cell in cells(s)}
    times: dict[Equation, dict] = {equation: milliseconds(s, equation) for equation in s.equations}
    rows = [picture(s, found, run.folder, equation) for equation in s.equations]
    draw(rows, [run.folder / "operators.png", *([] if where.plot is None else [where.plot])])
    write(run.folder / "operators.md", table(s, found, times))
    print(table(s, found, times))
    summary = {
        "models": {" ".join(map(str, cell)): result for cell, result in found.items()},
        "milliseconds": times,
        "commit": code,
        "versions": run.versions,
        "settings": run.settings,
    }
    write(run.folder / RESULT, json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    preset, settings, where = parse(PRESETS, Where(), __doc__, sys.argv)
    try:
        main(preset, settings, where)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
