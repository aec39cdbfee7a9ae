"""Runs in processes of their own that end badly: killed at any moment, or with no room for a checkpoint."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import s5eqx

TESTS = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bad_ends")]


def start(folder, *, resume=False, **variables):
    paths = os.pathsep.join(map(str, (Path(s5eqx.__file__).parents[1], TESTS)))
    command = [sys.executable, TESTS / "resumable.py", folder, *(["--resume"] if resume else [])]
    environment = os.environ | {"PYTHONPATH": paths} | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


def kill(process, condition, delay=0.0):
    """Kills the process so many seconds after the condition first holds."""
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def newest(folder):
    return max((int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()), default=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """How the run ends if nothing happens to it."""
    return finish(start(tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_were_not(whole, tmp_path):
    folder, rng = tmp_path / "killed", random.Random(7)
    for number, step in enumerate(sorted(rng.sample(range(10, 350), 4))):
        process = start(folder, resume=number > 0)
        kill(process, lambda step=step: newest(folder) >= step, delay=0.05 * rng.random())
    held = tmp_path / "held"
    kill(start(folder, resume=True, HOLD=held), held.exists)
    (unfinished,) = folder.glob("checkpoints/*checkpoint-tmp*")  # killed inside a write
    assert list(unfinished.rglob("*.ocdbt")) or list(unfinished.rglob("manifest*"))
    assert finish(start(folder, resume=True)) == whole
    assert not list(folder.glob("checkpoints/*checkpoint-tmp*"))


def test_a_full_disk_ends_a_run_with_its_last_good_state_there(whole, tmp_path):
    folder = tmp_path / "run"
    before = time.monotonic()
    process = start(folder, ROOM=100)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - before < 30
    assert process.returncode == 1
    message = re.search(r"OSError: the checkpoint of step 20 could not be written to .*", err)
    assert message, err
    assert f"the last good one is {folder / 'checkpoints' / '10'}." in message[0]
    assert newest(folder) == 10
    assert finish(start(folder, resume=True)) == whole
