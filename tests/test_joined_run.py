"""A run of two processes: they stop together, and write and read the same checkpoints."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import s5eqx
from s5eqx.train import Checkpoints

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(map(str, (Path(s5eqx.__file__).parents[1], TESTS)))
    processes = [
        subprocess.Popen(
            [sys.executable, TESTS / "joined_run.py", str(port), str(number), tmp_path],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in ends)
    folder = Path(first["folder"])
    assert second["folder"] == str(folder)
    assert first["stopped"] == second["stopped"] == [True, 10]
    assert "holds another run" in first["refused"]
    assert first["refused"] == second["refused"]
    assert [len(seen["damaged"]) for seen in (first, second)] == [1, 1]
    assert "10 is damaged" in first["damaged"][0]
    assert first["steps"] == second["steps"] == [5, 10, 15]
    assert first["leaves"] == second["leaves"]
    assert "15/15" in ends[0][1]  # the progress bar of the first process
    assert "steps" not in ends[1][1]
    assert len(list(folder.glob("events.*"))) == 4  # of the first process: curves and texts, twice
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(tiny.trainer().skeleton)  # by one process, on one device
    leaves = [np.asarray(leaf).tobytes() for leaf in tiny.trainer().flatten(state)]
    assert hashlib.sha256(b"".join(leaves)).hexdigest() == first["leaves"]
