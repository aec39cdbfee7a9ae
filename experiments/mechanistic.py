"""A grid of synthetic tasks, mixers and lengths: every mixer in the same model, trained alike. Draws the heat map.

    python experiments/mechanistic.py                                   # preset tiny: 20 minutes on two cores
    python experiments/mechanistic.py --run runs/grid --resume          # goes on where it was stopped
    python experiments/mechanistic.py addition                          # 3 digits with Hyena-S5, until it can add
    python experiments/mechanistic.py mixers                            # recall at L=20 with every mixer
    python experiments/mechanistic.py --tasks recall counting --mixers hyena-s5 lru --lengths 32 128
    python experiments/mechanistic.py hyena-paper                       # V=30, L from 1,024 to 131,072, on a GPU
    python experiments/mechanistic.py tiny --help                       # every setting, with that preset's values

After the Hyena paper's synthetics (arXiv 2302.10866, section 4.1), with induction heads and selective copying beside
them. A cell is the accuracy on unseen examples; of linear functions it is the share of the variance that is explained.
A cell ends early when it is solved, `stop_at`.

Every finished cell is a file in the run's folder, `cells/`, and is not computed again; `grid.png` is the heat map and
`grid.md` the table. The last line of standard output is all of it as JSON.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from _command import Place, parse
from _models import Mixer, trainer
from _models import Settings as Common

from s5eqx.data.synthetics import (
    AbstractSynthetic,
    Addition,
    AssocRecall,
    Counting,
    InductionHeads,
    LinearFunctions,
    Majority,
    SelectiveCopying,
)
from s5eqx.train import Target, commit, fit, open_run, resume_command, versions

Task = Literal["recall", "induction", "majority", "counting", "copying", "addition", "linear"]


@dataclasses.dataclass(frozen=True)
class Settings(Common):
    tasks: tuple[Task, ...] = get_args(Task)
    """Which tasks."""
    mixers: tuple[Mixer, ...] = ("hyena-s5", "hyena", "h3", "attention")
    """Which mixers."""
    lengths: tuple[int, ...] = (16, 64)
    """Tokens of a sequence, about: what is asked comes on top. Of linear functions there are half as many pairs."""
    digits: tuple[int, ...] = (2, 3)
    """Digits of the numbers to be added, in place of lengths."""
    vocab_size: Annotated[int, tyro.conf.arg(aliases=["--vocab"])] = 10
    """Tokens of the tasks that have a choice."""
    dimension: int = 3
    """Entries of the vectors that the linear functions take."""


@dataclasses.dataclass(frozen=True)
class Where(Place):
    plot: Path | None = None
    """Draw the heat map into this file too."""


TINY = Settings(
    state_size=64,
    num_blocks=4,
    dt_min=1e-3,
    num_test=1000,
    lr=3e-3,
    steps=1500,
    warmup=100,
    stop_at=0.995,
    steps_per_dispatch=50,
    eval_every=250,
)
PRESETS = {
    "tiny": TINY,
    "addition": dataclasses.replace(
        TINY, tasks=("addition",), mixers=("hyena-s5",), digits=(3,), num_test=4000, batch_size=32, steps=5000
    ),
    # As `assoc_recall.py` trains it, with every mixer.
    "mixers": Settings(
        tasks=("recall",),
        mixers=tuple(mixer for mixer in get_args(Mixer) if not mixer.startswith("bidirectional")),
        lengths=(20,),
    ),
    "hyena-paper": dataclasses.replace(
        TINY,
        tasks=("recall", "majority", "counting", "linear"),
        mixers=("hyena-s5", "hyena", "h3"),
        lengths=(1024, 4096, 16_384, 65_536, 131_072),
        vocab_size=30,
        num_test=200,
        batch_size=32,
        steps=12_500,
        warmup=600,
        steps_per_dispatch=10,
        eval_batch_size=4,
    ),
}


def task(s: Settings, name: Task, size: int) -> AbstractSynthetic:
    """A task at a length, or with so many digits."""
    match name:
        case "recall":
            return AssocRecall(s.vocab_size, size, **s.data)
        case "induction":
            return InductionHeads(s.vocab_size, size, answer_only=True, **s.data)
        case "majority":
            return Majority(s.vocab_size, size, **s.data)
        case "counting":
            return Counting(s.vocab_size, size, **s.data)
        case "copying":
            return SelectiveCopying(s.vocab_size, size, **s.data)
        case "addition":
            return Addition(size, **s.data)
        case "linear":
            return LinearFunctions(s.dimension, size // 2, **s.data)


def cells(s: Settings) -> list[tuple[Task, Mixer, int]]:
    """All of the grid, task by task."""
    sizes = lambda name: s.digits if name == "addition" else s.lengths
    return [(name, mixer, size) for name in s.tasks for mixer in s.mixers for size in sizes(name)]


def compute(s: Settings, name: Task, mixer: Mixer, size: int) -> dict | None:
    """What training came to; nothing if someone interrupted."""
    began = time.perf_counter()
    of_cell = task(s, name, size)
    trained = trainer(dataclasses.replace(s, mixer=mixer), of_cell, of_cell.sequence_length)
    result = fit(
        trained,
        steps=s.steps,
        eval_every=s.eval_every,
        log_every=s.log_every,
        checkpoint_every=s.steps,
        target=None if s.stop_at is None else Target(s.stop_at),
        progress=False,
    )
    if result.interrupted:
        return None
    test = trained.evaluate(trained.flatten(result.state))
    value = test["accuracy"] if "accuracy" in test else max(0.0, 1 - test["loss"])
    return {"value": value, "loss": test["loss"], "steps": result.step, "seconds": time.perf_counter() - began}


def table(s: Settings, found: dict[tuple, dict]) -> str:
    """The grid in Markdown, a line a mixer."""
    columns = list(dict.fromkeys((name, size) for name, _, size in cells(s)))
    lines = [f"| mixer | {' | '.join(f'{name} {size}' for name, size in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for mixer in s.mixers:
        values = [f"{100 * found[name, mixer, size]['value']:.1f}" for name, size in columns]
        lines.append(f"| {mixer} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def draw(s: Settings, found: dict[tuple, dict], files: list[Path]) -> None:
    """The heat map: a panel a task, a row a mixer, a column a length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    sizes = {name: [size for n, m, size in cells(s) if n == name and m == s.mixers[0]] for name in s.tasks}
    widths = [len(columns) for columns in sizes.values()]
    figure, panels = plt.subplots(
        1,
        len(s.tasks),
        figsize=(1.5 + 0.62 * sum(widths), 0.9 + 0.42 * len(s.mixers)),
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, columns) in zip(panels[0], sizes.items(), strict=True):
        values = np.array([[found[name, mixer, size]["value"] for size in columns] for mixer in s.mixers])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(columns)), [f"{size:,}" for size in columns])
        axes.set_yticks(range(len(s.mixers)), s.mixers if axes is panels[0, 0] else [""] * len(s.mixers))
        axes.set_xlabel("digits" if name == "addition" else "length", fontsize=9)
    figure.colorbar(image, ax=panels[0, -1], label="accuracy")
    for file in files:
        figure.savefig(file, dpi=120)
    plt.close(figure)


def main(preset: str, s: Settings, where: Where):
    for name in ("tasks", "mixers", "lengths", "digits"):
        given = getattr(s, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name} must be at least one, and each of them once, got {given}")
    if where.plot is not None and not where.plot.absolute().parent.is_dir():
        raise ValueError(f"plot must be a file in a folder that exists, got {where.plot}")
    for name, mixer, size in cells(s):
        if mixer.startswith("bidirectional"):
            raise ValueError(f"the grid's tasks are causal, and mixers must be; got {mixer}")
        task(s, name, size)  # refuses what cannot be, before anything is computed
    settings = {"preset": preset, **dataclasses.asdict(s)}
    run = open_run(settings, folder=where.run, stem=f"grid-{preset}", resume=where.resume, overwrite=where.overwrite)
    folder = run.folder / "cells"
    folder.mkdir(exist_ok=True)
    print(f"run in {run.folder}", flush=True)
    found: dict[tuple, dict] = {}
    for cell in cells(s):
        page = folder / f"{'-'.join(map(str, cell))}.json"
        if page.exists():
            found[cell] = json.loads(page.read_text())
            continue
        result = compute(s, *cell)
        if result is None:
            print(f"stopped with {len(found)} cells of {len(cells(s))}; continue with:")
            print(resume_command(run.folder, sys.argv))
            return
        part = page.with_suffix(".part")
        part.write_text(json.dumps(result) + "\n")
        os.replace(part, page)
        found[cell] = result
        value, steps, seconds = result["value"], result["steps"], result["seconds"]
        print(f"{' '.join(map(str, cell))}: {100 * value:.1f} after {steps} steps, {seconds:.0f} s", flush=True)
    (run.folder / "grid.md").write_text(table(s, found))
    draw(s, found, [run.folder / "grid.png", *([] if where.plot is None else [where.plot])])
    print(table(s, found))
    summary = {
        "cells": {" ".join(map(str, cell)): round(result["value"], 4) for cell, result in found.items()},
        "seconds": round(sum(result["seconds"] for result in found.values())),
        "commit": commit(Path(__file__)),
        "versions": versions(),
        "settings": run.settings,
    }
    (run.folder / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    preset, settings, where = parse(PRESETS, Where(), __doc__, sys.argv)
    try:
        main(preset, settings, where)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
