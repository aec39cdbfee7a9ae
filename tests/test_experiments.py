"""The experiments and the README's example, started as the README starts them, in tiny sizes."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments/assoc_recall.py"
TINY = shlex.split(
    "--vocab-size 6 --length 8 --width 16 --num-layers 1 --mlp-width 16 --state-size 8 --num-blocks 2 --batch-size 32 "
    "--steps-per-dispatch 50 --eval-every 100 --log-every 50 --checkpoint-every 100 --num-test 20 --warmup 10"
)


def start(*words, folder, **options):
    # One device, as a user has; and from a folder without a source tree to import by mistake.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, **options)


def run(*words, folder):
    process = start(*words, folder=folder, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def test_assoc_recall_learns_and_says_so(tmp_path):
    code, output, errors = run(SCRIPT, *TINY, "--steps", 300, "--run", "here", folder=tmp_path)
    assert code == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert result == json.loads((tmp_path / "here/result.json").read_text())
    assert {"test_loss", "seconds", "seconds_to_99", "commit", "versions"} <= result.keys()
    assert result["steps"] == 300 and result["settings"]["vocab_size"] == 6
    assert result["test_accuracy"] > 0.75, "chance is a half"
    assert result["steps_per_second"] > 0
    assert "expected" in output
    assert (tmp_path / "here/curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "here").glob("events.out.tfevents.*"))

    code, _, errors = run(SCRIPT, *TINY, "--steps", 300, "--run", "here", folder=tmp_path)
    assert code != 0 and "holds another run" in errors and "Traceback" not in errors
    code, output, errors = run(SCRIPT, *TINY, "--steps", 300, "--run", "here", "--resume", folder=tmp_path)
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1])["test_loss"] == result["test_loss"]


def test_assoc_recall_stopped_prints_the_command_that_continues(tmp_path):
    process = start(SCRIPT, *TINY, "--steps", 1_000_000, folder=tmp_path, stderr=subprocess.DEVNULL)
    folder = tmp_path / re.match(r"run in (\S+),", process.stdout.readline())[1]
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/*00")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    command = shlex.split(output.splitlines()[-1])
    assert command[0] == "python" and command[-1] == "--resume" and command[command.index("--run") + 1] in str(folder)
    code, _, errors = run(*command[1:], "--lr", 0.5, folder=tmp_path)
    assert code != 0 and "lr was" in errors, "a run resumes with its own settings"


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["30-20"], "unknown preset '30-20'; there are 20-10"),
        (["--vocab-size", "3"], "vocab_size must be at least 4, got 3"),
        (["--num-blocks", "5"], "32"),
        (["--order", "1"], "order must be at least 2"),
    ],
)
def test_assoc_recall_refuses(words, complaint, tmp_path):
    code, _, errors = run(SCRIPT, *words, folder=tmp_path)
    assert code != 0 and complaint in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "script, words, complaint",
    [
        ("bench_scan", "--repeats 0", "repeats must be at least 1, got 0"),
        ("bench_scan", "--json nowhere/out.json", "json must be a file in a folder that exists, got nowhere/out.json"),
        ("bench_layer", "--shapes 2 0 8 4", r"shapes must be at least 1, got \(\(2, 0, 8, 4\),\)"),
        ("bench_layer", "--long 0", "long must be at least 1"),
        ("bench_layer", "--shapes", "shapes must have at least one entry"),
        ("bench_layer", "--plot .", "plot must be a file"),
        ("bench_train", "--lengths 64 3", r"lengths must be at least 4, got \(64, 3\)"),
        ("bench_train", "--tokens 0", "tokens must be at least 1"),
        ("bench_train", "--chunk 0", "chunk must be at least 1"),
        ("bench_train", "--plot nowhere/out.png", "plot must be a file in a folder that exists"),
    ],
)
def test_benchmarks_refuse(script, words, complaint, tmp_path, monkeypatch):
    """At once, before a process is started that would find out later."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match=complaint):
        module.main(tyro.cli(module.Settings, args=words.split()))


@pytest.mark.slow
def test_benchmarks_run(tmp_path):
    words = ("--lengths", 64, "--chunk", 16, "--repeats", 1, "--tokens", 10, "--json", "out.json", "--plot", "out.png")
    code, output, errors = run(ROOT / "experiments/bench_train.py", *words, folder=tmp_path)
    assert code == 0, errors
    assert "lax.scan" in output and output.count("as written") == 4
    short, long = json.loads((tmp_path / "out.json").read_text())["training"]
    assert long["seconds"].keys() == {*short["seconds"], "in pieces"}
    assert all(error < 1e-3 for row in (short, long) for error in row["loss_error"].values())
    assert all(part["seconds"] > 0 for part in long["parts"].values()) and "the rest" in output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_layer_is_measured(tmp_path):
    words = ("--shapes", 2, 200, 8, 4, "--long", 2000, "--repeats", 1, "--json", "out.json", "--plot", "out.png")
    code, output, errors = run(ROOT / "experiments/bench_layer.py", *words, folder=tmp_path)
    assert code == 0, errors
    assert output.count("forward + backward") == 2 and "relative error" in output
    assert json.loads((tmp_path / "out.json").read_text()).keys() >= {"tuned", "default"}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_mixer_trains(tmp_path):
    words = ("--json", "out.json", "--", *TINY, "--steps", 200)
    code, output, errors = run(ROOT / "experiments/compare_mixers.py", *words, folder=tmp_path)
    assert code == 0, errors
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 8 and all(f"| {mixer} |" in output for mixer in results)
    for mixer, result in results.items():
        assert result["settings"]["mixer"] == mixer
        assert result["test_loss"] < 1.0, "at the start it is above 1.7"


def example_of_the_readme(number):
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[number]


def test_the_example_of_the_readme(tmp_path):
    (tmp_path / "example.py").write_text(example_of_the_readme(0))
    code, output, errors = run("example.py", folder=tmp_path)
    assert code == 0, errors
    assert float(output.splitlines()[0]) < 1e-5


@pytest.mark.slow
def test_the_hybrid_of_the_readme(tmp_path):
    (tmp_path / "hybrid.py").write_text(example_of_the_readme(1) + "print(len(model.backbone.blocks))\n")
    code, output, errors = run("hybrid.py", folder=tmp_path)
    assert code == 0, errors
    assert output == "12\n"
