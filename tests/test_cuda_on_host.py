"""The CUDA kernels, run on the host: every path, layout and tail against the float64 loop, and the same bits always.

What cannot be seen here is a GPU's: its speed, and its weaker order of memory, on which the kernels do not count.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_on_host import ELEMENTS, SCHEDULES, Run, all_states, ask, build, case, cotangents, errors, needs_compiler
from helpers import slow
from scan_problems import plain_scan

import s5eqx
from s5eqx.ops import _native

pytestmark = [needs_compiler, pytest.mark.xdist_group("cuda_on_host")]  # which build one program
CUDA = s5eqx.backends()[1]
FORWARD = {"wants_last": True}
LAST_ONLY = {"wants_x": False, "wants_last": True}
BACKWARD = {"backward": True}


def bound(dtype):
    return 2e-6 if dtype in ("float32", "complex64") else 1e-13


def program(dtype, *flags):
    """Of each type of elements one, since a test waits for what it compiles."""
    return build("-O1", f"-DS5EQX_ELEMENT={ELEMENTS.index(dtype)}", *flags)


def sanitized(dtype):
    return program(dtype, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def check(program, questions):
    for (c, options), (results, differing) in zip(questions, ask(program, questions), strict=True):
        for name, error in errors(c, results, **options).items():
            assert error < bound(c.b.dtype.name), f"{name} of {c.label}, {options}"
        assert not differing.any(), f"{c.label}, {options}: bits depend on the schedule"


SHAPES = (  # (B, L, P): tiles hold 256 steps of a full line of channels, and up to 2,048 where channels are few
    (1, 1, 1),
    (2, 7, 3),
    (1, 255, 16),
    (2, 256, 8),
    (1, 257, 33),
    (1, 2049, 1),
    (3, 1100, 5),
    (1, 256 * 17 + 5, 16),  # more tiles than a block takes alone, in two groups: blocks look back
    (3, 256 * 6 + 7, 37),  # the same, with several tiles of channels
    (1060, 2, 1),  # many chains
)


@pytest.mark.parametrize("dtype", ["complex64", *map(slow, ("float32", "float64", "complex128"))])
def test_every_path(dtype):
    questions = []
    for i, (batch, length, states) in enumerate(SHAPES):
        for varying in (False, True):
            c = case(
                dtype,
                batch,
                length,
                states,
                varying=varying,
                flags=(0, 1, batch)[i % 3],
                reverse=(i + varying) % 2 == 1,
            )
            runs = (Run(seed=i), Run(2, 1, i + 1))[: 1 if batch > 1000 else 2]
            questions += [(c, FORWARD | {"runs": runs}), (c, BACKWARD | {"conjugate": i % 2 == 0, "runs": runs})]
    for length in (1300, 2600):  # on either path
        own_a = case(dtype, 3, length, 11, a_rows=3, flags=3, reverse=True)
        questions += [(own_a, FORWARD), (own_a, BACKWARD), (own_a, LAST_ONLY)]
    check(program, questions)


@pytest.mark.parametrize("varying", [False, True])
def test_same_bits_for_any_grid_and_schedule(varying):
    """4 grids x 5 schedules, over two groups of tiles."""
    c = case("complex64", 2, 256 * 18 + 3, 4, varying=varying, flags=1, radius=(0.999, 0.99999))
    check(program, [(c, {**FORWARD, "runs": SCHEDULES}), (c, {**BACKWARD, "runs": SCHEDULES[::3]})])


@pytest.mark.parametrize(
    ("dtype", "length", "states"), [("complex64", 5000, 8), slow("float32", 5000, 8), slow("float64", 256 * 70, 16)]
)
def test_same_bits_off_alignment(dtype, length, states):
    """Threads then take single channels, in the same tiles of time."""
    c = case(dtype, 2, length, states, flags=2)
    for options in (FORWARD, BACKWARD):
        (there, _), (here, _) = ask(program, [(c, options), (c, {**options, "shift": 1})])
        for x, y in zip(there, here, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_final_state_alone_is_the_last_of_all():
    """To the bit, on either path, though most of its tiles never learn the state that enters them."""
    for length in (500, 5000):
        for varying in (False, True):
            c = case("complex64", 2, length, 12, varying=varying, flags=1)
            ((x, last), _), ((alone,), _) = ask(program, [(c, FORWARD), (c, LAST_ONLY)])
            np.testing.assert_array_equal(last, x[:, -1])
            np.testing.assert_array_equal(alone, last)


@pytest.mark.parametrize("varying", [False, True])
def test_nan_stays_in_its_channel_and_a_reset_ends_it(varying):
    """The NaN is the very bit pattern that marks an empty slot: whoever waited for it would wait for ever."""
    c = case("complex64", 1, 256 * 20, 4, varying=varying, flags=1)
    c.reset[:] = False
    c.reset[0, 4000] = True
    c.b.view(np.uint64)[0, 700, 2] = ~np.uint64(0)
    ((x, last), _), ((db, *_), _) = ask(program, [(c, FORWARD), (c._replace(g=c.b), BACKWARD)])
    poisoned = np.isnan(x[0])
    assert poisoned[700:4000, 2].all() and poisoned.sum() == 3300 and not np.isnan(last).any()
    assert (
        np.isnan(db[0, :701, 2]).all() and not np.isnan(db[0, 701:]).any() and not np.isnan(db[0, :, (0, 1, 3)]).any()
    )


def test_growth_from_nothing_stays_nothing():
    """|a|^2048, the power over a tile, overflows; a state of zero stays zero all the same."""
    c = case("complex64", 1, 2048 * 6, 2, radius=(1.9, 2.0))
    c.b[:] = 0
    c.x0[:] = 0
    c.b[0, -3:] = 1
    with np.errstate(all="raise"):
        check(program, [(c, FORWARD)])


@pytest.mark.skipif(not CUDA.live, reason=CUDA.detail)
@pytest.mark.parametrize(("batch", "states"), [(2**31, 1), (1, 2**31), (2**27, 2**10)])
def test_more_than_the_kernels_count_is_refused(batch, states):
    """When the program is compiled, before anything is allocated."""
    with pytest.raises(
        ValueError, match=rf"fewer than 2\^30; got B = {batch}, L = 4 and P = {states}. Split the batch"
    ):
        _native.workspace_bytes("cuda", "s5eqx_scan_forward", (1, 1, states), (batch, 4, states), jnp.float32, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "radius", "limit"),
    [(5_003, 0.999, 5e-7), (20_011, 0.9999, 5e-7), (131_072, 0.99999, 5e-7), (1_048_576, 0.999999, 5e-7)],
)
def test_long_memory(length, radius, limit):
    """Forward and gradients stay at the rounding of float32, in the Euclidean norm that such errors are quoted in.

    Prints a row of BENCHMARKS.md.
    """
    c = case("complex64", 1, length, 16, radius=(radius, radius))
    (xs, _), (backward, _) = ask(program, [(c, {}), (c, {**BACKWARD, "conjugate": True})])
    results = dict(zip(("x", "lambda", "da", "dx0"), (*xs, *backward), strict=True))
    truth = dict(zip(results, (all_states(c)[0], *cotangents(c, conjugate=True)), strict=True))
    others = {"associative_scan": associative_scan, "lax.scan": plain_scan}
    for name, scan in others.items():
        results[name], truth[name] = scan(c.a[0], c.b[0], c.x0[0])[None], truth["x"]
    found = {name: np.linalg.norm(z - truth[name]) / np.linalg.norm(truth[name]) for name, z in results.items()}
    print(f"\n| {radius} | {length:,} | " + " | ".join(f"{error:.1e}" for error in found.values()) + " |")
    assert max(error for name, error in found.items() if name not in others) < limit
    if length > 100_000:
        assert found["x"] < found["lax.scan"] / 20 and found["x"] < found["associative_scan"] / 1000


def associative_scan(a, b, x0):
    """From a state of `x0`, which enters with the first step."""
    b = jnp.asarray(b).at[0].add(a[0] * x0)
    combine = lambda early, late: (late[0] * early[0], late[0] * early[1] + late[1])
    return jax.lax.associative_scan(combine, (jnp.broadcast_to(a, b.shape), b))[1]


@pytest.mark.slow
@pytest.mark.parametrize("varying", [False, True])
def test_same_bits_over_super_groups(varying):
    """More than 256 tiles, so that the chain of published states is used."""
    c = case("complex64", 1, (256 if not varying else 128) * 260, 16, varying=varying, flags=1, radius=(0.999, 0.99999))
    runs = {"runs": SCHEDULES}
    check(program, [(c, FORWARD | runs), (c, LAST_ONLY | runs), (c, BACKWARD | runs)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_sanitizers(dtype):
    """Address and undefined-behaviour sanitizers, over the shapes of `test_every_path` and a longer chain."""
    questions = []
    for i, (batch, length, states) in enumerate((*SHAPES[:8], (2, 256 * 33 + 1, 4))):
        for varying in (False, True):
            c = case(dtype, batch, length, states, varying=varying, flags=i % 3 and 1, reverse=i % 2 == 1)
            runs = {"runs": (Run(seed=i), Run(5, 4, i)), "shift": i % 2}
            questions += [(c, FORWARD | runs), (c, LAST_ONLY | runs), (c, BACKWARD | runs)]
    check(sanitized, questions)
