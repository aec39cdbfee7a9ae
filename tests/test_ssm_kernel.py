"""The fused kernel of the state-space step: every size and path of it against a loop in double precision."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_on_host import COMPILER, CSRC, needs_compiler
from helpers import precisions, relative_error, slow
from scan_problems import BACKENDS, native
from ssm_problems import BLOCKS, CHUNK, LONGEST, NAMES, Problem, check, in_dtype, naive, problem, solve

import s5eqx
from s5eqx.ops import ssm, use_backend

RESULTS = ("y", "last", *NAMES[:6])
SIZE = 19, 13  # channels and states: work for several threads from some 500 steps on
dtype = precisions("float32", "float64")


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, dtype):
    """1, 2, primes, and around chunks and blocks: one less, equal, one more, several."""
    lengths = [1, 2, 3, 7, 31, 127, *(n + i for n in (CHUNK, 2 * CHUNK, *BLOCKS) for i in (-1, 0, 1)), 3 * LONGEST + 5]
    if backend == "jax":
        lengths = [1, CHUNK + 1, LONGEST + 1]
    problems = [problem(2, n, *SIZE, reset=n % 2 == 1) for n in lengths]
    check(problems, dtype, backend, tolerance=3e-6 if backend == "native" else 1e-5)


@native
@pytest.mark.parametrize("numbers", [(1, 2, 3, 4, 7, 8, 16, 17, 31, 33, 64, 67), slow(range(1, 68))])
def test_widths_and_states(numbers, dtype):
    """From 1 to 67 of both, and around the sizes from which on all states are kept."""
    problems = [problem(2, CHUNK + 3, n, 68 - n) for n in numbers]
    wide = [(67, 67), (256, 3), (257, 3), (3, 128), (3, 129), (256, 67)]
    check([*problems, *(problem(1, CHUNK + 3, *size) for size in wide)], dtype)


@native
@pytest.mark.parametrize("width, states", [(67, 67), (256, 128), (257, 5), (5, 129)])
def test_wide_layers_of_several_blocks(width, states, dtype):
    """Whose blocks are as long as the sums of their weights' gradients ask for; and those that keep all states."""
    check([problem(1, 2 * LONGEST + 67, width, states, reset=True), problem(8, 100, width, states)], dtype)


@native
@pytest.mark.parametrize(
    "rows, length", [(3, 2117), (17, 1601), (150, 67), *(slow(*sizes) for sizes in ((1, 2117), (15, 1601), (65, 131)))]
)
def test_batches(rows, length, dtype):
    """Few rows, whose blocks hand their carries on; more, each of which is a task; and so many that they share one."""
    check([problem(rows, length, *SIZE, radius=(0.99, 0.999), reset=reset) for reset in (False, True)], dtype)


@native
@pytest.mark.parametrize("width", [64, *map(slow, (20, 7))])
def test_results_past_the_cache(width):
    """More than 24 MiB go straight to memory. To the bit what each half gives, which goes through the cache."""
    rows = 32  # each a task, whole or half
    _, *weights, x0 = in_dtype(problem(rows, 1, width, 2).inputs, "float32")
    shape = rows, (25 << 20) // (rows * width * 4), width
    u, g = np.random.default_rng(0).standard_normal((2, *shape), np.float32)

    @jax.jit
    def y_and_du(u, x0, g):
        (y, last), pull = jax.vjp(lambda u: ssm(u, *weights, x0), u)
        return y, pull((g, jnp.zeros_like(last)))[0]

    with use_backend("native"):
        whole = y_and_du(u, x0, g)
        halves = [y_and_du(*half) for half in zip(*(np.split(np.asarray(z), 2) for z in (u, x0, g)), strict=True)]
    for given, *expected in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(given, np.concatenate(expected))


@native
def test_resets_at_the_seams(dtype):
    """One at a time, one at each seam, two in a row, and at every step."""
    length = LONGEST + CHUNK + 2
    time = np.arange(length)
    alone = time == np.array([0, 1, CHUNK, length - 1, *(n + i for n in BLOCKS for i in (-1, 0, 1))])[:, None]
    at_each = np.stack([(time - i) % CHUNK == 0 for i in (-1, 0, 1)])
    flags = np.concatenate([alone, at_each, alone[4:] | np.roll(alone[4:], 1, axis=1), np.ones((1, length), bool)])
    few = [problem(n, length, *SIZE, reset=flags[i : i + n]) for i, n in ((1, 3), (4, 6), (10, 6), (16, 3))]
    check([problem(len(flags), length, *SIZE, reset=flags), *few], dtype)


@pytest.mark.smoke
@native
@pytest.mark.parametrize("rows", [3, 9])
def test_resets_shared_by_all_rows(rows, dtype):
    """Under a map that leaves them alone they stay one row of flags."""
    shared = jax.vmap(lambda u, a, B, C, D, x0, reset: ssm(u, a, B, C, D, x0, reset=reset), (0, *[None] * 4, 0, None))
    p = problem(rows, 3 * CHUNK + 1, *SIZE, reset=True)
    one = p._replace(reset=p.reset[0])
    (given,) = solve([one], dtype, step=lambda *z, reset: shared(*z, reset))
    (expected,) = solve([p._replace(reset=np.broadcast_to(one.reset, p.reset.shape))], dtype)
    for ours, exact in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, exact)


@native
@pytest.mark.parametrize("rows", [1, slow(8)])
def test_long_and_nearly_undamped(rows, x64):
    """L = 131,072, |a| = 0.99999: as close to the truth as the products and the scan apart."""
    p = problem(rows, 131_072, 8, 4, radius=(0.99999, 0.99999))
    single = lambda z: np.asarray(in_dtype([z], "float32")[0])
    p = p._replace(inputs=tuple(map(single, p.inputs)), g=single(p.g), g_last=single(p.g_last))

    def judge(u, *weights_and_x0, reset):
        *weights, x0 = weights_and_x0
        return jax.vmap(lambda u, x0: naive(u, *weights, x0))(u, x0)

    def apart(*inputs, reset):
        return ssm(*inputs, gain=jnp.ones((131_072, 4), jnp.complex64))

    (exact,) = solve([p], "float64", step=judge)
    (fused,), (composed,) = solve([p], "float32"), solve([p], "float32", step=apart)
    for name, truth, ours, theirs in zip(RESULTS, exact, fused, composed, strict=True):
        assert relative_error(ours, truth) < max(2 * relative_error(theirs, truth), 2e-7), name
        assert relative_error(ours, truth) < 5e-7, name


# Numbers that must not spread.


@pytest.mark.parametrize(
    "backend, rows, bad",
    [*(pytest.param("native", n, bad, marks=native) for n in (3, 9) for bad in (np.nan, np.inf)), ("jax", 3, np.nan)],
)
def test_a_bad_row_stays_alone(backend, rows, bad):
    """The others keep the very bits that they have without it."""
    clean = problem(rows, LONGEST + 3 if backend == "native" else CHUNK + 3, *SIZE)
    spoilt = []
    for place in ("u", "x0", "g"):
        arrays = {"u": clean.inputs[0].copy(), "x0": clean.inputs[5].copy(), "g": clean.g.copy()}
        arrays[place].reshape(rows, -1)[1, 2] = bad
        spoilt.append(clean._replace(inputs=(arrays["u"], *clean.inputs[1:5], arrays["x0"]), g=arrays["g"]))
    alone, *solutions = solve([clean, *spoilt], "float32", backend)
    others = np.arange(rows) != 1
    for place, results in zip(("u", "x0", "g"), solutions, strict=True):
        assert not all(np.isfinite(z[1]).all() for z in results[:3])
        for name, ours, expected in zip(RESULTS, results, alone, strict=True):
            if name in ("y", "last", "u", "x0"):
                np.testing.assert_array_equal(ours[others], expected[others], err_msg=f"{bad} in {place}: {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 8])
def test_nothing_crosses_a_reset(rows, backend):
    """Not NaN, not a gradient, wherever in a chunk or block it stands."""
    fresh = problem(rows, CHUNK + 1, *SIZE)
    fresh = fresh._replace(inputs=(*fresh.inputs[:5], np.zeros_like(fresh.inputs[5])))

    def after(at):
        """The same after so many steps, with NaN in the last of them."""
        before = problem(rows, at, *SIZE, seed=1)
        before.inputs[0][:, -1] = np.nan
        u = np.concatenate([before.inputs[0], fresh.inputs[0]], axis=1)
        g = np.concatenate([0 * before.g, fresh.g], axis=1)
        reset = np.broadcast_to(np.arange(u.shape[1]) == at, u.shape[:2])
        return Problem((u, *fresh.inputs[1:5], before.inputs[5]), reset, g, fresh.g_last)

    places = (1, 40, CHUNK - 1, CHUNK, CHUNK + 1, *BLOCKS) if backend == "native" else (CHUNK,)
    (y_fresh, last_fresh, du_fresh, *_), *spoilt = solve([fresh, *map(after, places)], "float32", backend)
    for at, (y, last, du, *_, dx0) in zip(places, spoilt, strict=True):
        assert np.isnan(y[:, at - 1]).all() and not du[:, :at].any() and not dx0.any(), at
        for ours, expected in ((y[:, at:], y_fresh), (last, last_fresh), (du[:, at:], du_fresh)):
            assert relative_error(ours, expected) < 1e-6, at


@native
def test_a_growing_channel_without_input_stays_zero():
    """Between blocks a power of `a` that overflows meets a state of zero."""
    p = problem(1, 40 * LONGEST, 3, 4, radius=(1.5, 1.5))
    u = np.zeros_like(p.inputs[0])
    u[:, -1] = 1
    silent = p._replace(inputs=(u, *p.inputs[1:5], 0 * p.inputs[5]), g=0 * p.g, g_last=0 * p.g_last)
    ((y, last, *cotangents),) = solve([silent], "float32")
    assert not y[:, :-1].any() and np.isfinite(last).all() and last.any()
    assert not any(ct.any() for ct in cotangents)


# The same bits.


def digest():
    """Of y, the last states and all cotangents, with few rows and with many."""
    problems = [problem(rows, 4 * LONGEST + 5, *SIZE, radius=(0.999, 0.999), reset=rows > 1) for rows in (1, 3, 17)]
    return hashlib.sha256(b"".join(z.tobytes() for results in solve(problems, "float32") for z in results)).hexdigest()


@native
@pytest.mark.parametrize("rows", [1, 17])
def test_the_same_bits_every_time(rows):
    p = problem(rows, 4 * LONGEST + 5, *SIZE, radius=(0.999, 0.999))
    inputs, cotangents = (tuple(in_dtype(z, "float32")) for z in (p.inputs, (p.g, p.g_last)))

    @jax.jit
    def everything(*inputs):
        results, pull = jax.vjp(ssm, *inputs)
        return *results, *pull(cotangents)

    with use_backend("native"):
        first = jax.tree.map(np.asarray, everything(*inputs))
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, everything(*inputs), first)


def run_python(code, **environment):
    paths = os.pathsep.join(map(str, (Path(s5eqx.__file__).parents[1], Path(__file__).parent)))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@native
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to take processors from a process")
def test_the_same_bits_on_one_thread():
    """XLA's pool has as many threads as the process has processors when it starts."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import test_ssm_kernel as t; "
    assert run_python(code + "print(t.digest())") == digest()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_many_threads_under_a_sanitizer(sanitizer, tmp_path):
    """More of them than this machine may have processors, and the bits of one, with the vectors of this machine."""
    sources = [Path(__file__).parent / "ssm_on_threads.cc"]
    sources += [CSRC / f"{name}.cc" for name in ("ssm", "isa", "scan_sweep", "product")]
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    flags += ["-DS5EQX_SWEEPS=sweeps_generic", "-DS5EQX_PRODUCTS=products_generic", "-DS5EQX_PAST_CACHE=4096"]
    instruction_set = s5eqx.backends()[0].detail.rpartition(" ")[2]
    if instruction_set.startswith("x86-64"):
        flags.append(f"-march={instruction_set}")
    program = tmp_path / "ssm_on_threads"
    subprocess.run([*COMPILER, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]
