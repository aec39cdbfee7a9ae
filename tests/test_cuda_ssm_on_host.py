"""The CUDA kernels of the state-space step, run on the host: every size, path and tail against the float64 loop."""

import numpy as np
import pytest
import ssm_problems
from cuda_on_host import SCHEDULES, Run, build, converse, needs_compiler
from helpers import relative_error, to_pairs
from ssm_problems import CHUNK, in_dtype, problem

import s5eqx
from s5eqx.ops import _native

pytestmark = [needs_compiler, pytest.mark.xdist_group("cuda_ssm_on_host")]  # which build one program
CUDA = s5eqx.backends()[1]
NAMES = ("y", "last", "du", "da", "dw_in", "dw_out", "dskip", "dx0")
PLAIN, SPLIT_TF32, TF32 = range(3)  # as in csrc/ssm_tiles.h
FEW = "-DS5EQX_MOST_RUNS=24"  # so that blocks take runs of several tiles, or several rows, in small problems


def operands(p, dtype):
    """What the kernels take, from the complex numbers of a problem: w_out has the sign of Re(C x)'s imaginary parts."""
    u, a, B, C, skip, x0, g, g_last = (np.asarray(z) for z in in_dtype((*p.inputs, p.g, p.g_last), dtype))
    flags = np.zeros(0, bool) if p.reset is None else p.reset
    return (
        u,
        to_pairs(a),
        pairs_across(B.T),
        pairs_down(C.conj()),
        skip,
        to_pairs(x0),
        flags,
        g,
        to_pairs(g_last.conj()),
    )


def truth(p, dtype):
    """What the kernels give: real gradients of pairs are JAX's cotangents of complex numbers, conjugated."""
    y, last, du, da, dB, dC, dskip, dx0 = ssm_problems.truth(p, dtype)
    gradients = to_pairs(da.conj()), pairs_across(dB.T.conj()), pairs_down(dC), dskip, to_pairs(dx0.conj())
    return y, to_pairs(last), du, *gradients


def pairs_across(z):
    """(D, P) as (D, 2P)."""
    return to_pairs(z).reshape(len(z), -1)


def pairs_down(z):
    """(D, P) as (2P, D)."""
    return np.ascontiguousarray(pairs_across(z).T)


def ask(program, dtype, questions):
    """Answers to `(problem, options)`, options `runs` and `shift` as for the scan: y, the last state, and the gradients
    in the order of the inputs; and how many bytes further runs differ in."""
    message, expected = [], []
    for p, options in questions:
        arrays, runs = operands(p, dtype), options.get("runs", (Run(),))
        (batch, length, width), states = arrays[0].shape, len(arrays[1])
        rows = 0 if p.reset is None else len(p.reset)
        numbers = [
            arrays[0].itemsize,
            options.get("projection", PLAIN),
            batch,
            length,
            width,
            states,
            rows,
            options.get("shift", 0),
            len(runs),
        ]
        numbers += [n for run in runs for n in run]
        message += [np.array(numbers, np.int64).tobytes(), *(np.ascontiguousarray(z).tobytes() for z in arrays)]
        kept = (batch, -(-length // CHUNK), states, 2)
        expected.append(([arrays[0].shape, arrays[5].shape, kept], arrays[0].dtype, len(runs) - 1))
        expected.append(([z.shape for z in arrays[:6]], arrays[0].dtype, len(runs) - 1))
    answers = converse(program, message, expected)
    found = []
    for ((y, last, kept), differ), (gradients, also) in zip(answers[::2], answers[1::2], strict=True):
        np.testing.assert_array_equal(kept[:, -1], last)
        found.append(((y, last, *gradients), np.concatenate([differ, also])))
    return found


def check(program, dtype, questions):
    for (p, options), (results, differing) in zip(questions, ask(program, dtype, questions), strict=True):
        bound = 1e-13 if dtype == "float64" else 3e-3 if options.get("projection") == TF32 else 2e-6
        for name, ours, exact in zip(NAMES, results, truth(p, dtype), strict=True):
            assert relative_error(ours, exact) < bound, f"{name}: {p.label}, {options}"
        assert not differing.any(), f"{p.label}: bits depend on the schedule"


@pytest.fixture(scope="module")
def program():
    return build("-O1", FEW, name="ssm_on_host")


@pytest.fixture(scope="module")
def unlimited():
    return build("-O1", name="ssm_on_host")


SIZES = (  # (B, L, D, P): tiles hold 256 steps of up to 16 states, 128 of 32 and 64 of 64
    (1, 1, 1, 1),
    (2, 63, 3, 5),
    (1, 64, 4, 2),
    (1, 65, 20, 31),
    (3, 257, 8, 16),
    (1, 130, 9, 64),  # three tiles, so that blocks look back
    (2, 255, 256, 3),
    (1, 200, 130, 30),  # products in several passes over the features
    (1, 128 * 17 + 5, 4, 32),  # two groups
    (3, 256 * 9 + 1, 2, 4),  # runs of two tiles
    (2, 64 * 50 + 7, 4, 40),  # runs of eight
    (49, 70, 3, 2),  # many rows, four to a block
    (9, 70, 3, 33),  # two, which are too short to leave sums of their own
)


def questions(sizes, dtype="float32", **options):
    """Every other one with resets, of all rows or of each, and off 16 bytes; two schedules of each but the slowest."""
    found = []
    for i, (batch, length, width, states) in enumerate(sizes):
        p = problem(batch, length, width, states if dtype == "float32" else -(-states // 2), reset=i % 2 == 1, seed=i)
        if i % 4 == 1:
            p = p._replace(reset=p.reset[:1])
        runs = (Run(seed=i), Run(3, 2, i + 1))[: 1 if batch > 40 else 2]
        found.append((p, {"runs": runs, "shift": i % 2, **options}))
    return found


def test_every_path(program):
    check(program, "float32", questions(SIZES))


def test_float64(program, x64):
    check(program, "float64", questions(SIZES, "float64"))


def test_tensor_cores(program):
    """As exact as float32, or as TF32 and no better. Shared memory begins as NaN: no padding is multiplied."""
    few = [(1, 1, 1, 1), (2, 63, 3, 5), (1, 65, 20, 31), (1, 257, 8, 16), (1, 70, 130, 30)]
    check(program, "float32", [(p, o | {"runs": (Run(),)}) for p, o in questions(few, projection=SPLIT_TF32)])
    rounded = questions([(1, 257, 8, 16)], projection=TF32)
    check(program, "float32", rounded)
    (((y, *_), _),) = ask(program, "float32", rounded)
    assert relative_error(y, truth(rounded[0][0], "float32")[0]) > 1e-5


def test_same_bits_for_any_grid_and_schedule(program):
    """4 grids x 5 schedules, over two groups of tiles."""
    p = problem(1, 128 * 19 + 3, 3, 32, radius=(0.999, 0.99999), reset=True)
    check(program, "float32", [(p, {"runs": SCHEDULES})])


def test_same_bits_off_alignment(program):
    """Threads then move single numbers, in the same tiles."""
    p = problem(2, 700, 12, 16, reset=True)
    (there, _), (here, _) = ask(program, "float32", [(p, {}), (p, {"shift": 1})])
    for x, y in zip(there, here, strict=True):
        np.testing.assert_array_equal(x, y)


def test_nan_stays_in_its_row_and_a_reset_ends_it(program):
    """The NaN is the very bit pattern that marks an empty slot: whoever waited for it would wait for ever."""
    p = problem(2, 64 * 20, 3, 40)
    flags = np.zeros((2, 64 * 20), bool)
    flags[0, 900] = True
    p.inputs[0][0, 500, 1] = p.g[0, 990, 1] = np.uint64(-1 % 2**64).view(np.float64)
    (((y, last, du, *_), _),) = ask(program, "float32", [(p._replace(reset=flags), {})])
    step = np.arange(64 * 20)
    np.testing.assert_array_equal(np.isnan(y).any(-1), [(step >= 500) & (step < 900), step < 0])
    np.testing.assert_array_equal(np.isnan(du).any(-1), [(step >= 900) & (step <= 990), step < 0])
    assert not np.isnan(last).any()


def test_growth_from_nothing_stays_nothing(program):
    """|a|^4096, the power over a group of tiles, overflows; a state of zero stays zero all the same."""
    p = problem(1, 256 * 80, 2, 2, radius=(1.9, 2.0))
    for z in (*p.inputs[::5], p.g, p.g_last):
        z[...] = 0
    p.inputs[0][0, -3:] = p.g[0, :3] = 1
    ((results, _),) = ask(program, "float32", [(p, {})])
    assert all(np.isfinite(z).all() for z in results)
    assert relative_error(results[1], truth(p, "float32")[1]) < 1e-6


@pytest.mark.skipif(not CUDA.live, reason=CUDA.detail)
def test_sizes_that_are_not_taken():
    """As far as shared memory goes; and numbers of tiles that the kernels cannot count."""
    size = lambda *shape, scalar=4: _native._backend("cuda")[1].ssm_workspace_bytes(
        "s5eqx_ssm_backward", *shape, scalar
    )
    for shape, scalar in (((1, 9, 256, 64), 4), ((1, 9, 256, 32), 8), ((0, 9, 1, 1), 4), ((1, 0, 1, 1), 4)):
        assert size(*shape, scalar=scalar) >= 16
    for shape, scalar in (((1, 9, 257, 1), 4), ((1, 9, 1, 65), 4), ((1, 9, 1, 33), 8), ((1, 9, 0, 1), 4)):
        assert size(*shape, scalar=scalar) == -1
    with pytest.raises(ValueError, match=rf"fewer than 2\^30; got B = {2**31} and L = 4. Split the batch"):
        size(2**31, 4, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "radius"), [(5_003, 0.999), (20_011, 0.9999), (131_072, 0.99999), (1_048_576, 0.999999)]
)
def test_long_memory(unlimited, length, radius):
    """Forward and gradients stay at the rounding of float32, in the Euclidean norm that such errors are quoted in.

    Prints a row of BENCHMARKS.md.
    """
    p = problem(1, length, 4, 16, radius=(radius, radius))
    ((results, _),) = ask(unlimited, "float32", [(p, {})])
    found = {
        name: np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        for name, ours, exact in zip(NAMES, results, truth(p, "float32"), strict=True)
    }
    print(f"\n| {radius} | {length:,} | " + " | ".join(f"{name} {error:.1e}" for name, error in found.items()) + " |")
    assert max(found.values()) < 1e-6


@pytest.mark.slow
def test_tensor_cores_on_every_path(program):
    check(program, "float32", questions(SIZES, projection=SPLIT_TF32))


@pytest.mark.slow
def test_same_bits_over_super_groups(unlimited):
    """More than 256 tiles, in either pass, so that the chain of published states is used."""
    p = problem(1, 128 * 260 + 5, 2, 32, radius=(0.999, 0.99999), reset=True)
    check(unlimited, "float32", [(p, {"runs": SCHEDULES[::3]})])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sanitizers(dtype, x64):
    """Address and undefined-behaviour sanitizers, over most sizes of `test_every_path`, and runs of two tiles."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", FEW)
    found = questions((*SIZES[:9], (5, 64 * 6 + 1, 3, 33), SIZES[-1]), dtype)
    if dtype == "float32":
        found += questions(SIZES[:6], projection=SPLIT_TF32)
    check(build(*flags, name="ssm_on_host"), dtype, found)
