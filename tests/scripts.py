"""Scripts as processes of their own, and, where a test has no need of one, within its own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import xla_flags

ROOT = Path(__file__).parents[1]


def start(*words, folder=None, devices=1, stderr=subprocess.PIPE):
    """A process in `folder`, where there is no source tree to import."""
    # One device, as a user has, and the compilers that take least time.
    flags = f"{xla_flags.QUICK} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, env=environment, **pipes)


def run(*words, folder=None):
    """How it ends, what it prints and what it complains of."""
    process = start(*words, folder=folder)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def run_here(monkeypatch, script, *words, folder):
    """Runs it in this process, which has imported what it needs, with JAX as lax as users have it."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(script), run_name="__main__")
