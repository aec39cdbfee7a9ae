"""The files of a run: its logs, and the folder that it has for itself."""

import json
import pathlib
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from s5eqx.train import Logger, commit, open_run, resume_command


@pytest.mark.smoke
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


@pytest.mark.slow
def test_logging_needs_no_tensorflow_and_the_library_no_training(tmp_path):
    code = (
        "import sys, s5eqx; assert 's5eqx.train' not in sys.modules and 'optax' not in sys.modules\n"
        "import s5eqx.train; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


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


@pytest.mark.smoke
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


@pytest.mark.smoke
@pytest.mark.parametrize(
    "given, expected",
    [
        (["20-10", "--lr", "0.1"], "python x.py 20-10 --lr 0.1 --run 'runs/a b' --resume"),
        (["--run", "runs/c", "--overwrite"], "python x.py --run runs/c --resume"),
        (["--run=runs/c", "--resume", "--data", "a b"], "python x.py --run=runs/c --data 'a b' --resume"),
    ],
)
def test_the_command_that_continues_a_run(given, expected):
    assert resume_command(pathlib.Path("runs/a b"), ["x.py", *given]) == expected


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
