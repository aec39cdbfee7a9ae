"""The loop: what it records, what is not finite, stopping and going on."""

import copy
import shutil
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from s5eqx.train import (
    Checkpoints,
    Target,
    fit,
    interruption,
    next_token,
    open_run,
)

EVERY = {"eval_every": 10, "log_every": 5, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def trainer():
    return tiny.trainer()


def assert_same_leaves(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if eqx.is_array(a):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def changed(trainer, **methods):
    """A trainer that shares its compiled functions with another one."""
    other = copy.copy(trainer)
    vars(other).update(methods)
    return other


# The loop.


@pytest.mark.smoke
def test_fit_reports_what_happened(trainer, capsys):
    result = fit(trainer, steps=20, progress=True, seconds_before=100.0, **EVERY)
    assert result.step == int(result.state.step) == 20
    assert not result.interrupted
    assert [r["step"] for r in result.history] == [5, 10, 15, 20]
    assert ["test/accuracy" in r for r in result.history] == [False, True, False, True]
    assert 100.0 < result.history[0]["seconds"] < result.history[-1]["seconds"] < result.seconds
    assert result.steps_per_second > 0
    assert result.seconds_to(0.0) == result.history[1]["seconds"]
    assert result.seconds_to(1.1) is None
    leaves = trainer.flatten(result.state)
    assert result.history[-1]["test/loss"] == trainer.evaluate(leaves)["loss"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "20/20" in err
    assert "loss" in err


def test_records_are_means_over_their_steps(trainer):
    history = fit(trainer, steps=20, eval_every=10, log_every=10, checkpoint_every=10, progress=False).history
    leaves, losses = trainer.init(), []
    for _ in range(4):
        leaves, metrics = trainer.run(leaves, None)
        losses.append(np.asarray(metrics["loss"]).mean())
    assert [r["train/loss"] for r in history] == pytest.approx(np.reshape(losses, (2, 2)).mean(axis=1))


def test_a_target_that_is_held_ends_training(trainer):
    always = Target(accuracy=0.0, hold=2)
    result = fit(trainer, steps=100, target=always, progress=False, **EVERY)
    assert (result.step, result.interrupted) == (20, False)


@pytest.mark.parametrize("name", ["steps", "eval_every", "log_every", "checkpoint_every"])
def test_lengths_are_multiples_of_the_dispatch(trainer, name):
    with pytest.raises(ValueError, match=f"{name} must be a multiple .* got 7"):
        fit(trainer, **{"steps": 20, **EVERY, name: 7})


def test_what_is_observed_is_logged(trainer, tmp_path):
    models = []

    def observe(model):
        models.append(model)
        return {"model/size": jnp.float32(model.embedding.size), "sample": "a *text*"}

    run = open_run({}, folder=tmp_path)
    result = fit(trainer, steps=10, run=run, observe=observe, progress=False, **EVERY)
    assert ["model/size" in record for record in result.history] == [False, True]
    assert result.history[-1]["model/size"] == 40.0
    assert "sample" not in result.history[-1]
    (model,) = models
    assert model.dropout.inference
    assert_same_leaves(model.head, result.state.model.head)
    events = EventAccumulator(str(tmp_path)).Reload()
    (sample,) = events.Tensors("sample")
    assert (sample.step, list(sample.tensor_proto.string_val)) == (10, [b"a *text*"])
    assert tensor_util.make_ndarray(events.Tensors("model/size")[0].tensor_proto) == 40.0


@pytest.mark.smoke
def test_a_profile_is_of_the_dispatches_after_the_first(trainer, tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    run = changed(trainer, run=lambda *given: happened.append("run") or trainer.run(*given))
    fit(run, steps=20, run=open_run({}, folder=tmp_path), profile=2, progress=False, **EVERY)
    assert happened == ["run", str(tmp_path), "run", "run", "stop", "run"]
    happened.clear()
    fit(run, steps=10, run=open_run({}, folder=tmp_path, overwrite=True), profile=2, progress=False, **EVERY)
    assert happened == ["run", str(tmp_path), "run", "stop"]  # too short a run has a trace all the same
    with pytest.raises(ValueError, match=r"profile=2 .* needs one"):
        fit(trainer, steps=10, profile=2, **EVERY)


def test_batches_come_from_the_host_while_the_devices_compute(trainer):
    happened = []

    def batches(step):
        happened.append(step)

    def run(leaves, batches):
        happened.append("run")
        return trainer.run(leaves, batches)

    fit(changed(trainer, run=run, batches=batches), steps=15, progress=False, **EVERY)
    assert happened == [0, "run", 5, "run", 10, "run"]


# Numbers that are not finite.


def spoiled(trainer, steps, *, tolerated=0, name="loss"):
    """A trainer whose metric is not finite at these steps."""

    def run(leaves, batches):
        first = int(trainer.unflatten(leaves).step)
        leaves, metrics = trainer.run(leaves, batches)
        bad = np.isin(first + np.arange(5), steps)
        return leaves, metrics | {name: np.where(bad, np.float32(np.nan), metrics[name])}

    return changed(trainer, run=run, skip_nonfinite=tolerated)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_ends_training_and_names_the_batch(trainer, tmp_path, name):
    run = open_run({}, folder=tmp_path)
    message = rf"at step 12 the loss is .*examples 48 to 51; the last good checkpoint is {tmp_path}/checkpoints/10\. "
    with pytest.raises(FloatingPointError, match=message):
        fit(spoiled(trainer, [12], name=name), steps=20, run=run, progress=False, **EVERY)
    with pytest.raises(FloatingPointError, match=r"at step 0 .* there is no checkpoint\. "):
        fit(spoiled(trainer, [0], name=name), steps=20, progress=False, **EVERY)


def test_weights_that_are_not_finite_are_not_saved(trainer, tmp_path):
    def run(leaves, batches):
        leaves, metrics = trainer.run(leaves, batches)
        state = trainer.unflatten(leaves)
        scale = jnp.where(state.step == 10, jnp.inf, 1.0)
        return trainer.flatten(eqx.tree_at(lambda s: s.model.embedding, state, state.model.embedding * scale)), metrics

    with pytest.raises(FloatingPointError, match=r"after 10 steps one is not; the last good checkpoint is .*/5\. "):
        fit(changed(trainer, run=run), steps=20, run=open_run({}, folder=tmp_path), progress=False, **EVERY)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]


def test_some_in_a_row_are_passed_over(trainer):
    result = fit(spoiled(trainer, [3, 6, 7], tolerated=2), steps=10, progress=False, **EVERY)
    assert [record["train/skipped"] for record in result.history] == [1, 2]
    plain = fit(trainer, steps=10, progress=False, **{**EVERY, "log_every": 5}).history
    leaves, losses = trainer.init(), []
    for _ in range(2):
        leaves, metrics = trainer.run(leaves, None)
        losses.append(metrics["loss"])
    assert result.history[1]["train/loss"] == pytest.approx(np.asarray(losses[1])[[0, 3, 4]].mean())
    assert result.history[1]["train/perplexity"] == pytest.approx(np.exp(result.history[1]["train/loss"]))
    assert result.history[0]["train/loss"] != plain[0]["train/loss"]
    with pytest.raises(FloatingPointError, match=r"at step 6 .* after 2 such steps in a row"):
        fit(spoiled(trainer, [4, 5, 6], tolerated=2), steps=10, progress=False, **EVERY)


def test_a_resumed_run_remembers_how_many_were_in_a_row(trainer, tmp_path):
    run = open_run({}, folder=tmp_path)
    fit(spoiled(trainer, [3, 4], tolerated=2), steps=5, run=run, progress=False, **EVERY)
    run = open_run({}, folder=tmp_path, resume=True)
    with pytest.raises(FloatingPointError, match="at step 5 "):
        fit(spoiled(trainer, [5], tolerated=2), steps=10, run=run, progress=False, **EVERY)


def test_the_weights_stay_where_a_gradient_is_not_finite():
    def loss(model, batch, *, key):
        score = next_token(model, batch, key=key)
        is_bad = batch.inputs[0, 0] == 3  # at some steps
        return eqx.tree_at(lambda s: s.total, score, jnp.where(is_bad, jnp.nan, 1.0) * score.total)

    trainer = tiny.trainer(loss=loss, steps_per_dispatch=1, skip_nonfinite=20)
    leaves, seen = trainer.init(), set()
    for _ in range(12):
        before = np.array(trainer.unflatten(leaves).model.embedding)
        leaves, metrics = trainer.run(leaves, None)
        after = np.array(trainer.unflatten(leaves).model.embedding)
        seen.add((bool(np.isfinite(metrics["grad_norm"][0])), np.array_equal(before, after)))
        assert np.isfinite(after).all()
    assert {(True, False), (False, True)} <= seen
    assert (False, False) not in seen


# Resuming.


@pytest.mark.smoke
def test_a_new_best_is_saved_and_comes_back(trainer, tmp_path):
    losses = iter([0.9, 0.5, 0.7, 0.6])
    evaluate = lambda leaves: {"loss": next(losses), "accuracy": 0.5, "perplexity": 1.0}
    every = {"eval_every": 5, "log_every": 5, "checkpoint_every": 20}
    run = open_run({}, folder=tmp_path)
    result = fit(changed(trainer, evaluate=evaluate), steps=20, run=run, keep=1, progress=False, **every)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.best(), checkpoints.steps()) == (10, [10, 20])
    half = fit(trainer, steps=10, progress=False, **EVERY)
    assert_same_leaves(result.best, half.state)
    assert (result.best_value("loss"), int(result.state.step)) == (0.5, 20)
    assert half.best is half.state and half.best_value("loss") == half.history[-1]["test/loss"]

    shutil.rmtree(tmp_path / "checkpoints/10/state")
    with pytest.warns(UserWarning, match="checkpoints/10 is damaged and will not be used"):
        again = fit(trainer, steps=20, run=open_run({}, folder=tmp_path, resume=True), progress=False, **every)
    assert again.best is again.state, "what is damaged is not the best"


def test_a_resumed_run_ends_with_the_same_bits(trainer, tmp_path):
    folders = {name: tmp_path / name for name in ("whole", "half")}
    whole = fit(trainer, steps=10, run=open_run({}, folder=folders["whole"]), progress=False, **EVERY)
    fit(trainer, steps=5, run=open_run({}, folder=folders["half"]), progress=False, **EVERY)
    run = open_run({}, folder=folders["half"], resume=True)
    resumed = fit(tiny.trainer(), steps=10, run=run, progress=False, **EVERY)
    assert_same_leaves(resumed.state, whole.state)
    assert [r["step"] for r in resumed.history] == [5, 10]
    last = lambda result: {k: v for k, v in result.history[-1].items() if k[:5] in ("train", "test/")}
    assert last(resumed) == last(whole)
    assert resumed.history[-1]["seconds"] > resumed.history[0]["seconds"]


def test_a_record_may_be_half_done_when_a_run_stops(trainer, tmp_path):
    every = {"eval_every": 20, "log_every": 10, "checkpoint_every": 5}
    whole = fit(trainer, steps=20, progress=False, **every)
    raises = changed(trainer, run=lambda leaves, batches: trainer.run(leaves, batches) if next(left) else 1 / 0)
    left = iter([True, True, True, False])
    with pytest.raises(ZeroDivisionError):
        fit(raises, steps=20, run=open_run({}, folder=tmp_path), progress=False, **every)
    resumed = fit(trainer, steps=20, run=open_run({}, folder=tmp_path, resume=True), progress=False, **every)
    assert_same_leaves(resumed.state, whole.state)
    timeless = lambda result: [{k: v for k, v in r.items() if k[:2] not in ("se", "sp", "me")} for r in result.history]
    assert timeless(resumed) == timeless(whole)


def test_a_finished_run_resumes_to_its_end(trainer, tmp_path):
    done = fit(trainer, steps=10, run=open_run({}, folder=tmp_path / "run"), progress=False, **EVERY)
    run = open_run({}, folder=tmp_path / "run", resume=True)
    again = fit(trainer, steps=10, run=run, progress=False, **EVERY)
    assert_same_leaves(again.state, done.state)
    assert again.history == done.history


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(trainer, tmp_path, number):
    every = {**EVERY, "checkpoint_every": 10}
    before = signal.getsignal(number)

    def run(leaves, batches):
        signal.raise_signal(number)
        return trainer.run(leaves, batches)

    result = fit(changed(trainer, run=run), steps=10, run=open_run({}, folder=tmp_path), progress=False, **every)
    assert signal.getsignal(number) is before
    assert (result.interrupted, result.step) == (True, 5)
    run = open_run({}, folder=tmp_path, resume=True)
    resumed = fit(trainer, steps=10, run=run, progress=False, **every)
    assert_same_leaves(resumed.state, fit(trainer, steps=10, progress=False, **every).state)
    assert [r["step"] for r in resumed.history] == [5, 10]


@pytest.fixture
def ctrl_c_interrupts():
    """Also in a process that a shell started in the background, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(ctrl_c_interrupts):
    with pytest.raises(KeyboardInterrupt), interruption() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_between_two_trainings_stops_the_next(trainer, ctrl_c_interrupts):
    with interruption() as asked:
        signal.raise_signal(signal.SIGINT)
        result = fit(trainer, steps=10, progress=False, **EVERY)
    assert asked and (result.interrupted, result.step) == (True, 0)
    assert not fit(trainer, steps=5, progress=False, **EVERY).interrupted


def test_the_checkpoint_says_what_it_is(trainer, tmp_path):
    fit(trainer, steps=5, run=open_run({"lr": 0.1}, folder=tmp_path), progress=False, **EVERY)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        _, metadata = checkpoints.restore(trainer.skeleton)
    assert metadata["settings"] == {"lr": 0.1}
    assert {"jax", "equinox", "python", "device"} <= metadata["versions"].keys()
