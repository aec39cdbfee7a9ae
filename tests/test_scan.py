"""The diagonal scan: every implementation against a loop in double precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit, recurrence, recurrence_vjp, relative_error, slow
from scan_problems import BACKENDS, LAYOUTS, OF_EACH_KERNEL, check, native, plain_scan, problem, solve

from s5eqx.ops import diagonal_scan, use_backend
from s5eqx.ops._scan_reference import blocked


@pytest.fixture(params=OF_EACH_KERNEL)
def layout(request):
    chosen = LAYOUTS[request.param]
    if chosen.is_double:
        request.getfixturevalue("x64")
    return chosen


@pytest.mark.parametrize("name", ["complex128", "pairs64"])
def test_the_loop_that_judges_the_others(name, x64):
    """Its hand-written cotangents are those of JAX, in both conventions."""
    layout = LAYOUTS[name]
    p = problem(layout, (), 7, 3, a=(7, 3))

    def f(*stored):
        a, b, x0 = (z[..., 0] + 1j * z[..., 1] if layout.pairs else z for z in stored)
        x = plain_scan(a, b, x0)
        return jnp.stack([x.real, x.imag], -1) if layout.pairs else x

    @quick_jit
    def everything(g, *stored):
        x, pull = jax.vjp(f, *stored)
        return x, pull(g)

    with jax.numpy_dtype_promotion("standard"):
        x, cotangents = everything(*map(layout.store, (p.g, *p.arrays)))
    truth = recurrence_vjp(*p.arrays, p.g, conjugate=layout.pairs)
    assert relative_error(layout.read(x), truth[0]) < 1e-14
    for ours, exact in zip(cotangents, truth[1], strict=True):
        assert relative_error(layout.read(ours), exact) < 1e-14


@native
def test_native_lengths(layout):
    """1, 2, primes, powers of two, and the kernel's blocks: one less, equal, one more, several."""
    states = 16
    block = layout.block(states)
    lengths = [1, 2, 3, 7, 31, 64, 127, 257, block - 1, block, block + 1, 3 * block + 5]
    problems = [
        problem(layout, (2,), n, states, a=a, reverse=n % 2 == 0) for n in lengths for a in ((states,), (n, states))
    ]
    check(layout, problems)


@native
@pytest.mark.parametrize(
    "dtype, states",
    [
        ("complex64", 5),
        *(slow(*case) for case in (("float32", 5), ("float32", 16), ("complex64", 16))),
        *(slow("complex128", states) for states in (5, 16)),
    ],
)
def test_results_past_the_cache(states, dtype, request):
    """More than 24 MiB go straight to memory. To the bit what each half gives, which goes through the cache."""
    if dtype == "complex128":
        request.getfixturevalue("x64")
    rows = 16  # each a task, whole or half
    length = (25 << 20) // (rows * states * np.dtype(dtype).itemsize)
    b = np.random.default_rng(0).standard_normal((rows, length, 2 * states), np.finfo(dtype).dtype)
    b = b.view(dtype)[..., :states]
    a = b[0, 0] * (0.9 / np.abs(b[0, 0]).max())
    scan = jax.jit(lambda a, b: diagonal_scan(a, b))
    with use_backend("native"):
        whole, halves = scan(a, b), [scan(a, half) for half in np.split(b, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


@native
@pytest.mark.parametrize("numbers", [(1, 2, 3, 4, 7, 8, 16, 17, 31, 33, 64, 67), slow(range(1, 68))])
@pytest.mark.parametrize("name", ["float64", "complex64", *map(slow, ("float32", "complex128"))])
def test_native_numbers_of_channels(name, numbers, request):
    layout = LAYOUTS[name]
    if layout.is_double:
        request.getfixturevalue("x64")
    check(layout, [problem(layout, (1,), 3, n, a=(length_of_a, n)) for n in numbers for length_of_a in (1, 3)])


@native
def test_native_batches(layout):
    """One row, few (split over time), and many (a task each); with resets, shared or not; both directions."""
    states = 67
    length = 2 * layout.block(states) + 3
    problems = [
        problem(layout, (rows,), length, states, a=a, reset=flags, reverse=reverse)
        for rows, reverse in ((1, False), (3, True), (3, False), (9, True))
        for a, flags in (((states,), (length,)), ((rows, length, states), (rows, length)))
    ]
    check(layout, problems)


@native
def test_native_shapes_of_a(layout):
    shapes = [(4,), (1,), (), (1, 4), (5, 4), (5, 1), (3, 1, 4), (1, 5, 4), (3, 5, 4), (3, 5, 1)]
    shapes += [(2, 1, 1, 4), (2, 1, 5, 4), (2, 3, 1, 4), (1, 3, 5, 4), (2, 3, 5, 4), (2, 1, 1, 1), (1, 1, 5, 4)]
    check(layout, [problem(layout, (2, 3), 5, 4, a=a, reset=(3, 5)) for a in shapes])
    check(layout, [problem(layout, (), 5, 4, a=a, reset=(5,)) for a in shapes if len(a) <= 2])


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["float32", "complex64", "pairs32", "pairs64"])
def test_plain_jax(name, request):
    """What runs where no kernel is live, by the same measure."""
    layout = LAYOUTS[name]
    if layout.is_double:
        request.getfixturevalue("x64")
    problems = [
        problem(layout, (), 1, 3, a=(3,)),
        problem(layout, (2,), 13, 3, a=(3,), reset=(13,)),
        problem(layout, (2,), 13, 3, a=(2, 13, 3), reset=(2, 13), reverse=True),
        problem(layout, (2, 2), 300, 5, a=(2, 1, 1, 5), reset=(1, 300), reverse=True),
    ]
    check(layout, problems, backend="jax", tolerance=1e-5)


@pytest.mark.parametrize(
    "name, length, reverse",
    [("complex64", 255, True), ("float32", 257, False), ("complex64", 600, True), ("pairs32", 257, True)],
)
def test_plain_jax_in_blocks(name, length, reverse):
    """The form for accelerators, around its block of 256 steps."""
    layout = LAYOUTS[name]
    p = problem(layout, (2,), length, 3, a=(2, length, 3), reset=(2, length), reverse=reverse)
    run = quick_jit(lambda *z: blocked(*z, reverse=reverse, pairs=layout.pairs)[0])
    x = layout.read(run(*map(layout.store, p.arrays), on_device(p.reset)))
    assert relative_error(x, recurrence(*p.arrays, p.reset, reverse)) < 1e-5


def test_plain_jax_in_blocks_of_nothing():
    for rows, length in ((0, 5), (2, 0)):
        b, x0, flags = map(on_device, (np.ones((rows, length, 3)), np.ones((rows, 3)), np.zeros((1, 0), bool)))
        assert blocked(b[:1, :1], b, x0, flags, reverse=False, pairs=False)[0].shape == b.shape


def associative(a, b, x0):
    """`jax.lax.associative_scan`, as the S5 papers use it."""
    first = b[..., 0, :] + a * x0
    b = jnp.concatenate([first[..., None, :], b[..., 1:, :]], axis=-2)
    combine = lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1])
    return jax.lax.associative_scan(combine, (jnp.broadcast_to(a, b.shape), b), axis=b.ndim - 2)[1]


@native
def test_long_and_nearly_undamped(x64):
    """L = 131,072, |a| = 0.99999: at least 100 times closer to the truth than complex64 `associative_scan`."""
    layout = LAYOUTS["complex64"]
    p = problem(layout, (), 131_072, 4, radius=(0.99999, 0.99999))

    @quick_jit
    def everything(f, g, *arrays):
        x, pull = jax.vjp(f, *arrays)
        return x, *pull(g)

    truth = everything(plain_scan, *(on_device(z, np.complex128) for z in (p.g, *p.arrays)))
    theirs = everything(associative, *map(on_device, (p.g, *p.arrays)))
    ((x, cotangents),) = solve(layout, [p])
    ((plain_x, plain_cotangents),) = solve(layout, [p], "jax")
    for exact, other, ours, plain in zip(truth, theirs, (x, *cotangents), (plain_x, *plain_cotangents), strict=True):
        assert relative_error(ours, exact) < 1e-6
        assert relative_error(ours, exact) * 100 < relative_error(other, exact)
        assert relative_error(plain, exact) < 1e-4


# Numbers that must not spread.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_channel_stays_alone(backend, bad):
    """Its neighbours keep the very bits they have without it, in states and cotangents."""
    layout = LAYOUTS["complex64"]
    length = 2 * layout.block(13) + 3 if backend == "native" else 20
    clean = [problem(layout, (1,), length, 13, a=a) for a in ((13,), (length, 13))]
    spoilt = []
    for p, operand in itertools.product(clean, ("a", "b", "x0", "g")):
        z = getattr(p, operand).copy()
        z.reshape(-1, 13)[0, 5] = bad
        spoilt.append(p._replace(**{operand: z}, label=f"{bad} in {operand} of {p.label}"))
    solutions = solve(layout, clean + spoilt, backend)
    others = np.arange(13) != 5
    for i, p in enumerate(spoilt):
        for ours, alone in zip(*map(jax.tree.leaves, (solutions[2 + i], solutions[i // 4])), strict=True):
            np.testing.assert_array_equal(ours[..., others], alone[..., others], err_msg=p.label)
        if p.label.startswith(f"{bad} in x0"):
            assert not np.isfinite(solutions[2 + i][0][0, 0, 5])


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["float32", "complex64", "pairs32"])
@pytest.mark.parametrize(
    "backend, length",
    [pytest.param("native", 20, marks=native), pytest.param("native", 3000, marks=native), ("jax", 20)],
)
def test_nothing_crosses_a_reset(backend, length, name):
    """Not NaN, not a gradient; the flagged step's own multiplier does not matter either."""
    layout, at = LAYOUTS[name], length // 2
    reset = np.arange(length) == at
    p = problem(layout, (1,), length, 16, a=(length, 16))._replace(reset=reset)
    fresh = p._replace(b=p.b[:, at:], a=p.a[at:], x0=0 * p.x0, g=p.g[:, at:], reset=None)
    b, a, g = p.b.copy(), p.a.copy(), p.g.copy()
    b[:, at - 1], a[at], g[:, :at] = np.nan, np.nan, 0
    spoilt = p._replace(b=b, a=a, g=g)
    (x, (da, db, dx0)), (x_fresh, (da_fresh, db_fresh, _)) = solve(layout, [spoilt, fresh], backend)
    assert np.isnan(x[:, at - 1]).all()
    assert not db[:, :at].any() and not dx0.any() and not da[: at - 1].any()
    for ours, alone in ((x[:, at:], x_fresh), (db[:, at:], db_fresh), (da[at + 1 :], da_fresh[1:])):
        assert relative_error(ours, alone) < 1e-6
    assert not da[at].any()


@native
def test_a_growing_channel_without_input_stays_zero():
    """Between blocks a power of `a` that overflows meets a state of zero."""
    p = problem(LAYOUTS["float32"], (1,), 40_000, 4, a=(4,), radius=(1.5, 1.5))
    b = np.zeros_like(p.b)
    b[:, -1] = 1
    ((x, _),) = solve(LAYOUTS["float32"], [p._replace(b=b, x0=0 * p.x0, g=0 * p.g)])
    np.testing.assert_array_equal(x, b)
