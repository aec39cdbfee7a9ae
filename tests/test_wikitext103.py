"""Language modelling on text and its comparison, started as the README starts them, in tiny sizes."""

import importlib
import json
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from scripts import ROOT, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from s5eqx.data import load_text, read_corpus, read_tokenizer
from s5eqx.interop import load
from s5eqx.train import score

SCRIPT = ROOT / "experiments/wikitext103.py"
TINY = shlex.split(
    "--width 8 --num-layers 1 --mlp-width 16 --state-size 8 --num-blocks 2 --num-heads 1 --length 16 --batch-size 8 "
    "--warmup 5 --lr 0.02 --steps-per-dispatch 10 --log-every 10 --eval-every 20 --checkpoint-every 20 "
    "--data texts/*.txt --tokenizer bpe-300 --cache cache"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a corpus, and with the scripts to import."""
    words = ["the", "state", "of", "a", "model", "is", "written", "slowly", "and", "read", "at", "once,", "é"]
    draw = random.Random(1)
    (tmp_path / "texts").mkdir()
    for number in range(24):
        text = "\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(3))
        (tmp_path / f"texts/{number:02}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return tmp_path


def end(process):
    """The lines that it prints."""
    output, errors = process.communicate(timeout=480)
    assert process.returncode == 0, errors
    return output.splitlines()


def train(*words, devices=1):
    return json.loads(end(start(SCRIPT, *words, devices=devices))[-1])


def main(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
    importlib.import_module(script).main()


@pytest.mark.slow
def test_it_trains_and_says_so(here):
    result = train(*TINY, "--steps", 40, "--run", "run", "--sample-tokens", 5)
    assert result == json.loads(Path("run/result.json").read_text())
    (_, before), (last, after) = result["validation_curve"]
    assert last == 40 and after < before < 300, "a model that knows nothing has 300"
    assert result["validation_perplexity"] == after and result["best_step"] == 40
    assert result["settings"]["tokenizer"] == "bpe-300" and "without overlap" in result["settings"]["perplexity"]
    assert Path("run/curve.png").read_bytes().startswith(b"\x89PNG")

    # What the files hold gives the perplexity of the test part, over all of its tokens but the first.
    tokenizer = read_tokenizer("run/tokenizer.json")
    text = load_text(read_corpus("texts/*.txt"), tokenizer, length=16, cache="cache", progress=False)
    model, batch = load("run/model.safetensors"), text.test.test(np.arange(text.test.num_test))
    assert batch.weights.sum() == len(text.tokens["test"].array) - 1
    total = score(jax.jit(jax.vmap(model))(batch.inputs), batch.targets, batch.weights)
    assert float(total.loss) == pytest.approx(result["test_loss"], rel=1e-5)
    bits = result["test_loss"] / np.log(2) * len(text.tokens["test"].array) / text.tokens["test"].bytes
    assert result["test_bits_per_byte"] == pytest.approx(bits)

    written = {}
    for file in Path("run").glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["tensors"]:
            written[tag] = [tensor_util.make_ndarray(event.tensor_proto) for event in events.Tensors(tag)]
    curves = {"train/loss", "validation/perplexity", "train/grad_norm", "speed/tokens_per_second"}
    assert {*curves, "lr/recurrence", "model/max_abs_Lambda_bar"} <= written.keys()
    assert b"| state_size | 8 |" in written["settings"][0].item()
    beginning = tokenizer.decode(text.task.evaluated[:8])
    assert [sample.item().decode().startswith(f"{beginning} **...** ") for sample in written["validation/sample"]]


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--data nothing/*.txt", "no file matches 'nothing/"),
        ("--length 100000", "a window of length 100000 and the token after it"),
        ("--tokenizer nothing.json", "no file is nothing.json"),
        ("--tokenizer bpe-10", "vocab_size must be at least 257"),
        ("--data-devices 3", "needs 3 devices, there are 2"),
        ("--sequence-devices 2 --length 15", "sequences of 15 tokens cannot be split evenly"),
        ("--batch-size 3", "3 sequences cannot be split evenly over data=2 devices"),
        ("--accumulate 3", "accumulate must divide batch_size=8"),
        ("--resume --run empty", "empty holds no run to resume"),
    ],
)
def test_it_refuses(here, monkeypatch, words, complaint):
    """In one line, before it makes a folder for the run. There are two devices."""
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(complaint)}"):
        main("wikitext103", monkeypatch, *TINY, *words.split())
    assert {path.name for path in here.iterdir()} <= {"texts", "cache"}


def test_it_tells_other_texts_and_tokens_of_the_same_name(here, monkeypatch):
    script = importlib.import_module("wikitext103")
    _, settings, place = script.parse(script.PRESETS, script.Where(), None, ["", *TINY])
    found = []
    for text in ("one", "two"):
        for number in range(24):
            (here / f"texts/{number:02}.txt").write_text(f"{text} is here, {text} again and {text} for long. " * 9)
        found.append(script.read(settings, place.cache, progress=False)[-1])
    one, two = found
    assert one.keys() == {"corpus", "tokenizer"} and all(one[name] != two[name] for name in one)


def finished(words):
    """What a run writes, without training: the perplexity is least for a learning rate of 0.002."""
    script = importlib.import_module("wikitext103")
    preset, settings, place = script.parse(script.PRESETS, script.Where(), None, words)
    place.run.mkdir(parents=True)
    perplexity = 10 + abs(settings.lr - 0.002) * 1000
    result = {
        "settings": {"preset": preset, **vars(settings)},
        "validation_perplexity": perplexity,
        "validation_curve": [(1, 2 * perplexity), (2, perplexity)],
        "test_perplexity": perplexity + settings.seed,
        "parameters": 12345,
        "seconds": 60.0,
    }
    (place.run / "result.json").write_text(json.dumps(result))


@pytest.mark.smoke
def test_the_comparison_takes_the_best_of_each_and_more_seeds(here, monkeypatch, capsys):
    script, started = importlib.import_module("compare_text"), []

    def run(command, **_):
        started.append(Path(command[command.index("--run") + 1]).name)
        finished(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    words = [
        "--rates",
        "0.001",
        "0.002",
        "0.004",
        "--folder",
        "runs",
        "--plot",
        "out.png",
        "--json",
        "out.json",
        "--",
        "--steps",
        "200",
    ]
    script.main(words)
    rows = [line.split(" | ")[:4] for line in capsys.readouterr().out.splitlines()]
    assert rows[3] == ["| hyena-s5", "0.002", "10.00", "11.00 ± 1.00"]
    assert rows[4] == ["| hyena-s5", "0.004", "12.00", ""]
    assert [row[0] for row in rows[5:]] == ["| transformer"] * 3
    of_each = ("lr0.001-seed0", "lr0.002-seed0", "lr0.004-seed0", "lr0.002-seed1", "lr0.002-seed2")
    assert started == [f"{preset}-{run}" for preset in ("tiny", "tiny-transformer") for run in of_each]
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path("out.json").read_text())
    assert [run["settings"]["seed"] for run in found["tiny"]["0.002"]] == [0, 1, 2]

    started.clear()
    Path("runs/tiny-lr0.002-seed1/result.json").unlink()
    Path("runs/tiny-lr0.002-seed1").rmdir()
    script.main(words)
    assert started == ["tiny-lr0.002-seed1"], "what is done is kept"
    with pytest.raises(ValueError, match="steps was 200 and is now 300"):
        script.main([*words[:-1], "300"])


def test_the_comparison_ends_where_a_run_fails(here, monkeypatch):
    script = importlib.import_module("compare_text")
    Path("runs/tiny-lr0.1-seed0").mkdir(parents=True)
    Path("runs/tiny-lr0.1-seed0/settings.json").write_text("{}")
    codes, commands = iter([1, 0]), []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(subprocess, "run", run)
    for message in ("error: the run in .* failed", "the same command continues"):
        with pytest.raises(SystemExit, match=message):
            script.main(["--folder", "runs", "--rates", "0.1"])
    assert [command[-1] for command in commands] == ["--resume"] * 2
    with pytest.raises(ValueError, match="plot must be a file in a folder that exists"):
        script.main(["--plot", "nowhere/out.png"])


@pytest.mark.slow
def test_stopped_it_prints_the_command_that_continues(here):
    words = (*TINY, "--steps", 400, "--steps-per-dispatch", 1, "--sample-tokens", 0)
    whole = train(*words, "--run", "whole")
    process = start(SCRIPT, *words, "--run", "parts")
    deadline = time.monotonic() + 120
    while not list(here.glob("parts/checkpoints/*0")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    command = shlex.split(end(process)[-1])
    assert command[0] == "python" and command[-1] == "--resume"
    result = train(*command[2:])
    differ = {name for name in whole if whole[name] != result[name]}
    assert differ <= {"seconds", "tokens_per_second"}
    assert Path("whole/model.safetensors").read_bytes() == Path("parts/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "--sequence-devices 2"])
def test_many_devices_train_as_one(here, words):
    one = train(*TINY, "--packed", "--steps", 20, "--run", "one")
    many = train(*TINY, "--packed", "--steps", 20, "--run", "many", *words.split(), devices=8)
    assert many["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(here):
    one = train(*TINY, "--steps", 20, "--run", "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ("--steps", 20, "--run", "two", "--coordinator", f"localhost:{port}", "--num-processes", 2)
    both = [start(SCRIPT, *TINY, *words, "--process-id", number) for number in range(2)]
    first, second = map(end, both)
    assert json.loads(first[-1])["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)
    assert not any(line.startswith("{") for line in second), "what is said is said once"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "tiny --optimizer muon --tokenizer bytes",
        "tiny --optimizer soap --dtype bfloat16",
        "tiny --optimizer schedule-free --packed",
        "tiny-transformer --profile 1",
        "hyena-s5-125m --tokenizer bpe-300",
        "hyena-125m --tokenizer bpe-300",
        "transformer-125m --tokenizer bpe-300 --accumulate 2",
    ],
)
def test_every_way_to_train_lowers_the_loss(here, words):
    preset, *words = words.split()
    result = train(preset, *TINY, *words, "--steps", 40, "--run", "run")
    (_, before), (_, after) = result["validation_curve"]
    assert after < before
    if "--profile" in words:
        assert list(Path("run/plugins/profile").glob("*/*.xplane.pb"))


@pytest.mark.slow
def test_the_comparison_trains(here):
    words = ("--rates", 0.01, 0.02, "--seeds", 2, "--data", "texts/*.txt", "--", *TINY, "--steps", 40)
    rows = end(start(ROOT / "experiments/compare_text.py", *words))[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| hyena-s5"] * 2 + ["| transformer"] * 2
    assert sum("±" in row for row in rows) == 2


@pytest.mark.slow
def test_the_loss_needs_a_quarter_of_the_memory(here):
    """Temporaries of a step of hyena-s5-125m, L=1,024, batch 16, compiled and not run."""
    table = end(start(ROOT / "experiments/bench_memory.py"))
    assert table[0] == "batch 16, L = 1024, V = 50,257"
    shares = {row[1].strip(): float(row[4]) for row in (line.split("|") for line in table[4:])}
    assert len(shares) == 5
    assert shares["the loss by itself"] < 0.25 and shares["the loss by itself, bfloat16"] < 0.25
    assert max(shares.values()) < 0.8


@pytest.mark.slow
def test_the_example_of_the_readme(here):
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[3]
    assert "path/*.txt" in example and "result.best" in example
    Path("example.py").write_text(example.replace("path/*.txt", "texts/*.txt").replace("steps=200", "steps=50"))
    assert 1 < float(end(start("example.py"))[-1]) < 257
