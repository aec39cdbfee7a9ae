"""The page that TensorBoard makes of a run, as a browser shows it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import matplotlib.image
import numpy as np
import pytest
import tiny

from s5eqx.train import fit, open_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--window-size=1400,1000", "--virtual-time-budget=60000"),
    "--disable-3d-apis",  # the page then draws its curves itself
]
CHART = (slice(215, 445), slice(365, 690))  # on a page of one curve, without its axes


@contextlib.contextmanager
def tensorboard(folder):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "localhost", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def answers(address):
    with contextlib.suppress(OSError), urllib.request.urlopen(address) as page:
        return b"train/loss" in page.read()
    return False


def shown(address, file, profile):
    """The part of the screenshot that has the colour of the curve."""
    options = [*OPTIONS, f"--user-data-dir={profile}", f"--screenshot={file}"]
    page = f"{address}/?darkMode=false&tagFilter=train%2Floss&smoothing=0#timeseries"
    subprocess.run([str(CHROMIUM), *options, page], check=True, capture_output=True, timeout=60)
    picture = np.rint(matplotlib.image.imread(file)[..., :3] * 255)
    colour = picture[186, 255]  # of the dot beside the run's name
    return np.abs(picture[CHART] - colour).max(axis=-1) < 12


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_of_a_run_shows_its_loss(tmp_path):
    run = open_run({}, folder=tmp_path / "run")
    every = {"eval_every": 100, "log_every": 5, "checkpoint_every": 100}
    history = fit(tiny.trainer(), steps=100, run=run, progress=False, **every).history
    losses = np.array([record["train/loss"] for record in history])
    file = os.environ.get("S5EQX_SCREENSHOT", tmp_path / "page.png")
    with tensorboard(run.folder) as address:
        give_up = time.monotonic() + 60
        while not answers(f"{address}/data/plugin/timeseries/tags"):
            assert time.monotonic() < give_up
            time.sleep(0.2)
        for attempt in range(10):  # the browser does not wait for what the page asks of the server
            curve = shown(address, file, tmp_path / f"profile{attempt}")
            columns = np.flatnonzero(curve.any(axis=0))
            if len(columns) > 150:
                break
    # One line from left to right, which goes up and down with the loss.
    assert len(columns) > 150
    heights = -np.array([np.flatnonzero(curve[:, column]).mean() for column in columns])
    steps = np.interp(columns, (columns[0], columns[-1]), (0, len(losses) - 1))
    assert np.corrcoef(heights, np.interp(steps, np.arange(len(losses)), losses))[0, 1] > 0.8
