"""Images: S4ND learns small pictures, and is then tested on the same pictures at other resolutions, without training.

    python experiments/images.py                                # six shapes at 16 x 16, generated: 4 minutes of a core
    python experiments/images.py --plot experiments/images.png  # and the picture of it
    python experiments/images.py --run runs/shapes --resume     # goes on where it was stopped
    python experiments/images.py cifar10                        # CIFAR-10, of the Hugging Face hub, on a GPU
    python experiments/images.py shapes --help                  # every setting, with that preset's values

A model is trained for each of `bandlimits`, and tested at each of `test_sizes` twice: told the spacing of the pixels in
units of that in training, its `rate`, and not told it. CIFAR-10 is made smaller by averaging squares of pixels, so its
sizes divide 32. Published for a smaller isotropic S4ND, of 268 K parameters: 89.9 % at 32 x 32 (arXiv 2302.10866).

The folder of each model, in that of the run, has the same files as that of `assoc_recall.py`. A finished model is not
trained again. The last line of standard output is the result as JSON.
"""

import dataclasses
import functools
import json
import sys
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import numpy as np
import tyro
from _command import Place, check_file, parse
from _models import TrainSettings, groups
from _reproduce import write
from _training import RESULT, train_one

from s5eqx.data import Images, read_images
from s5eqx.data.synthetics import Shapes
from s5eqx.interop import load
from s5eqx.models import GridClassifier
from s5eqx.nn import S4ND, LegSInit, LinInit
from s5eqx.train import Trainer, check_lengths, commit, interruption, label, open_run, resume_command


@dataclasses.dataclass(frozen=True)
class Settings(TrainSettings):
    test_lengths: tyro.conf.Suppress[tuple[int, ...]] = ()
    published: tyro.conf.Suppress[bool] = False
    start: tyro.conf.Suppress[None] = None
    stop_at: tyro.conf.Suppress[None] = None
    chunk: tyro.conf.Suppress[None] = None
    hub: str | None = None
    """Images of the Hugging Face hub, by name; None for the generated shapes."""
    columns: tuple[str, str] = ("img", "label")
    """Of the hub's data set, those of images and of classes."""
    size: int = 16
    """Pixels of a training image along each side."""
    test_sizes: tuple[int, ...] = (8, 12, 16, 24, 32)
    """Pixels of test images along each side."""
    bandlimits: tuple[float | None, ...] = (0.5, None)
    """A model is trained with each; 1 is the Nyquist limit of the training pixels, None is no limit."""
    width: int = 32
    """Channels of the model."""
    num_layers: int = 2
    """S4ND layers."""
    state_size: int = 32
    """Real states of each channel on each axis."""
    legs: bool = False
    """Let eigenvalues start as those of HiPPO-LegS, not as multiples of pi."""
    rank: int = 1
    """Products of kernels whose mean a kernel is."""
    dt_min: float = 0.05
    """Least initial time step, in units of the spacing of training pixels."""
    dt_max: float = 0.5
    """Largest initial time step, in units of the spacing of training pixels."""
    dropout: float = 0.0
    """Probability to drop a channel of a residual branch."""


@dataclasses.dataclass(frozen=True)
class Where(Place):
    plot: Path | None = None
    """Draw accuracies, an example and a kernel into this file."""


PRESETS = {
    "shapes": Settings(
        num_test=1000,
        batch_size=32,
        lr=2e-2,
        weight_decay=0.05,
        steps=1000,
        warmup=100,
        steps_per_dispatch=50,
        eval_every=250,
        eval_batch_size=250,
    ),
    "cifar10": Settings(
        hub="uoft-cs/cifar10",
        size=32,
        test_sizes=(8, 16, 32),
        bandlimits=(0.5,),
        width=512,
        num_layers=6,
        state_size=64,
        legs=True,
        dt_min=0.1,
        dt_max=1.0,
        dropout=0.1,
        batch_size=50,
        lr=1e-2,
        weight_decay=0.05,
        steps=100_000,
        warmup=1000,
        steps_per_dispatch=10,
        eval_every=5000,
        eval_batch_size=100,
    ),
}


@functools.cache
def of_hub(s: Settings) -> Images:
    """The images as the hub has them."""
    if s.num_examples is not None:
        raise ValueError(f"num_examples is for generated data, {s.hub} has its own; got {s.num_examples}")
    assert s.hub is not None
    return read_images(s.hub, image=s.columns[0], label=s.columns[1], seed=s.seed)


@functools.cache
def task(s: Settings, size: int) -> Shapes | Images:
    if s.hub is None:
        return Shapes(size=size, **s.data)
    images = of_hub(s)
    height, width = images.training.shape[1:3]
    if size < 1 or height != width or height % size:
        raise ValueError(f"size and test_sizes must divide the sides of the images, {height} x {width}; got {size}")
    return images.coarser(height // size)


def build(s: Settings, bandlimit: float | None) -> Trainer:
    """What trains the model with this bandlimit."""
    data = task(s, s.size)

    def mixer(key):
        return S4ND(
            s.width,
            s.state_size,
            rank=s.rank,
            A_init=LegSInit() if s.legs else LinInit(),
            dt_min=s.dt_min,
            dt_max=s.dt_max,
            bandlimit=bandlimit,
            key=key,
        )

    def model(key):
        return GridClassifier(
            data.num_features,
            s.width,
            data.num_classes,
            mixer,
            num_layers=s.num_layers,
            dropout=s.dropout,
            tie_dropout=True,
            key=key,
        )

    return Trainer(
        model,
        data,
        groups(s),
        batch_size=s.batch_size,
        steps_per_dispatch=s.steps_per_dispatch,
        eval_batch_size=s.eval_batch_size,
        seed=s.seed,
        loss=label,
    )


@eqx.filter_jit
def score(model, batch, rate: float):
    return label(partial(model, rate=rate), batch)


def accuracy(model: GridClassifier, data: Shapes | Images, rate: float, pixels: int) -> float:
    """Of the whole test, with about so many pixels at once."""
    size = max(1, pixels // data.sequence_length)
    batches = (data.test(np.arange(i, i + size, dtype=np.int32)) for i in range(0, data.num_test, size))
    scores = [score(model, batch, rate) for batch in batches]
    return float(sum(scores[1:], start=scores[0]).means["accuracy"])


def resolutions(model: GridClassifier, s: Settings) -> dict[str, dict[int, float]]:
    """Accuracies at all sizes, with and without the rate."""
    pixels = s.eval_batch_size * s.size**2
    at = lambda size, rate: accuracy(model, task(s, size), rate, pixels)
    return {
        "rate": {size: at(size, s.size / size) for size in s.test_sizes},
        "no rate": {size: at(size, 1.0) for size in s.test_sizes},
    }


def draw(found: dict, models: dict, s: Settings, files: list[Path]):
    """Accuracy over resolution, one example and one kernel at two of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    finest = max(s.test_sizes)
    kernels = [f"kernel {limit}" for limit in models]
    figure, axes = plt.subplot_mosaic(
        [["accuracy", "coarse", "fine"], ["accuracy", kernels[0], kernels[-1]]],
        figsize=(11, 5),
        width_ratios=(2, 1, 1),
        layout="constrained",
    )
    named = {limit: "no bandlimit" if limit is None else f"bandlimit {limit}" for limit in models}
    for i, (limit, tested) in enumerate(found.items()):
        for (told, values), style in zip(tested.items(), ("o-", "s:"), strict=True):
            axes["accuracy"].plot(values.keys(), values.values(), style, color=f"C{i}", label=f"{named[limit]}, {told}")
    axes["accuracy"].axvline(s.size, color="grey", linewidth=0.8)
    axes["accuracy"].set(
        xlabel=f"pixels along a side in the test (trained at {s.size})", ylabel="accuracy", ylim=(0, 1.02)
    )
    axes["accuracy"].set_xscale("log", base=2)
    axes["accuracy"].set_xticks(s.test_sizes, [f"{size}" for size in s.test_sizes])
    axes["accuracy"].legend()
    for name, size in (("coarse", s.size), ("fine", finest)):
        picture = np.asarray(task(s, size).test(np.arange(1, dtype=np.int32)).inputs)[0]
        picture = (picture - picture.min()) / np.ptp(picture)
        axes[name].imshow(picture.squeeze(), cmap="gray")
        axes[name].set(title=f"an example at {size} x {size}", xticks=(), yticks=())
    for name, (limit, model) in zip(kernels, models.items(), strict=True):
        if name not in axes:
            continue
        for size, style in ((finest, "-"), (s.size, "o")):
            rate = s.size / size
            taps = np.asarray(model.residuals[0].layer.kernel(0, size, rate=rate))[0, 0, 0]
            lags = np.fft.ifftshift(np.arange(1 - size, size))
            middles = (lags + 0.5) * rate  # of the intervals that the taps are integrals over
            order = np.argsort(lags)
            axes[name].plot(
                middles[order], taps[order] / rate, style, markersize=3, linewidth=0.9, label=f"{size} pixels"
            )
        axes[name].set(title=f"a kernel, {named[limit]}", xlabel="training pixels", xlim=(-s.size / 2, s.size / 2))
        axes[name].legend()
    for file in files:
        figure.savefig(file, dpi=100)
    plt.close(figure)


def train(preset: str, s: Settings, where: Where) -> dict | None:
    """Trains and tests every model; the result, or nothing if someone interrupted."""
    if not s.bandlimits or len(set(s.bandlimits)) < len(s.bandlimits) or not s.test_sizes:
        raise ValueError(
            f"bandlimits must be at least one, and each of them once, and test_sizes at least one; got {s.bandlimits} "
            f"and {s.test_sizes}"
        )
    check_file("plot", where.plot)
    trainers = {limit: build(s, limit) for limit in s.bandlimits}
    for trainer in trainers.values():
        check_lengths(trainer, **s.pace)  # and all else that is refused, before there is a folder
    for size in s.test_sizes:
        task(s, size)
    settings = {"preset": preset, **dataclasses.asdict(s)}
    whole = open_run(
        settings, folder=where.run, stem=f"images-{preset}", resume=where.resume, overwrite=where.overwrite
    )
    code, results, models, found = commit(Path(__file__)), {}, {}, {}
    with interruption() as asked:
        for limit, trainer in trainers.items():
            folder = whole.folder / f"bandlimit-{limit}"
            if not (folder / RESULT).exists():
                resume = (folder / "settings.json").exists()
                run = open_run(settings | {"bandlimits": [limit]}, folder=folder, resume=resume)
                if asked or train_one(run, trainer, s, task, code, began=time.perf_counter()) is None:
                    print(f"continue with:\n{resume_command(whole.folder, sys.argv)}")
                    return None
            results[limit] = json.loads((folder / RESULT).read_text())
            models[limit] = load(folder / "model.safetensors")
            found[limit] = resolutions(models[limit], s)
            for told, values in found[limit].items():
                print(f"bandlimit {limit}, {told}: " + ", ".join(f"{n}: {100 * a:.1f} %" for n, a in values.items()))
    summary = {
        "test_accuracy": {f"{limit}": result["test_accuracy"] for limit, result in results.items()},
        "resolutions": {f"{limit}": tested for limit, tested in found.items()},
        "seconds": {f"{limit}": result["seconds"] for limit, result in results.items()},
        "parameters": results[s.bandlimits[0]]["parameters"],
        "commit": code,
        "versions": whole.versions,
        "settings": whole.settings,
    }
    draw(found, models, s, [whole.folder / "images.png", *([] if where.plot is None else [where.plot])])
    write(whole.folder / RESULT, json.dumps(summary, indent=2) + "\n")
    return summary


def main():
    preset, s, where = parse(PRESETS, Where(), __doc__, sys.argv)
    try:
        summary = train(preset, s, where)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    if summary is not None:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
