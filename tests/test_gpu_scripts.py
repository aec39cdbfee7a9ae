"""The scripts for machines with a GPU, as far as a machine without one can run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scan_problems import native

GPU = Path(__file__).parent / "gpu"


def run(*command, folder, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("S5EQX_") and k != "XLA_FLAGS"}
    clean |= {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run([*map(str, command)], cwd=folder, env=clean, capture_output=True, text=True, timeout=240)


def output_of(script, *words, folder):
    """The lines that a script prints when all is well."""
    done = run(sys.executable, GPU / script, *words, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_check_refuses_what_it_cannot_do(tmp_path):
    """Which part is not said; no GPU; a part before the build."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho No devices were found >&2\nexit 6\n")
    smi.chmod(0o755)
    settings = {"S5EQX_CHECK_DIR": str(tmp_path / "work"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def complaint(*words):
        done = run("bash", GPU / "check.sh", *words, folder=tmp_path, **settings)
        assert done.returncode == 2 and not done.stdout
        return done.stderr

    assert "usage: tests/gpu/check.sh build|tests|sanitize|bench|recall" in complaint("all")
    assert "no GPU here" in complaint("build")
    smi.write_text("#!/bin/sh\necho NVIDIA H200, 9.0, 580.159\n")
    assert "run tests/gpu/check.sh build first" in complaint("bench")


@native
@pytest.mark.slow
def test_bench(tmp_path):
    """Every program's numbers, in the table, in the file and in the last line."""
    options = ["--platform", "cpu", "--tiny", "--rounds", "1", "--sets", "2", "--json", "numbers.json"]
    lines = output_of("bench.py", *options, folder=tmp_path)
    assert lines[0].startswith("- date: ") and any(line.startswith("- command: python ") for line in lines)
    assert "x associative_scan" in lines[-1]
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert len([line for line in lines if line.startswith("| ")]) == len(rows) + 2
    assert {row["program"] for row in rows} == {"copy", "s5eqx", "associative_scan", "lax.scan"}
    for row in rows:
        if row["program"] in ("s5eqx", "associative_scan"):
            assert row["seconds"] > 0 and 0 < row["error"] < 1e-5 and row["compile_seconds"] > 0
        assert row["seconds"] or row["remark"] == "not run: as the time-invariant one"


@native
@pytest.mark.slow
def test_bench_of_the_state_space_step(tmp_path):
    options = ["--platform", "cpu", "--tiny", "--rounds", "1"]
    lines = [line for line in output_of("bench_ssm.py", *options, folder=tmp_path) if line.startswith("| ")]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[2:-1]] for line in lines)
    assert [row[0] for row in rows] == [f"{name}, float32" for name in ("as written", "products + scan", "fused")]
    assert head.count("times fused") == 2 and rows[-1][2] == rows[-1][4] == "1.00"
    assert all(0 < float(error) < 1e-5 for row in rows for error in row[-2:])


@pytest.mark.slow
def test_bench_of_convolutions(tmp_path):
    lines = output_of("bench_conv.py", "--platform", "cpu", "--tiny", "--rounds", "1", folder=tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith("| (2, 300, 3)")]
    assert [row[0] for row in rows][:3] == ["FFT", "order 2, float32", "order 3, float32"] and len(rows) == 7
    assert all(0 < float(row[-1]) < 1e-6 for row in rows)
    assert lines[-1].startswith("- Measured takes ")


@native
@pytest.mark.slow
def test_same_bits(tmp_path):
    options = ["--platform", "cpu", "--tiny", "--repeats", "2"]
    assert (
        output_of("same_bits.py", *options, folder=tmp_path)[-1]
        == "2 repeats of 8 programs beside another process: 0 differ"
    )


@native
@pytest.mark.slow
def test_what_the_sanitizer_watches(tmp_path):
    lines = output_of("sanitize.py", "complex64", "pairs32", folder=tmp_path)
    assert lines[-1] == "2 element types, each forward, backward and final state: right"


@pytest.mark.slow
def test_recall(tmp_path):
    """The three ways to a step and the training; when its time is over, it stops, and the next call ends it."""
    options = ["--dry", "--length", "256", "--run", "run"]
    lines = output_of("recall_131k.py", *options, "--seconds", "1", folder=tmp_path)
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["s5eqx", "s5eqx, in pieces", "as written"]
    assert all(float(cell) > 0 for row in rows for cell in (row[1], row[4], row[5]))
    assert lines[-1] == "- not at its end: the same command continues"
    lines = output_of("recall_131k.py", *options, folder=tmp_path)
    assert "trained: 30 of 30 steps; a checkpoint has " in lines[-2]
    assert lines[-1].startswith("- accuracy ") and "published: 97.2 %" in lines[-1]
