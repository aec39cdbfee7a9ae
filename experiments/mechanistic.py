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
A cell that has an accuracy ends early when it is solved, `stop_at`. One that comes to no end, because a loss is not
finite or memory does not suffice, is a dash, and the others go on.

Every finished cell is a file in the run's folder, `cells/`, and is not computed again; delete it to have it computed
again. A cell of more than `checkpoint_every` steps has checkpoints, too. `grid.png` is the heat map and `grid.md` the
table, of all that is there when the script ends. The last line of standard output is all of it as JSON.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal, get_args

import jax
import tyro
from _command import Place, check_file, parse
from _models import Mixer, trainer
from _models import Settings as Common
from _reproduce import PAGE, write

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
from s5eqx.train import Trainer, check_lengths, commit, fit, interruption, open_run, resume_command

Task = Literal["recall", "induction", "majority", "counting", "copying", "addition", "linear"]


@dataclasses.dataclass(frozen=True)
class Settings(Common):
    mixer: tyro.conf.Suppress[Mixer] = "hyena-s5"
    test_lengths: tyro.conf.Suppress[tuple[int, ...]] = ()
    start: tyro.conf.Suppress[None] = None
    tasks: tuple[Task, ...] = get_args(Task)
    """Which tasks."""
    mixers: tuple[Mixer, ...] = ("hyena-s5", "hyena", "h3", "attention")
    """Which mixers."""
    lengths: tuple[int, ...] = (16, 32)
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
    jobs: int | None = None
    """Processes that share the cells; None for one a core, at most 4, or for one where there is an accelerator."""


TINY = Settings(
    state_size=64,
    num_blocks=4,
    dt_min=1e-3,
    num_test=1000,
    lr=3e-3,
    steps=1000,
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


TASKS: dict[Task, Callable[[Settings, int], AbstractSynthetic]] = {
    "recall": lambda s, length: AssocRecall(s.vocab_size, length, **s.data),
    "induction": lambda s, length: InductionHeads(s.vocab_size, length, answer_only=True, **s.data),
    "majority": lambda s, length: Majority(s.vocab_size, length, **s.data),
    "counting": lambda s, length: Counting(s.vocab_size, length, **s.data),
    "copying": lambda s, length: SelectiveCopying(s.vocab_size, length, **s.data),
    "addition": lambda s, digits: Addition(digits, **s.data),
    "linear": lambda s, length: LinearFunctions(s.dimension, length // 2, **s.data),
}


def cells(s: Settings) -> list[tuple[Task, Mixer, int]]:
    """All of the grid, task by task."""
    sizes = lambda name: s.digits if name == "addition" else s.lengths
    return [(name, mixer, size) for name in s.tasks for mixer in s.mixers for size in sizes(name)]


def build(s: Settings, name: Task, mixer: Mixer, size: int) -> Trainer:
    """What trains a cell."""
    of_cell = TASKS[name](s, size)
    return trainer(dataclasses.replace(s, mixer=mixer), of_cell, of_cell.sequence_length)


def compute(s: Settings, cell: tuple[Task, Mixer, int], folder: Path) -> dict | None:
    """What training came to, or why to nothing; None if someone interrupted."""
    began, run = time.perf_counter(), None
    if s.checkpoint_every < s.steps:
        run = open_run({"cell": cell}, folder=folder, resume=(folder / "settings.json").exists())
    try:
        result = fit(
            build(s, *cell),
            **s.pace,
            run=run,
            target=s.target,
            progress=False,
        )
    except (FloatingPointError, jax.errors.JaxRuntimeError) as error:
        return {"value": None, "reason": str(error).splitlines()[0]}
    if result.interrupted:
        return None
    last = result.history[-1]
    value = last["test/accuracy"] if "test/accuracy" in last else max(0.0, 1 - last["test/loss"])
    return {"value": value, "loss": last["test/loss"], "steps": result.step, "seconds": time.perf_counter() - began}


def shown(found: dict[tuple, dict], cell: tuple[str, str, int]) -> float:
    """The value of a cell; NaN where there is none."""
    value = found.get(cell, {}).get("value")
    return math.nan if value is None else value


def told(result: dict) -> str:
    """A finished cell in words."""
    if result["value"] is None:
        return f"came to nothing, {result['reason']}"
    return f"{100 * result['value']:.1f} after {result['steps']} steps, {result['seconds']:.0f} s"


def table(s: Settings, found: dict[tuple, dict]) -> str:
    """The grid in Markdown, a line a mixer."""
    columns = list(dict.fromkeys((name, size) for name, _, size in cells(s)))
    lines = [f"| mixer | {' | '.join(f'{name} {size}' for name, size in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for mixer in s.mixers:
        values = [shown(found, (name, mixer, size)) for name, size in columns]
        lines.append(f"| {mixer} | {' | '.join('-' if math.isnan(v) else f'{100 * v:.1f}' for v in values)} |")
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
        values = np.array([[shown(found, (name, mixer, size)) for size in columns] for mixer in s.mixers])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            text = "-" if math.isnan(value) else f"{100 * value:.0f}"
            axes.text(column, row, text, ha="center", va="center", color="w" if value < 0.6 else "k")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(columns)), [f"{size:,}" for size in columns])
        axes.set_yticks(range(len(s.mixers)), s.mixers if axes is panels[0, 0] else [""] * len(s.mixers))
        axes.set_xlabel("digits" if name == "addition" else "length", fontsize=9)
    figure.colorbar(image, ax=panels[0, -1], label="accuracy")
    for file in files:
        figure.savefig(file, dpi=120)
    plt.close(figure)


def page_of(folder: Path, cell: tuple[Task, Mixer, int]) -> Path:
    """The file of a finished cell."""
    return folder / f"{'-'.join(map(str, cell))}.json"


def work(s: Settings, share: list[tuple[Task, Mixer, int]], folder: Path) -> None:
    """Computes those cells of the share that are not there yet, until someone interrupts."""
    with interruption() as asked:
        for cell in share:
            page = page_of(folder, cell)
            if page.exists():
                continue
            result = None if asked else compute(s, cell, page.with_suffix(""))
            if result is None:
                return
            write(page, json.dumps(result) + "\n")
            print(f"{' '.join(map(str, cell))}: {told(result)}", flush=True)


def work_on(cores: list[int], s: Settings, share: list[tuple[Task, Mixer, int]], folder: Path) -> None:
    """`work` on these cores alone: threads of several processes on one core wait for each other."""
    if cores:
        os.sched_setaffinity(0, cores)
    work(s, share, folder)


def work_together(s: Settings, folder: Path, jobs: int) -> None:
    """`work` in so many processes, each with its part of the cells and of the cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    parts = [(cores[i::jobs], s, cells(s)[i::jobs], folder) for i in range(jobs)]
    workers = [get_context("spawn").Process(target=work_on, args=part) for part in parts]
    with interruption() as asked:
        for worker in workers:
            worker.start()
        told_to_stop = False
        while any(worker.is_alive() for worker in workers):
            if asked and not told_to_stop:
                told_to_stop = True
                for worker in workers:
                    worker.terminate()
            time.sleep(0.2)
    if not asked and any(worker.exitcode for worker in workers):
        raise OSError("a process ended before its cells; what it says is above, and finished cells are kept")


def main(preset: str, s: Settings, where: Where):
    for name in ("tasks", "mixers", "lengths", "digits"):
        given = getattr(s, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name} must be at least one, and each of them once, got {given}")
    check_file("plot", where.plot)
    jobs = where.jobs
    if jobs is None:
        jobs = min(4, len(cells(s)), os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    for name, mixer, size in cells(s):  # what cannot be is refused before anything is computed
        TASKS[name](s, size)
        if mixer.startswith("bidirectional"):
            raise ValueError(f"the grid's tasks are causal, and mixers must be; got {mixer}")
    for mixer in s.mixers:
        check_lengths(build(s, s.tasks[0], mixer, cells(s)[0][2]), **s.pace)
    settings, code = {"preset": preset, **dataclasses.asdict(s)}, commit(Path(__file__), apart_from=[PAGE])
    run = open_run(settings, folder=where.run, stem=f"grid-{preset}", resume=where.resume, overwrite=where.overwrite)
    folder, began = run.folder / "cells", time.perf_counter()
    folder.mkdir(exist_ok=True)
    print(f"run in {run.folder}", flush=True)
    if jobs == 1:
        work(s, cells(s), folder)
    else:
        work_together(s, folder, jobs)
    pages = {cell: page_of(folder, cell) for cell in cells(s)}
    found = {cell: json.loads(page.read_text()) for cell, page in pages.items() if page.exists()}
    write(run.folder / "grid.md", table(s, found))
    draw(s, found, [run.folder / "grid.png", *([] if where.plot is None else [where.plot])])
    if len(found) < len(pages):
        print(f"stopped with {len(found)} cells of {len(pages)}; continue with:")
        print(resume_command(run.folder, sys.argv))
        return
    print(table(s, found))
    summary = {
        "cells": {" ".join(map(str, cell)): result["value"] for cell, result in found.items()},
        "seconds": round(time.perf_counter() - began),
        "commit": code,
        "versions": run.versions,
        "settings": run.settings,
    }
    write(run.folder / "result.json", json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    preset, settings, where = parse(PRESETS, Where(), __doc__, sys.argv)
    try:
        main(preset, settings, where)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
