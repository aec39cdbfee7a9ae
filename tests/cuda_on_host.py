"""Runs the CUDA kernels on the host: builds the programs of `cuda_host` and speaks their protocols."""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import recurrence, recurrence_vjp, relative_error
from scan_problems import LAYOUTS, problem

HERE = Path(__file__).parent / "cuda_host"
CSRC = Path(__file__).parents[1] / "csrc"
PROGRAMS = Path(__file__).parents[1] / "build" / "cuda_on_host"
COMPILER = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler to run the CUDA kernels on the host with")

ELEMENTS = ("float32", "float64", "complex64", "complex128")
RANDOM, STUBBORN, LAST_FIRST = range(3)


class Run(NamedTuple):
    """How the blocks of a launch are scheduled."""

    blocks: int = 0  # of the grid; 0: what a device with two multiprocessors would get
    resident: int = 3  # at the same time
    seed: int = 0
    order: int = RANDOM


SCHEDULES = tuple(
    Run(blocks, resident, seed, order)
    for blocks, resident in ((1, 1), (3, 3), (7, 2), (16, 8))
    for seed, order in ((1, RANDOM), (2, RANDOM), (3, STUBBORN), (4, STUBBORN), (5, LAST_FIRST))
)


@functools.cache
def build(*flags, name="scan_on_host"):
    """The program, compiled once for all runs that have these sources, these flags and this compiler."""
    command = [*COMPILER, "-std=c++17", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-DS5EQX_HOST_DEVICE", f"-I{CSRC}", f"-I{HERE}", *flags, str(HERE / f"{name}.cc")]
    sources = [path.read_bytes() for folder in (CSRC, HERE) for path in sorted(folder.glob("*.*"))]
    compiler = subprocess.run([*COMPILER, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(b"\0".join([compiler, *map(os.fsencode, command), *sources])).hexdigest()
    program = PROGRAMS / f"{name}-{digest[:16]}"
    if not program.exists():
        PROGRAMS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PROGRAMS) as folder:
            subprocess.run([*command, "-o", f"{folder}/{name}"], check=True)
            os.replace(f"{folder}/{name}", program)
    return program


def case(dtype, batch, length, states, *, a_rows=1, varying=False, flags=0, **options):
    """A random problem of canonical shapes. `flags` is the number of rows of flags; most tiles have no reset."""
    a, reset = (a_rows, length if varying else 1, states), (flags, length) if flags else False
    return problem(LAYOUTS[dtype], (batch,), length, states, a=a, reset=reset, resets=0.02, **options)


def all_states(c):
    """x in double precision, and the last of it."""
    x = recurrence(*c.arrays, c.reset, c.reverse)
    return x, x[:, 0 if c.reverse else -1]


def cotangents(c, conjugate=False):
    """Those of b, of a (one a batch row) and of x0, in double precision."""
    a = np.broadcast_to(c.a, (c.b.shape[0], *c.a.shape[1:]))
    _, (da, db, dx0) = recurrence_vjp(a, c.b, c.x0, c.g, c.reset, c.reverse, conjugate)
    return db, da, dx0


OPTIONS = {"backward": False, "conjugate": False, "wants_x": True, "wants_last": False, "shift": 0, "runs": (Run(),)}


def ask(program, questions):
    """Answers to `(case, options)`, each the arrays of the first run and how many bytes each further run differs in.

    `program` gives the program for a dtype, which all cases share. `options` overrides `OPTIONS`; `shift` moves every
    array by so many elements off a 16-byte boundary.
    """
    message, expected = [], []
    for c, options in questions:
        asked = OPTIONS | options
        batch, length, states = c.b.shape
        rows = 0 if c.reset is None else c.reset.shape[0]
        numbers = [asked["backward"], batch, length, states, *c.a.shape[:2], rows, c.reverse]
        numbers += [asked["conjugate"], asked["wants_x"], asked["wants_last"], asked["shift"], len(asked["runs"])]
        numbers += [n for run in asked["runs"] for n in run]
        flags = np.zeros(0, np.uint8) if c.reset is None else c.reset.astype(np.uint8)
        x = all_states(c)[0].astype(c.b.dtype) if asked["backward"] else None
        arrays = (c.a, x, c.x0, flags, c.g) if asked["backward"] else (c.a, c.b, c.x0, flags)
        message += [np.array(numbers, np.int64).tobytes(), *(np.ascontiguousarray(z).tobytes() for z in arrays)]
        if asked["backward"]:
            shapes = [c.b.shape, (batch, *c.a.shape[1:]), c.x0.shape]
        else:
            shapes = [c.b.shape] * asked["wants_x"] + [c.x0.shape] * asked["wants_last"]
        expected.append((shapes, c.b.dtype, len(asked["runs"]) - 1))
    (dtype,) = {c.b.dtype.name for c, _ in questions}
    return converse(program(dtype), message, expected)


def converse(program, message, expected):
    """What the program says to the message: for each `(shapes, dtype, others)`, arrays of these shapes and counts."""
    done = subprocess.run([program], input=b"".join(message), capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    answers, at = [], 0
    for shapes, dtype, others in expected:
        arrays = []
        for shape in shapes:
            arrays.append(np.frombuffer(done.stdout, dtype, int(np.prod(shape)), at).reshape(shape))
            at += arrays[-1].nbytes
        answers.append((arrays, np.frombuffer(done.stdout, np.int64, others, at)))
        at += 8 * others
    assert at == len(done.stdout)
    return answers


def errors(c, results, **options):
    """The relative errors of an answer, by name."""
    if options.get("backward"):
        truth = dict(zip(("lambda", "da", "dx0"), cotangents(c, options.get("conjugate", False)), strict=True))
    else:
        truth = dict(zip(("x", "last"), all_states(c), strict=True))
        truth = {name: z for name, z in truth.items() if options.get(f"wants_{name}", name == "x")}
    return {name: relative_error(ours, exact) for (name, exact), ours in zip(truth.items(), results, strict=True)}
