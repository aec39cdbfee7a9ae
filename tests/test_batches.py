"""Sequences with a class, and series of vectors: their losses, and training on them as on tokens."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import tiny
from helpers import drawn, quick_jit, slow
from scipy.special import log_softmax

from s5eqx.data import LabelledBatch, SeriesBatch
from s5eqx.data.synthetics import LinearFunctions, ListOps
from s5eqx.models import Classifier, Regressor, SequenceEncoder
from s5eqx.nn import S5
from s5eqx.train import fit, label, make_mesh, peak_memory, squared_error
from s5eqx.train.feed import to_devices


def encoder(inputs, key):
    return SequenceEncoder(inputs, lambda key: S5(4, 4, key=key), num_layers=1, key=key)


def classifier(key):
    return Classifier(encoder(eqx.nn.Embedding(16, 4, key=key), key), 10, key=key)


def regressor(key):
    return Regressor(encoder(eqx.nn.Linear(3, 4, key=key), key), 1, key=key)


TASKS = {
    "labels": (classifier, ListOps(8, 2, 3, num_test=30), label),
    "series": (regressor, LinearFunctions(2, 4, num_test=30), squared_error),
}


def test_the_score_of_labels():
    model, rng = drawn(classifier, jr.key(0)), np.random.default_rng(0)
    inputs, targets = rng.integers(0, 16, (4, 8), np.int32), np.array([4, 9, 4, 3], np.int32)
    lengths, weights = np.array([8, 4, 5, 7], np.int32), np.array([1, 2, 0, 1], np.float32)

    @quick_jit
    def run(model):
        logits = [model(x[:n]) for x, n in zip(inputs, lengths, strict=True)]
        return label(model, LabelledBatch(inputs, targets, weights, lengths)), jnp.stack(logits)

    given, logits = run(model)
    nll = -log_softmax(logits, -1)[np.arange(4), targets]
    assert float(given.loss) == pytest.approx(np.average(nll, weights=weights), rel=1e-5)
    right = np.asarray(logits).argmax(-1) == targets
    assert right.any() and not right.all()
    assert float(given.accuracy) == pytest.approx(np.average(right, weights=weights))
    assert float(given.weight) == 4.0


@pytest.mark.smoke
def test_the_score_of_series():
    """With the intervals, if there are any; what has no weight has no effect, whatever the model says of it."""
    inputs = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
    targets, weights = np.ones((2, 3, 2), np.float32), np.array([[1, 0, 0.5], [1, 1, 0]], np.float32)
    intervals, wild = np.full((2, 3), 2, np.float32), inputs.copy()
    wild[0, 1, 3] = np.nan

    def model(x, *, intervals=None, key=None):
        said = x[:, :2] + (0 if intervals is None else intervals[:, None])
        return jnp.where(jnp.isnan(x[:, 3:]), jnp.nan, said)

    @quick_jit
    def run(inputs, wild):
        error = lambda inputs, intervals=None: squared_error(model, SeriesBatch(inputs, targets, weights, intervals))
        given, loss = error(inputs), lambda inputs: error(inputs).loss
        assert given.accuracy is (given + given).accuracy is None and given.means.keys() == {"loss"}
        same = error(inputs - 2, intervals).loss, (given + given).loss
        return given.loss, same, jax.value_and_grad(loss)(wild)

    loss, same, (loss_of_wild, gradient) = jax.device_get(run(inputs, wild))
    misses = np.mean((inputs[..., :2] - 1) ** 2, axis=-1)
    assert float(loss) == pytest.approx(np.average(misses, weights=weights), rel=1e-6)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    assert loss_of_wild == loss
    assert np.isfinite(gradient).all() and not gradient[0, 1].any() and gradient[0, 0].any()


@pytest.mark.parametrize("kind", ["labels", slow("series")])
def test_they_train_in_bfloat16(kind):
    build, task, loss = TASKS[kind]
    trainer = tiny.trainer(build, task=task, loss=loss, compute_dtype=jnp.bfloat16)
    _, metrics = trainer.run(trainer.init())
    assert metrics["loss"].dtype == jnp.float32 and np.isfinite(metrics["loss"]).all()


def test_a_series_is_evaluated_in_double_precision(x64):
    build, task, loss = TASKS["series"]
    given = eqx.filter_eval_shape(lambda: loss(build(jr.key(0)), task.test(np.arange(3, dtype=np.int32))).loss)
    assert given.dtype == jnp.float64


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("devices", [1, 2])
def test_they_go_to_devices_from_the_host(kind, devices):
    examples = jax.device_get(TASKS[kind][1].train(np.arange(9, dtype=np.int32)))
    on_the_host = lambda indices: jax.tree.map(lambda a: a[indices], examples)
    given = to_devices(on_the_host, np.arange(1, 9).reshape(2, 4), make_mesh(2) if devices == 2 else None)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(examples), strict=True):
        np.testing.assert_array_equal(a, b[1:].reshape(2, 4, *b.shape[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_they_train_the_same_on_two_devices_and_in_parts(kind):
    build, task, loss = TASKS[kind]
    runs = []
    for options in ({}, {"mesh": make_mesh(2)}, {"accumulate": 2}):
        trainer = tiny.trainer(build, task=task, loss=loss, **options)
        leaves, metrics = trainer.run(trainer.init())
        runs.append((metrics, trainer.evaluate(leaves)))
    (one, tested), *others = runs
    assert ("accuracy" in one) == (kind == "labels") and one["loss"].shape == (5,)
    assert tested.keys() == ({"loss", "accuracy", "perplexity"} if kind == "labels" else {"loss"})
    for metrics, test in others:
        for name, values in one.items():
            np.testing.assert_allclose(metrics[name], values, rtol=1e-4)
        assert test == pytest.approx(tested, rel=1e-4)


def test_a_series_is_logged_without_what_it_has_not():
    build, task, loss = TASKS["series"]
    trainer = tiny.trainer(build, task=task, loss=loss)
    lengths = {"steps": 10, "eval_every": 10, "log_every": 5, "checkpoint_every": 10}
    result = fit(trainer, **lengths, progress=False)
    assert all(np.isfinite(list(record.values())).all() for record in result.history)
    names = set(result.history[-1])
    assert {"train/loss", "test/loss", "memory/peak_MiB"} <= names
    assert not any("accuracy" in name or "perplexity" in name for name in names)
    assert result.history[-1]["memory/peak_MiB"] <= peak_memory() / 2**20
    assert 10 < peak_memory() / 2**20 < 1e6, "in MiB, of a process"


def test_longer_examples_can_be_evaluated():
    build, task, loss = TASKS["series"]
    trainer = tiny.trainer(build, task=task, loss=loss)
    leaves, longer = trainer.init(), LinearFunctions(2, 9, num_test=20)
    expected = quick_jit(loss)(trainer.model(trainer.unflatten(leaves)), longer.test(np.arange(20, dtype=np.int32)))
    for batch_size in (None, 7):
        found = trainer.evaluate(leaves, task=longer, batch_size=batch_size)
        assert found["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        trainer.evaluate(leaves, batch_size=0)


def test_batches_say_what_they_are_made_of():
    with pytest.raises(TypeError):
        LabelledBatch(np.zeros((2, 3), int), np.zeros((2, 3), int), np.ones(2), np.ones(2, int))
