"""The scripts of the synthetic tasks: several seeds, other lengths, the page of results, the grid."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from typing import get_args

import numpy as np
import pytest
from scripts import ROOT, run, run_here, start

from s5eqx.interop import load
from s5eqx.models import Classifier, Regressor

TINY = shlex.split(
    "--width 16 --num-layers 1 --mlp-width 16 --state-size 8 --num-blocks 2 --batch-size 32 --steps-per-dispatch 50 "
    "--eval-every 50 --log-every 50 --checkpoint-every 50 --warmup 10"
)
RECALL = [*TINY, *shlex.split("--vocab 6 --length 8 --num-test 20 --steps 100")]


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module("_reproduce")


def test_the_page_keeps_what_others_wrote(reproduce, tmp_path):
    page = tmp_path / "page.md"
    known = next(iter(reproduce.PUBLISHED))
    first = reproduce.Ours("python x.py", "1.00 %", 1, "10", 3.0, "a card", "0123456789-dirty", "2026-11-28")
    reproduce.record(page, first)
    reproduce.record(
        page, reproduce.Ours(known, "97.00 ± 1.00 %", 10, "5,000", 1234.5, "a card", "abcdef0123", "today")
    )
    text = page.read_text()
    assert (
        f"| `{known}` | {reproduce.PUBLISHED[known]} | 97.00 ± 1.00 % | 10 | 5,000 | 1,234 | a card | abcdef0 | today |"
        in text
    )
    assert "| `python x.py` |  | 1.00 % | 1 | 10 | 3 | a card | 0123456-dirty | 2026-11-28 |" in text
    again = reproduce.Ours("python x.py", "2.00 %", 1, "10", 3.0, "a card", "abcdef0123", "2026-11-29")
    reproduce.record(page, again)
    changed = page.read_text()
    assert "1.00 %" not in changed.split("python x.py")[1] and "97.00 ± 1.00 %" in changed
    assert len(reproduce.read(page)) == 2 and changed.count("| `python") == len(reproduce.PUBLISHED) + 1
    assert reproduce.spread([0.5, 0.7], percent=True) == "60.00 ± 14.14 %"
    other = tmp_path / "notes.md"
    other.write_text("# Notes\n")
    with pytest.raises(ValueError, match="a page that these scripts wrote, or a new file"):
        reproduce.check_page(other)
    reproduce.check_page(page)


@pytest.mark.smoke
def test_the_line_of_a_page_is_the_shortest_command(reproduce):
    """However the settings were given."""
    training, recall = importlib.import_module("_training"), importlib.import_module("assoc_recall")
    s = dataclasses.replace(recall.PRESETS["128-20"], vocab_size=30, allow_dot=True, test_lengths=(256, 512))
    given = training.words(recall.PRESETS, "128-20", s, 3)
    assert " ".join(given) == "128-20 --test-lengths 256 512 --vocab-size 30 --allow-dot --seeds 3"
    assert training.words(recall.PRESETS, "20-10", recall.PRESETS["20-10"], 1) == []


@pytest.mark.smoke
def test_the_page_of_the_project_is_what_the_scripts_write(reproduce, tmp_path):
    """Its form is not edited by hand: written again, it stays as it is."""
    page = ROOT / "experiments" / "REPRODUCE.md"
    found = reproduce.read(page)
    assert found, "nothing was recorded"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    command, cells = next(iter(found.items()))
    same = reproduce.Ours(command, cells[0], cells[1], cells[2], float(cells[3].replace(",", "")), *cells[4:])
    reproduce.record(copy, same)
    assert copy.read_text() == page.read_text()


def complaint(script, words, folder, monkeypatch):
    """What it says, before it makes a folder."""
    with pytest.raises(SystemExit) as error:
        run_here(monkeypatch, ROOT / "experiments" / f"{script}.py", *shlex.split(words), folder=folder)
    assert not list(folder.iterdir())
    return str(error.value)


@pytest.mark.parametrize(
    "script, words, said",
    [
        ("assoc_recall", "--vocab 6 --length 4 --num-test 20", "only 20 different examples"),
        ("assoc_recall", "--vocab 6 --length 4 --num-test 10 --num-examples 11", "more different examples than the 20"),
        ("assoc_recall", "--length 2 --key-length 2", "length must be at least 3 tokens, got 2"),
        ("assoc_recall", "--test-lengths 1", "length must be at least 2 tokens, got 1"),
        ("assoc_recall", "--seeds 0", "seeds must be at least 1, got 0"),
        ("assoc_recall", "--stop-at 99", "stop_at is an accuracy between 0 and 1, of a task that has one; got 99"),
        ("assoc_recall", "--record nowhere/page.md", "record must be a file in a folder that exists"),
        (
            "assoc_recall",
            "--steps 150 --warmup 10",
            "steps must be a multiple of the trainer's steps_per_dispatch=100, got 150",
        ),
        ("assoc_recall", "--mixer attention --num-heads 3", "num_heads must divide width=64, got 3"),
        ("induction", "--vocab 3", "vocab_size must be at least 4, got 3"),
        ("induction", "--length 3 --copy-length 2", "length must be at least 4 tokens, got 3"),
        ("icl", "--num-pairs 0", "num_pairs must be at least 1"),
        ("classify", "--length 3", "max_length must be at least 4 tokens, got 3"),
        ("classify", "pendulum --length 101", "length must lie between 1 and num_times=100, got 101"),
        ("classify", "pendulum --mixer h3", "only s5 and bidirectional-s5 take intervals, got h3; add --no-intervals"),
        ("classify", "pendulum --stop-at 0.9", "of a task that has one; got 0.9"),
        ("mechanistic", "--lengths 16 16", "lengths must be at least one, and each of them once"),
        ("mechanistic", "--tasks counting --lengths 1", "length must be at least 2 tokens, got 1"),
        ("mechanistic", "--mixers bidirectional-s5", "mixers must be; got bidirectional-s5"),
        ("mechanistic", "--digits 1", "only 100 different examples"),
        ("mechanistic", "--jobs 0", "jobs must be at least 1, got 0"),
        ("mechanistic", "--resume", "name its folder"),
    ],
)
def test_refused_in_one_line(script, words, said, tmp_path, monkeypatch):
    assert said in complaint(script, words, tmp_path, monkeypatch)


@pytest.mark.slow
def test_several_seeds_and_other_lengths(tmp_path):
    """Mean and deviation over runs of their own; started again, what is done is kept; the page gets its line."""
    words = [*RECALL, "--seeds", 2, "--test-lengths", 16, "--run", "here", "--record", "page.md"]
    code, output, errors = run(ROOT / "experiments/assoc_recall.py", *words, folder=tmp_path)
    assert code == 0, errors
    result = json.loads(output.splitlines()[-1])
    parts = [json.loads((tmp_path / f"here/seed{seed}/result.json").read_text()) for seed in (0, 1)]
    values = [part["test_accuracy"] for part in parts]
    assert result["over_seeds"]["test_accuracy"]["seeds"] == values
    assert parts[0]["test_loss"] != parts[1]["test_loss"]
    assert result["test_accuracy"] == pytest.approx(np.mean(values))
    assert result["over_seeds"]["test_accuracy"]["sd"] == pytest.approx(np.std(values, ddof=1))
    longer = [part["test_lengths"]["16"] for part in parts]
    assert result["test_lengths"]["16"]["mean"] == pytest.approx(np.mean(longer))
    assert parts[1]["settings"]["seed"] == 1 and parts[0]["peak_memory_MiB"] > 50
    line = next(line for line in (tmp_path / "page.md").read_text().splitlines() if "--test-lengths 16" in line)
    assert f"{100 * result['test_accuracy']:.2f} ± " in line and "--run" not in line and "| 2 | 100 |" in line

    (tmp_path / "here/seed1/result.json").unlink()
    before = os.stat(tmp_path / "here/seed0/result.json").st_mtime_ns
    code, output, errors = run(ROOT / "experiments/assoc_recall.py", *words, "--resume", folder=tmp_path)
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1])["over_seeds"]["test_accuracy"]["seeds"] == values
    assert os.stat(tmp_path / "here/seed0/result.json").st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, words, kind, measure, bound",
    [
        (
            "induction",
            "--vocab 6 --length 6 --num-test 20 --copy-length 2 --steps 250 --lr 1e-2",
            None,
            "test_accuracy",
            0.6,
        ),
        ("icl", "--dimension 1 --num-pairs 4 --num-test 100 --steps 250 --lr 1e-2", Regressor, "test_loss", 0.5),
        ("classify", "--length 6 --max-depth 1 --num-test 100 --steps 300", Classifier, "test_accuracy", 0.3),
        ("classify", "pendulum --length 8 --num-times 16 --num-test 50 --steps 100", Regressor, "test_loss", 0.4),
        (
            "classify",
            "pendulum --length 8 --num-times 16 --num-test 50 --steps 50 --mixer s4d --no-intervals",
            Regressor,
            "test_loss",
            0.45,
        ),
    ],
)
def test_the_scripts_learn(script, words, kind, measure, bound, tmp_path):
    words = shlex.split(words)
    preset = words[:1] if not words[0].startswith("-") else []
    words = [*preset, *TINY, *words[len(preset) :], "--run", "here"]
    code, output, errors = run(ROOT / f"experiments/{script}.py", *words, folder=tmp_path)
    assert code == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert (result[measure] > bound) == (measure == "test_accuracy"), result[measure]
    assert (tmp_path / "here/curve.png").read_bytes().startswith(b"\x89PNG")
    if kind is None:
        assert "expected" in output and 0 <= result["test_whole_answers"] <= result["test_accuracy"]
    else:
        assert isinstance(load(tmp_path / "here/model.safetensors"), kind)


GRID = [*TINY, *shlex.split("--tasks recall linear --mixers hyena-s5 attention --lengths 8 --vocab 6 --num-test 10")]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_grid_goes_on_where_it_was_stopped(jobs, tmp_path):
    """Killed in its second cell; changed settings are refused; what is done is kept, and the heat map is drawn."""
    script, words = ROOT / "experiments/mechanistic.py", [*GRID, "--steps", 300, "--run", "here", "--jobs", jobs]
    process = start(script, *words, folder=tmp_path, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "here/cells").glob("*.json")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and re.search(r"stopped with \d cells of 4", output)
    assert shlex.split(output.splitlines()[-1])[-1] == "--resume"
    done = {page.name: os.stat(page).st_mtime_ns for page in (tmp_path / "here/cells").glob("*.json")}
    assert done and len(done) < 4 and "| - |" in (tmp_path / "here/grid.md").read_text()

    code, _, errors = run(script, *GRID, "--steps", 350, "--run", "here", "--resume", folder=tmp_path)
    assert code == 1 and "steps was 300 and is now 350" in errors and "Traceback" not in errors
    code, output, errors = run(script, *words, "--resume", "--plot", "map.png", folder=tmp_path)
    assert code == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert len(result["cells"]) == 4 and all(0 <= value <= 1 for value in result["cells"].values())
    assert max(result["cells"].values()) > 0.5
    assert all(os.stat(tmp_path / "here/cells" / name).st_mtime_ns == then for name, then in done.items())
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "here/grid.md").read_text().startswith("| mixer | recall 8 | linear 8 |\n")


@pytest.mark.slow
def test_a_cell_that_diverges_is_a_dash(tmp_path):
    """The others are computed all the same."""
    words = [*GRID, "--tasks", "recall", "--steps", 100, "--lr", 1e30, "--run", "here", "--jobs", 1]
    code, output, errors = run(ROOT / "experiments/mechanistic.py", *words, folder=tmp_path)
    assert code == 0, errors
    assert output.count("came to nothing, loss and gradient must stay finite") == 2
    assert json.loads(output.splitlines()[-1])["cells"] == {"recall hyena-s5 8": None, "recall attention 8": None}


@pytest.mark.slow
def test_every_mixer_trains(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    words = [*TINY, *shlex.split("--tasks recall --lengths 8 --vocab 6 --num-test 10 --steps 200 --run here --mixers")]
    mixers = [mixer for mixer in get_args(importlib.import_module("_models").Mixer) if "bidirectional" not in mixer]
    code, output, errors = run(ROOT / "experiments/mechanistic.py", *words, *mixers, folder=tmp_path)
    assert code == 0, errors
    assert len(mixers) == 9 and all(f"| {mixer} | " in output for mixer in mixers)
    for mixer in mixers:
        cell = json.loads((tmp_path / f"here/cells/recall-{mixer}-8.json").read_text())
        assert cell["loss"] < 1.0, "at the start it is above 1.7"


@pytest.mark.slow
def test_training_starts_from_given_weights(tmp_path):
    """With none of its own steps to speak of it is as good as what it started from; another model is refused."""
    script = ROOT / "experiments/assoc_recall.py"
    code, output, errors = run(script, *RECALL, "--run", "first", folder=tmp_path)
    assert code == 0, errors
    first = json.loads(output.splitlines()[-1])
    words = [*RECALL, "--start", "first/model.safetensors", "--lr", 1e-9, "--run"]
    code, output, errors = run(script, *words, "second", folder=tmp_path)
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1])["test_loss"] == pytest.approx(first["test_loss"], rel=1e-3)
    code, _, errors = run(script, *words, "third", "--state-size", 16, folder=tmp_path)
    assert code == 1 and "start must hold the model that the settings describe" in errors and "Traceback" not in errors
    assert not (tmp_path / "third").exists()
