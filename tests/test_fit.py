"""The loop and its files: checkpoints, logs, run folders, stopping and going on."""

import copy
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from s5eqx.train import Checkpoints, Logger, Target, commit, fit, interruption, open_run

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
        leaves, metrics = trainer.run(leaves)
        losses.append(np.mean(metrics["loss"]))
    assert [r["train/loss"] for r in history] == pytest.approx(np.reshape(losses, (2, 2)).mean(axis=1))


def test_a_target_that_is_held_ends_training(trainer):
    always = Target(accuracy=0.0, hold=2)
    result = fit(trainer, steps=100, target=always, progress=False, **EVERY)
    assert (result.step, result.interrupted) == (20, False)


@pytest.mark.parametrize("name", ["steps", "eval_every", "log_every", "checkpoint_every"])
def test_lengths_are_multiples_of_the_dispatch(trainer, name):
    with pytest.raises(ValueError, match=f"{name} must be a multiple .* got 7"):
        fit(trainer, **{"steps": 20, **EVERY, name: 7})


def test_a_loss_that_is_not_finite_ends_training(trainer):
    broken = changed(
        trainer, init=lambda: jax.tree.map(lambda x: x * jnp.asarray(jnp.nan, x.dtype) if x.ndim else x, trainer.init())
    )
    with pytest.raises(FloatingPointError, match="at step 0 it is nan"):
        fit(broken, steps=20, progress=False, **EVERY)


# Resuming.


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

    def run(leaves):
        signal.raise_signal(number)
        return trainer.run(leaves)

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


# Checkpoints.


def state(scale=1.0):
    return {
        "weights": jnp.arange(6.0).reshape(2, 3) * scale,
        "half": jnp.full((4,), 1 / 3, jnp.bfloat16) * jnp.bfloat16(scale),
        "count": jnp.int32(7),
        "name": "not an array",
    }


def save_three(folder, keep=3):
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state(step), {"step": step})


def restore(folder, like=None):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(eqx.filter_eval_shape(state) if like is None else like)


def data_files(folder):
    return [p for p in pathlib.Path(folder).rglob("*") if p.is_file() and p.parent.name == "d"]


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_three(tmp_path / "checkpoints")
    found, metadata = restore(tmp_path / "checkpoints")
    assert_same_leaves(found, state(30))
    assert found["name"] == "not an array"
    assert metadata == {"step": 30}
    assert restore(tmp_path / "none") is None


def test_the_newest_are_kept(tmp_path):
    save_three(tmp_path, keep=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [20, 30]
        checkpoints.save(15, state(15), {})  # a run that went back writes its future anew
        assert checkpoints.steps() == [15]


def flip_a_byte(folder):
    for file in data_files(folder):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def cut(folder):
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[:20])


def lose_arrays(folder):
    shutil.rmtree(folder / "state")


def lose_metadata(folder):
    shutil.rmtree(folder / "metadata")


def spoil_metadata(folder):
    (folder / "metadata" / "metadata").write_text('{"leaves": [')


@pytest.mark.parametrize("damage", [flip_a_byte, cut, lose_arrays, lose_metadata, spoil_metadata])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    save_three(tmp_path)
    damage(tmp_path / "30")
    with pytest.warns(UserWarning, match=r"checkpoint .*/30 is damaged"):
        found, metadata = restore(tmp_path)
    assert_same_leaves(found, state(20))
    assert metadata == {"step": 20}


def test_if_all_are_damaged_it_is_an_error(tmp_path):
    save_three(tmp_path)
    for step in ("10", "20", "30"):
        cut(tmp_path / step)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(steps \[10, 20, 30\]\)"),
    ):
        restore(tmp_path)


def test_a_save_that_was_killed_is_not_there(tmp_path):
    save_three(tmp_path)
    shutil.move(tmp_path / "30", tmp_path / "30.orbax-checkpoint-tmp-1")
    assert restore(tmp_path)[1] == {"step": 20}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": jnp.zeros((2, 4))}, r"\['weights'\]: float32\[2, 4\], but .* \['weights'\]: float32\[2, 3\]"),
        ({"half": jnp.zeros(4)}, r"must be \['half'\]: float32\[4\], but .*bfloat16\[4\]"),
        ({"wider": jnp.zeros(4)}, r"must be \['wider'\]: float32\[4\], but the checkpoint has nothing"),
    ],
)
def test_another_model_is_refused_by_its_first_differing_leaf(tmp_path, change, message):
    save_three(tmp_path)
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, state() | change)


def test_the_checkpoint_says_what_it_is(trainer, tmp_path):
    fit(trainer, steps=5, run=open_run({"lr": 0.1}, folder=tmp_path), progress=False, **EVERY)
    _, metadata = restore(tmp_path / "checkpoints", trainer.skeleton)
    assert metadata["settings"] == {"lr": 0.1}
    assert {"jax", "equinox", "python", "device"} <= metadata["versions"].keys()


# Logs.


def test_scalars_and_tables_are_read_back(tmp_path):
    with Logger(tmp_path) as logger:
        logger.scalars(3, {"train/loss": 0.5, "lr/rest": 1e-3})
        logger.scalars(4, {"train/loss": 0.25})
        logger.table("settings", {"width": 64, "name": "s5"})
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors("train/loss")]
    assert points == [(3, 0.5), (4, 0.25)]
    (table,) = events.Tensors("settings")
    assert b"| width | 64 |\n| name | s5 |" in table.tensor_proto.string_val[0]


def test_logging_needs_no_tensorflow_and_the_library_no_training(tmp_path):
    code = (
        "import sys, s5eqx; assert 's5eqx.train' not in sys.modules and 'optax' not in sys.modules\n"
        "import s5eqx.train; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# The run's folder.


def test_a_fresh_run_has_a_folder_of_its_own(tmp_path):
    runs = [open_run({"lr": 0.1}, parent=tmp_path, stem="recall") for _ in range(3)]
    assert len({run.folder for run in runs}) == 3
    assert all(run.folder.name.startswith("recall-") and not run.resumed for run in runs)
    page = json.loads((runs[0].folder / "settings.json").read_text())
    assert page["settings"] == {"lr": 0.1}
    assert "jax" in page["versions"]


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    open_run({"lr": 0.1}, folder=folder)
    (folder / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another run"):
        open_run({"lr": 0.1}, folder=folder)
    assert open_run({"lr": 0.1}, folder=folder, resume=True).resumed
    assert (folder / "result.json").exists()
    run = open_run({"lr": 0.2}, folder=folder, overwrite=True)
    assert not run.resumed
    assert [p.name for p in folder.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not of a run"):
        open_run({}, folder=tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file"):
        open_run({}, folder=tmp_path / "thesis.tex", overwrite=overwrite)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": {"width": 32}, "lr": 0.1}, r"model\.width was 64 and is now 32"),
        ({"model": {"width": 64}}, "lr was 0.1 and is now 'absent'"),
        ({"model": {"width": 64}, "lr": 0.1, "seed": 1}, "seed was 'absent' and is now 1"),
    ],
)
def test_a_run_resumes_with_its_own_settings(tmp_path, settings, message):
    open_run({"model": {"width": 64}, "lr": 0.1}, folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        open_run(settings, folder=tmp_path, resume=True)


def test_resume_and_overwrite_need_a_run(tmp_path):
    with pytest.raises(ValueError, match="name its folder"):
        open_run({}, resume=True)
    with pytest.raises(ValueError, match="choose one"):
        open_run({}, folder=tmp_path, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        open_run({}, folder=tmp_path / "none", resume=True)


def test_a_commit_is_of_the_tree_of_the_file(tmp_path):
    assert commit(tmp_path / "script.py") is None
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    git("init")
    (tmp_path / "script.py").write_text("")
    assert commit(tmp_path / "script.py") is None
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    name = commit(tmp_path / "script.py")
    assert len(name) == 40
    (tmp_path / "script.py").write_text("changed")
    assert commit(tmp_path / "script.py") == f"{name}-dirty"
