"""The comparison of operators as a process: it trains, goes on where it was stopped, and refuses in one line."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time

import pytest
from scripts import ROOT, run, start

from s5eqx.interop import load
from s5eqx.models import FNO
from s5eqx.nn import TransformOnce

SCRIPT = ROOT / "experiments/operators.py"
TINY = shlex.split(
    "--burgers-width 6 --burgers-band 8 --heat-width 8 --heat-band 4 --fno-layers 2 --t1-layers 3 --num-examples 60 "
    "--num-test 20 --steps 120 --eval-every 40 --checkpoint-every 40 --warmup 5 --steps-per-dispatch 10 --repeats 1"
)


@pytest.mark.slow
def test_both_models_learn_both_operators(tmp_path):
    """Errors fall, the table has a line for each, and the finer grid is no surprise to Transform Once."""
    code, output, errors = run(SCRIPT, *TINY, "--run", "here", "--plot", "picture.png", folder=tmp_path)
    assert code == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert len(result["models"]) == 4
    for cell, found in result["models"].items():
        curve = [error for _, error in found["curve"]]
        assert len(curve) == 3 and found["error"] == curve[-1] < 0.99 * curve[0], cell
        equation, model, _ = cell.split()
        assert result["milliseconds"][equation][model]["step"] > 0
        assert f"{found['error']:.4f} | {found['error_on_fine_grid']:.4f} |" in output
        if model == "t1":
            assert found["error_on_fine_grid"] == pytest.approx(found["error"], rel=1e-4)
            other = result["models"][f"{equation} fno 0"]["parameters"]
            assert 0.9 * other < found["parameters"] <= other
    assert len(re.findall(r"^\| (burgers|heat) \| (Transform Once|FNO) \| ", output, re.M)) == 4
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "here/operators.md").read_text() in output
    assert isinstance(load(tmp_path / "here/heat-t1-0/model.safetensors"), TransformOnce)
    assert isinstance(load(tmp_path / "here/heat-fno-0/model.safetensors"), FNO)


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(tmp_path):
    """Finished models are kept, and the one that was broken off ends as it would have; the command to do so is told."""
    words = [
        *TINY,
        *shlex.split(
            "--equations burgers --models t1 --seeds 2 --steps 4000 --eval-every 2000 --checkpoint-every 100 --run"
        ),
    ]
    code, output, errors = run(SCRIPT, *words, "whole", folder=tmp_path)
    assert code == 0, errors
    expected = json.loads(output.splitlines()[-1])["models"]
    assert " ± " in output

    process = start(SCRIPT, *words, "parts", folder=tmp_path, stderr=subprocess.DEVNULL)
    first, second = (tmp_path / "parts" / name for name in ("burgers-t1-0/result.json", "burgers-t1-1/checkpoints"))
    while not (first.exists() and second.exists() and any(second.iterdir())) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped at step" in output
    assert not (tmp_path / "parts/result.json").exists()
    then = os.stat(first).st_mtime_ns
    command = shlex.split(output.splitlines()[-1])
    assert command[-1] == "--resume"
    code, output, errors = run(*command[1:], folder=tmp_path)
    assert code == 0, errors
    assert os.stat(first).st_mtime_ns == then
    found = json.loads(output.splitlines()[-1])["models"]
    assert {cell: result["error"] for cell, result in found.items()} == {c: r["error"] for c, r in expected.items()}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "words, said",
    [
        ("--burgers-resolution 96", "resolution must divide the 256 points of the solver, got 96"),
        ("--heat-resolution 16", "resolution must be at least 32"),
        ("--burgers-band 70", "modes must lie between 1 and what the grid has along each axis, (65,)"),
        ("--models", "models must be at least one, and each of them once, got ()"),
        ("--equations heat heat", "equations must be at least one, and each of them once"),
        ("--seeds 0", "seeds must be at least 1, got 0"),
        ("--repeats 0", "repeats must be at least 1, got 0"),
        ("--t1-layers 1", "num_layers must be at least 2"),
        ("--fno-layers 0", "num_layers must be at least 1; got 0"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--num-test 0", "num_test must be above 0, got 0"),
        ("--steps 110", "steps must be a multiple of the trainer's steps_per_dispatch=20, got 110"),
        ("--plot nowhere/picture.png", "plot must be a file in a folder that exists"),
        ("--resume", "name its folder"),
    ],
)
def test_refused_in_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *shlex.split(words)])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not list(tmp_path.iterdir())
    said_all = str(error.value)
    assert said in said_all and said_all.startswith("error: ") and "\n" not in said_all
