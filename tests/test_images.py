"""Images: the generated shapes, corpora of images, their classifier, and the script that changes the resolution."""

import json
import math
import re
import runpy
import shlex
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, slow
from scripts import ROOT, run, start

from s5eqx import nn
from s5eqx.data import ImageBatch, Images, read_images
from s5eqx.data.synthetics import Shapes
from s5eqx.data.synthetics.shapes import REACH, distances
from s5eqx.interop import load, save
from s5eqx.models import GridClassifier
from s5eqx.train import label

# Shapes.


def test_each_shape_has_its_area_and_its_reach():
    """By counting points: areas in units of the squared radius, from the sides that the shapes are meant to have."""
    at = (np.arange(600) + 0.5) / 200 - 1.5
    inside = np.asarray(quick_jit(distances)(*np.meshgrid(at, at))) < 0
    areas = [
        math.pi * 0.9**2,
        math.pi * (1 - 0.5**2),
        1.6**2,
        1.6**2 - 0.8**2,
        3 * math.sqrt(3) * 0.6**2,
        2 * 2 * 0.6 - 0.6**2,
    ]
    np.testing.assert_allclose(inside.sum(axis=(0, 1)) / 200**2, areas, rtol=0.01)
    far = np.hypot(at[:, None], at[None]) > REACH
    assert not inside[far].any()
    assert (inside & (np.hypot(at[:, None], at[None]) > 0.89)[..., None]).any(axis=(0, 1)).all()


@pytest.mark.parametrize("size", [8, slow(16)])
def test_an_example_is_the_same_picture_at_every_resolution(size):
    """The mean over the finer pixels is the coarser one: exactly where there is no edge, and else nearly."""
    indices = np.arange(200, dtype=np.int32)
    coarse, fine = (jax.device_get(Shapes(size=n).train(indices)) for n in (size, 2 * size))
    np.testing.assert_array_equal(coarse.targets, fine.targets)
    means = fine.inputs.reshape(200, size, 2, size, 2).mean(axis=(2, 4))
    miss = np.abs(coarse.inputs[..., 0] - means)
    assert np.mean(miss < 1e-5) > 0.5 and np.mean(miss) < 0.01 * 8 / size and miss.max() < 0.4
    assert np.std(coarse.inputs) > 0.2


@pytest.mark.smoke
def test_light_and_shape_are_as_described():
    """Every class is as likely; the light has its deviation, and the shape a contrast of either sign."""
    batch = jax.device_get(Shapes(size=16).train(np.arange(3000, dtype=np.int32)))
    counts = np.bincount(batch.targets, minlength=6)
    assert np.abs(counts - 500).max() < 5 * math.sqrt(500 * 5 / 6)
    corners = batch.inputs[:, :2, :2, 0]  # where no shape reaches: its circle touches the sides at most
    assert abs(corners.std() - 0.15) < 0.01
    middle = batch.inputs[batch.targets == 2, 8, 8, 0]
    assert (middle > 0.3).mean() > 0.2 and (middle < -0.3).mean() > 0.2


@pytest.mark.slow
def test_an_example_depends_on_seed_and_number_alone(request, key):
    make = lambda seed: Shapes(size=8, num_test=5, seed=seed)
    indices = np.arange(6, dtype=np.int32)
    together, others = make(0).train(indices), make(0).train(indices + 5)
    np.testing.assert_array_equal(np.asarray(together.inputs)[5], np.asarray(others.inputs)[0])
    tested = make(0).test(indices)
    np.testing.assert_array_equal(tested.weights, [1, 1, 1, 1, 1, 0])
    for inputs in (tested.inputs, make(1).train(indices).inputs):
        assert (np.asarray(inputs) != np.asarray(together.inputs)).any(axis=(1, 2, 3)).all()
    request.getfixturevalue("x64")
    wide = jax.eval_shape(make(0).draw, key)
    assert {a.dtype.name for a in jax.tree.leaves(wide)} == {"float32", "int32"}


@pytest.mark.parametrize(
    "settings, message",
    [({"size": 3}, "size must be at least 4, got 3"), ({"num_test": 0}, "num_test must be at least 1")],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**settings)


# Corpora.


def pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def corpus(**options):
    return Images(pixels(7, 4, 6, 3), np.arange(7) % 3, pixels(5, 4, 6, 3, seed=1), np.arange(5), **options)


def test_every_epoch_goes_through_the_images_anew():
    """In an order of its own; examples are functions of their number."""
    images = corpus()
    batch = images.train(np.arange(21))
    rows = np.asarray(
        [np.flatnonzero((np.isclose(x, images.train(np.arange(7)).inputs)).all((1, 2, 3)))[0] for x in batch.inputs]
    )
    epochs = rows.reshape(3, 7)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(7), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = images.train(np.array([20, 3, 8]))
    np.testing.assert_array_equal(again.inputs, batch.inputs[[20, 3, 8]])
    np.testing.assert_array_equal(again.targets, batch.targets[[20, 3, 8]])
    assert not np.array_equal(corpus(seed=1).train(np.arange(7)).targets, batch.targets[:7])


@pytest.mark.smoke
def test_channels_are_normalised_by_the_training_images():
    images = corpus()
    mean, deviation = (f(images.training.astype(float), axis=(0, 1, 2)) for f in (np.mean, np.std))
    batch = images.test(np.arange(7))
    expected = (images.evaluated - mean) / deviation
    np.testing.assert_allclose(batch.inputs[:5], expected, atol=1e-5)
    np.testing.assert_array_equal(batch.targets[:5], np.arange(5))
    np.testing.assert_array_equal(batch.weights, [1, 1, 1, 1, 1, 0, 0])
    assert batch.inputs.dtype == np.float32 and batch.targets.dtype == np.int32
    assert (images.num_classes, images.num_features, images.sequence_length, images.num_test) == (5, 3, 24, 5)
    coarser = images.coarser(2)
    squares = expected.reshape(5, 2, 2, 3, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(coarser.test(np.arange(5)).inputs, squares, atol=1e-5)
    assert coarser.sequence_length == 6
    flat = Images(np.full((2, 2, 2, 1), 9, np.uint8), np.arange(2), np.full((1, 2, 2, 1), 9, np.uint8), np.arange(1))
    np.testing.assert_array_equal(flat.test(np.arange(1)).inputs, 0.0)


def test_images_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="factor must divide both sides of images of 4 x 6 pixels; got 4"):
        corpus(factor=4)
    with pytest.raises(ValueError, match="seed must be an integer"):
        corpus(seed=-1)
    with pytest.raises(ValueError, match="for training and for the test; got 0 and 5"):
        Images(pixels(0, 4, 6, 3), np.arange(0), pixels(5, 4, 6, 3), np.arange(5))
    with pytest.raises(ValueError, match="classes count from 0; got -1"):
        Images(pixels(7, 4, 6, 3), np.arange(7), pixels(5, 4, 6, 3), np.full(5, -1))


@pytest.fixture
def hub(monkeypatch):
    """A hub with the data sets that are put in, as PNG files with classes; None of the hub for no network."""
    import datasets
    import huggingface_hub

    held = {}

    def repo_info(self, name, **_):
        if not held:
            raise RuntimeError("no such host")

    def load_dataset(name, config, revision):
        if name not in held:
            raise datasets.exceptions.DatasetNotFoundError("nothing of that name")
        return held[name]

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def of_files(folder, **splits):
    """Splits as `datasets` gives them, from parquet files with encoded images."""
    import datasets
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    found = {}
    for split, images in splits.items():
        rows = {"img": [Image.fromarray(image) for image in images], "label": [i % 3 for i in range(len(images))]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
        found[split] = datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"), cache_dir=str(folder / "cache"))
    return datasets.DatasetDict(found)


@pytest.mark.smoke
def test_images_of_the_hub(hub, tmp_path):
    training, evaluated = pixels(6, 4, 4, 3), pixels(3, 4, 4, 3, seed=1)
    hub["acme/images"] = of_files(tmp_path, train=training, test=evaluated)
    images = read_images("acme/images", factor=2, seed=3)
    np.testing.assert_array_equal(images.training, training)
    np.testing.assert_array_equal(images.evaluated, evaluated)
    np.testing.assert_array_equal(images.labels, [0, 1, 2, 0, 1, 2])
    assert (images.factor, images.seed, images.num_classes) == (2, 3, 3)
    with pytest.raises(ValueError, match="with columns image and label; it has train with img and label, test with"):
        read_images("acme/images", image="image")
    del hub["acme/images"]["test"]
    with pytest.raises(ValueError, match="must have the splits train and test"):
        read_images("acme/images")
    hub["acme/grey"] = of_files(tmp_path, train=pixels(2, 5, 4), test=pixels(2, 5, 4))
    assert read_images("acme/grey").training.shape == (2, 5, 4, 1)
    hub["acme/odd"] = of_files(tmp_path, train=[*pixels(1, 4, 4), *pixels(1, 5, 4)], test=pixels(1, 4, 4))
    with pytest.raises(ValueError, match="must be of one size and kind; train has"):
        read_images("acme/odd")


def test_without_a_network(hub):
    with pytest.raises(ConnectionError, match=r"cannot be reached .*no such host.*data set uoft-cs/cifar10.*`Shapes`"):
        read_images("uoft-cs/cifar10")


# The loss and the classifier.


@pytest.mark.smoke
def test_images_are_scored_as_sequences_are():
    rng = np.random.default_rng(0)
    inputs, weights = rng.standard_normal((4, 2, 3, 5)), np.array([1.0, 0.0, 2.0, 1.0])
    batch = ImageBatch(*map(on_device, (inputs, np.array([1, 99, 4, 0], np.int32), weights)))
    found = quick_jit(label)(lambda x, key: jnp.sum(x, axis=(0, 1)), batch)
    logits = inputs.sum(axis=(1, 2))
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(4), [1, 0, 4, 0]]
    np.testing.assert_allclose(found.total, nll @ weights, rtol=1e-6)
    right = logits.argmax(axis=1) == np.array([1, -1, 4, 0])
    np.testing.assert_allclose([found.weight, found.correct], [4.0, right @ weights])


D, F, CLASSES = 4, 3, 5


def classifier(key, *, num_axes=2, **options):
    mixer = lambda key: nn.S4ND(D, 4, num_axes=num_axes, key=key)
    return GridClassifier(F, D, CLASSES, mixer, **({"num_layers": 2, "mlp_width": 6} | options), key=key)


@pytest.mark.parametrize("grid", [slow((5,)), (4, 3), slow((2, 3, 2))])
def test_parts(grid, key, x64):
    """By hand, with a rate; `MLP` acts at each point."""
    model = drawn(lambda key: classifier(key, num_axes=len(grid)), key)
    x = np.random.default_rng(0).standard_normal((*grid, F))
    apply = lambda layer, h: h @ layer.weight.T + jnp.broadcast_to(layer.bias, (*h.shape[:-1], len(layer.bias)))

    @quick_jit
    def by_hand(model, x):
        h = apply(model.encoder, x)
        for r in model.residuals:
            g = nn.layer_norm(r.norm, h)
            if isinstance(r.layer, nn.MLP):
                h = h + apply(r.layer.fc2, jax.nn.gelu(apply(r.layer.fc1, g)))
            else:
                h = h + r.layer(g, rate=0.5)
        return apply(model.decoder, jnp.mean(nn.layer_norm(model.norm, h), axis=tuple(range(len(grid)))))

    assert [type(r.layer) for r in model.residuals] == [nn.S4ND, nn.MLP] * 2
    given = quick_jit(lambda model, x: (model(x, rate=0.5), model(x)))(model, x)
    np.testing.assert_allclose(given[0], by_hand(model, x), atol=1e-12)
    assert not np.allclose(*given, atol=1e-6)


@pytest.mark.smoke
def test_dropout(key):
    tied, free = (
        drawn(lambda key, t=t: nn.GridResidual(D, nn.MLP(D, 6, key=key), dropout=0.5, tie_dropout=t), key)
        for t in (True, False)
    )
    x = np.random.default_rng(0).standard_normal((4, 5, D)).astype(np.float32)
    untouched = lambda residual: np.asarray(quick_jit(residual)(x, key=key)) == x
    assert np.array_equal(untouched(tied).all(axis=(0, 1)), untouched(tied).any(axis=(0, 1)))
    assert 0 < untouched(tied).sum() < x.size
    assert 0 < untouched(free).sum() < x.size and not untouched(free).all(axis=(0, 1)).any()


@pytest.mark.smoke
def test_bfloat16(key):
    model = drawn(lambda key: classifier(key, num_layers=1), key)
    x = on_device(np.random.default_rng(0).standard_normal((4, 3, F)), np.float32)
    both = lambda model, x: (nn.cast(model, jnp.bfloat16)(x.astype(jnp.bfloat16)), model(x))
    narrow, wide = quick_jit(both)(model, x)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.1)


def test_round_trip_through_a_file(key, tmp_path):
    model = drawn(classifier, key)
    save(tmp_path / "model", model)
    assert eqx.tree_equal(*jax.device_get((load(tmp_path / "model"), model)))


def test_what_does_not_fit_is_named(key):
    layer = lambda width, num_axes: drawn(lambda key: nn.S4ND(width, 4, num_axes=num_axes, key=key), key)
    build = lambda *args, **options: eqx.filter_eval_shape(GridClassifier, *args, **options, key=key)
    with pytest.raises(ValueError, match="layer must map width 4 to width 4; S4ND refuses"):
        build(F, D, CLASSES, (layer(6, 2),))
    with pytest.raises(ValueError, match="the same axes; got num_axes of 2, 3"):
        build(F, D, CLASSES, (layer(4, 2), layer(4, 3)))
    with pytest.raises(ValueError, match=re.escape("a factory `key -> mixer` or a tuple of mixers; got one S4ND")):
        build(F, D, CLASSES, layer(4, 2), num_layers=2)
    for sizes in ((0, D, CLASSES), (F, 0, CLASSES), (F, D, 0)):
        with pytest.raises(ValueError, match=r"must be positive|num_classes must be at least 1"):
            build(*sizes, (layer(4, 2),))
    for mixer in (lambda key: nn.S4D(4, 4, key=key), lambda key: nn.S5(4, 4, key=key)):
        with pytest.raises(TypeError, match="parameter 'layer'"):
            build(F, D, CLASSES, mixer, num_layers=1)
    with pytest.raises(ValueError, match="the axes of its grid, 2 here"):
        drawn(classifier, key)(np.ones((4, F), np.float32))


# The script.

SCRIPT = ROOT / "experiments/images.py"
TINY = shlex.split(
    "--width 8 --num-layers 1 --state-size 8 --num-test 20 --warmup 10 --steps-per-dispatch 20 --eval-every 40 "
    "--log-every 20 --checkpoint-every 40 --eval-batch-size 20 --batch-size 16"
)


def complaint(words, folder, monkeypatch):
    """What it says, before it makes a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *shlex.split(words), "--num-layers", "1"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not list(folder.iterdir())
    return str(error.value)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--size 3", "error: a shape must be some pixels wide: size must be at least 4, got 3"),
        ("--test-sizes 16 2", "size must be at least 4, got 2"),
        ("--bandlimits 0.5 0.5", "bandlimits must be at least one, and each of them once"),
        ("--bandlimits 0", "error: bandlimit must be positive"),
        ("--state-size 5", "must be even and positive; got 5"),
        ("--steps 170", "steps must be a multiple of the trainer's steps_per_dispatch=50, got 170"),
        ("--plot nowhere/p.png", "error: plot must be a file in a folder that exists, got nowhere/p.png"),
        ("--plot .", "error: plot must be a file in a folder that exists, got ."),
        ("--resume", "name its folder"),
        ("cifar10", "error: the Hugging Face hub cannot be reached (RuntimeError: no such host)"),
        ("cifar10 --num-examples 5", "num_examples is for generated data, uoft-cs/cifar10 has its own; got 5"),
    ],
)
def test_refused_in_one_line(words, said, hub, tmp_path, monkeypatch):
    assert said in complaint(words, tmp_path, monkeypatch)


@pytest.mark.slow
def test_it_learns_and_goes_on_where_it_was_stopped(tmp_path):
    """Stopped in its first model, it resumes to the same numbers as without the stop; the picture is drawn."""
    words = [*TINY, "--steps", 400, "--lr", 0.02, "--test-sizes", 8, 16, "--plot", "p.png", "--run"]
    code, output, errors = run(SCRIPT, *words, "whole", folder=tmp_path)
    assert code == 0, errors
    expected = json.loads(output.splitlines()[-1])
    curve = json.loads((tmp_path / "whole/bandlimit-0.5/result.json").read_text())
    assert curve["test_loss"] < 1.7, "at the start it is above log(6) = 1.79"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert expected["resolutions"]["None"].keys() == {"rate", "no rate"}
    for limit, tested in expected["resolutions"].items():
        assert tested["rate"]["16"] == tested["no rate"]["16"] == pytest.approx(expected["test_accuracy"][limit])

    process = start(SCRIPT, *words, "stopped", folder=tmp_path, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "stopped/bandlimit-0.5/checkpoints"
    while process.poll() is None and not list(checkpoints.glob("[0-9]*")):
        pass
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped at step" in output
    again = shlex.split(output.splitlines()[-1])
    assert again[-1] == "--resume"
    code, output, errors = run(*again[1:], folder=tmp_path)
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1])["resolutions"] == expected["resolutions"]
    code, _, errors = run(*again[1:], "--seed", 1, folder=tmp_path)
    assert code == 1 and errors.startswith("error: ") and "seed was 0 and is now 1" in errors


@pytest.mark.slow
def test_it_trains_on_images_of_the_hub(hub, tmp_path, monkeypatch, capsys):
    """Three colours are three classes, at half the resolution and at the full one."""
    colours = lambda count: np.stack([np.eye(3)[i % 3] * np.ones((8, 8, 1)) * 200 for i in range(count)])
    noisy = lambda count, seed: (colours(count) + pixels(count, 8, 8, 3, seed=seed) // 8).astype(np.uint8)
    (tmp_path / "files").mkdir()
    hub["uoft-cs/cifar10"] = of_files(tmp_path / "files", train=noisy(30, 0), test=noisy(9, 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    words = ["cifar10", *TINY, *shlex.split("--steps 80 --lr 0.02 --size 4 --test-sizes 4 8 --run here")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["test_accuracy"] == {"0.5": 1.0}
    assert result["resolutions"]["0.5"]["rate"]["8"] == 1.0
