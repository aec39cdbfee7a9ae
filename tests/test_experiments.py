"""The experiments and the README's example, started as the README starts them, in tiny sizes."""

import contextlib
import functools
import importlib
import io
import json
import re
import shlex
import signal
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from helpers import quick_jit, slow
from scripts import ROOT, run, run_here

from s5eqx.data import AssocRecall
from s5eqx.interop import load

SCRIPT = ROOT / "experiments/assoc_recall.py"
TINY = shlex.split(
    "--vocab-size 6 --length 8 --width 16 --num-layers 1 --mlp-width 16 --state-size 8 --num-blocks 2 --batch-size 32 "
    "--steps-per-dispatch 50 --eval-every 100 --log-every 50 --checkpoint-every 100 --num-test 20 --warmup 10"
)
RUN = (*TINY, "--steps", 300, "--run", "here")
in_one_process = pytest.mark.xdist_group("assoc_recall")


@pytest.fixture(scope="module", params=["here", slow("as a process")])
def trained(request, tmp_path_factory):
    """The folder of a finished run, its output and its result."""
    folder = tmp_path_factory.mktemp("trained")
    if request.param == "here":
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            run_here(patch, SCRIPT, *RUN, folder=folder)
        output = printed.getvalue()
    else:
        code, output, errors = run(SCRIPT, *RUN, folder=folder)
        assert code == 0, errors
    return folder, output, json.loads(output.splitlines()[-1])


@in_one_process
def test_assoc_recall_learns_and_says_so(trained):
    folder, output, result = trained
    assert result == json.loads((folder / "here/result.json").read_text())
    assert {"test_loss", "seconds", "seconds_to_99", "commit", "versions"} <= result.keys()
    assert result["steps"] == 300 and result["settings"]["vocab_size"] == 6
    assert result["test_accuracy"] > 0.75, "chance is a half"
    assert result["steps_per_second"] > 0
    assert "expected" in output
    assert (folder / "here/curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "here").glob("events.out.tfevents.*"))
    batch = AssocRecall(6, 8, num_test=20).test(jnp.arange(20))
    logits = quick_jit(jax.vmap(load(folder / "here/model.safetensors").__call__))(batch.inputs)
    right = np.argmax(logits[:, -1], axis=-1) == batch.targets[:, -1]
    assert np.mean(right) == pytest.approx(result["test_accuracy"]), "the file holds the trained model"


@in_one_process
def test_assoc_recall_that_has_ended_says_so_again(trained, monkeypatch, capsys):
    folder, _, result = trained
    again = functools.partial(run_here, monkeypatch, SCRIPT, *RUN, folder=folder)
    with pytest.raises(SystemExit, match="holds another run"):
        again()
    again("--resume")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["test_loss"] == result["test_loss"]


def test_assoc_recall_stopped_prints_the_command_that_continues(tmp_path, monkeypatch, capsys):
    def stop():
        while not ended.wait(0.1):
            if list(tmp_path.rglob("checkpoints/*00")):
                return signal.raise_signal(signal.SIGTERM)

    ended = threading.Event()
    threading.Thread(target=stop).start()
    try:
        run_here(monkeypatch, SCRIPT, *TINY, "--steps", 20_000, folder=tmp_path)
    finally:
        ended.set()
    output = capsys.readouterr().out
    command, folder = shlex.split(output.splitlines()[-1]), re.match(r"run in (\S+),", output)[1]
    assert command[0] == "python" and command[-1] == "--resume" and command[command.index("--run") + 1] in folder
    with pytest.raises(SystemExit, match="lr was"):  # a run resumes with its own settings
        run_here(monkeypatch, *command[1:], "--lr", 0.5, folder=tmp_path)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "words, complaint",
    [
        (["30-20"], "unknown preset '30-20'; there are 20-10"),
        (["--vocab-size", "3"], "vocab_size must be at least 4, got 3"),
        (["--num-blocks", "5"], "32"),
        (["--order", "1"], "order must be at least 2"),
    ],
)
def test_assoc_recall_refuses(words, complaint, tmp_path, monkeypatch):
    """In one line, before it makes a folder."""
    with pytest.raises(SystemExit, match=complaint):
        run_here(monkeypatch, SCRIPT, *words, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.smoke
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
        ("bench_generate", "--lengths 64 0", r"lengths must be at least 1, got \(64, 0\)"),
        ("bench_conv", "--lengths", "lengths must have at least one entry"),
        ("bench_conv", "--channels 0", "channels must be at least 1, got 0"),
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
def test_generation_is_measured(tmp_path):
    words = ("--lengths", 64, 100, "--width", 8, "--layers", 1, "--order", 2, "--repeats", 1)
    words += ("--json", "out.json", "--plot", "out.png")
    code, output, errors = run(ROOT / "experiments/bench_generate.py", *words, folder=tmp_path)
    assert code == 0, errors
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [64, 100]
    assert all(f"| {name} |" in output and seconds > 0 for row in rows for name, seconds in row["seconds"].items())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_convolutions_are_measured(tmp_path):
    words = ("--lengths", 60, 100, "--channels", 3, "--batch", 2, "--repeats", 1)
    words += ("--json", "out.json", "--plot", "out.png")
    code, output, errors = run(ROOT / "experiments/bench_conv.py", *words, folder=tmp_path)
    assert code == 0, errors
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [60, 100] and output.count("\n| 100 |") == 5
    for row in rows:
        assert all(error < 2e-6 for error in row["error"].values())
        assert all(value > 0 for name in ("value", "gradients") for value in row[name]["seconds"].values())
        assert any(name in row["measured"] for name in ("FFT", "Monarch"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def example_of_the_readme(number):
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[number]


@pytest.mark.slow
def test_the_example_of_the_readme(tmp_path, monkeypatch, capsys):
    (tmp_path / "example.py").write_text(example_of_the_readme(0))
    run_here(monkeypatch, "example.py", folder=tmp_path)
    assert float(capsys.readouterr().out.splitlines()[0]) < 1e-5


@pytest.mark.slow
def test_the_fields_of_the_readme(tmp_path):
    (tmp_path / "fields.py").write_text(example_of_the_readme(-1) + "print(logits.shape)\n")
    code, output, errors = run("fields.py", folder=tmp_path)
    assert code == 0, errors
    assert output == "(64, 64, 1) (128, 128, 1)\n(10,)\n"


@pytest.mark.slow
def test_the_hybrid_of_the_readme(tmp_path):
    (tmp_path / "hybrid.py").write_text(example_of_the_readme(1) + "print(len(model.backbone.blocks))\n")
    code, output, errors = run("hybrid.py", folder=tmp_path)
    assert code == 0, errors
    assert output == "12\n"


@pytest.mark.slow
def test_the_generation_of_the_readme(tmp_path):
    """Its last lines: what is the same for a batch and a stream, and how well the filters came out."""
    lines = "\nprint()\nprint(''.join(map(chr, tokens[0])))\nprint(max(error.max() for error in errors.values()))\n"
    (tmp_path / "example.py").write_text(example_of_the_readme(2) + lines)
    code, output, errors = run("example.py", folder=tmp_path)
    assert code == 0, errors
    text, error = output.rstrip("\n").rsplit("\n", 1)
    assert 0 < float(error) < 1
    scores = re.search(r"\[(-\d+\.\d+) +(-\d+\.\d+) *\]", text)
    assert scores and all(float(score) < -100 for score in scores.groups())
