"""The diagonal scan: every implementation against a loop in double precision, and every transformation of JAX."""

import contextlib
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recurrence, recurrence_vjp, relative_error, to_complex, to_pairs
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

import s5eqx
from s5eqx.ops import diagonal_scan, diagonal_scan_pairs, final_state, use_backend
from s5eqx.ops._scan_reference import blocked

native = pytest.mark.skipif(not s5eqx.backends()[0].live, reason=s5eqx.backends()[0].detail)
BLOCK_BYTES = 128 << 10  # kBlockBytes of csrc/scan.cc


class Layout(NamedTuple):
    """How the numbers of a problem are stored."""

    dtype: str
    pairs: bool = False

    @property
    def is_complex(self):
        return self.pairs or self.dtype.startswith("complex")

    @property
    def is_double(self):
        return self.dtype in ("float64", "complex128")

    def block(self, states):
        """Steps in one block of the kernel."""
        return BLOCK_BYTES // (states * np.dtype(self.dtype).itemsize * (1 + self.pairs))

    def draw(self, rng, shape):
        z = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if self.is_complex else 0)
        return self.rounded(z)

    def rounded(self, z):
        single = np.complex64 if self.is_complex else np.float32
        return z if self.is_double else z.astype(single)

    def store(self, z):
        return jnp.asarray(to_pairs(z) if self.pairs else z, self.dtype)

    def read(self, x):
        assert x.dtype == self.dtype
        return to_complex(x) if self.pairs else np.asarray(x)

    def scan(self, a, b, x0=None, **options):
        return (diagonal_scan_pairs if self.pairs else diagonal_scan)(a, b, x0, **options)


LAYOUTS = {
    "float32": Layout("float32"),
    "float64": Layout("float64"),
    "complex64": Layout("complex64"),
    "complex128": Layout("complex128"),
    "pairs32": Layout("float32", pairs=True),
    "pairs64": Layout("float64", pairs=True),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    chosen = LAYOUTS[request.param]
    if chosen.is_double:
        request.getfixturevalue("x64")
    return chosen


class Problem(NamedTuple):
    a: np.ndarray
    b: np.ndarray
    x0: np.ndarray
    g: np.ndarray
    reset: np.ndarray | None
    reverse: bool
    label: str

    @property
    def arrays(self):
        return self.a, self.b, self.x0


def problem(layout, batch, length, states, *, a=None, radius=(0.3, 0.999), reset=False, reverse=False, seed=0):
    """A random problem; `a` is the shape of the multipliers, (P,) if not given, `reset` the shape of the flags."""
    rng = np.random.default_rng(seed)
    a_shape = (states,) if a is None else a
    modulus = rng.uniform(*radius, a_shape)
    phase = rng.uniform(0, 2 * np.pi, a_shape)
    multiplier = modulus * (np.exp(1j * phase) if layout.is_complex else np.sign(np.cos(phase)))
    shape = (*batch, length, states)
    return Problem(
        layout.rounded(multiplier),
        layout.draw(rng, shape),
        layout.draw(rng, (*batch, states)),
        layout.draw(rng, shape),
        rng.random(reset) < 0.1 if reset else None,
        reverse,
        f"b {shape}, a {a_shape}, reset {reset}, reverse {reverse}",
    )


def solve(layout, problems, backend="native"):
    """States and cotangents of a, b and x0 of all problems, by one compiled program."""

    def everything(inputs):
        results = []
        for p, (a, b, x0, g) in zip(problems, inputs, strict=True):
            x, pull = jax.vjp(lambda *z, p=p: layout.scan(*z, reset=p.reset, reverse=p.reverse), a, b, x0)
            results.append((x, pull(g)))
        return results

    inputs = [[layout.store(z) for z in (*p.arrays, p.g)] for p in problems]
    with use_backend(backend):
        return jax.tree.map(layout.read, jax.jit(everything)(inputs))


def check(layout, problems, backend="native", tolerance=2e-6):
    bound = 1e-12 if layout.is_double else tolerance
    for p, (x, cotangents) in zip(problems, solve(layout, problems, backend), strict=True):
        truth = recurrence_vjp(*p.arrays, p.g, p.reset, p.reverse, conjugate=layout.pairs)
        names = ("x", "cotangent of a", "of b", "of x0")
        for name, ours, exact in zip(names, (x, *cotangents), (truth[0], *truth[1]), strict=True):
            assert ours.shape == exact.shape, f"{name}: {p.label}"
            assert relative_error(ours, exact) < bound, f"{name}: {p.label}"


def plain_scan(a, b, x0):
    """Time-varying or not, on one example, in plain JAX: the other side of the tests of transformations."""

    def step(x, inputs):
        x = inputs[0] * x + inputs[1]
        return x, x

    return jax.lax.scan(step, x0, (jnp.broadcast_to(a, b.shape), b))[1]


@pytest.mark.parametrize("name", ["complex128", "pairs64"])
def test_the_loop_that_judges_the_others(name, x64):
    """Its hand-written cotangents are those of JAX, in both conventions."""
    layout = LAYOUTS[name]
    p = problem(layout, (), 7, 3, a=(7, 3))

    def f(*stored):
        a, b, x0 = (z[..., 0] + 1j * z[..., 1] if layout.pairs else z for z in stored)
        x = plain_scan(a, b, x0)
        return jnp.stack([x.real, x.imag], -1) if layout.pairs else x

    with jax.numpy_dtype_promotion("standard"):
        x, pull = jax.vjp(f, *map(layout.store, p.arrays))
    truth = recurrence_vjp(*p.arrays, p.g, conjugate=layout.pairs)
    assert relative_error(layout.read(x), truth[0]) < 1e-14
    for ours, exact in zip(pull(layout.store(p.g)), truth[1], strict=True):
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
@pytest.mark.parametrize("name", ["float32", "float64", "complex64", "complex128"])
def test_native_numbers_of_channels(name, request):
    layout = LAYOUTS[name]
    if layout.is_double:
        request.getfixturevalue("x64")
    for length_of_a in (1, 3):
        check(layout, [problem(layout, (1,), 3, n, a=(length_of_a, n)) for n in range(1, 68)])


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
    run = jax.jit(lambda *z: blocked(*z, reverse=reverse, pairs=layout.pairs)[0])
    x = layout.read(run(*map(layout.store, p.arrays), jnp.asarray(p.reset)))
    assert relative_error(x, recurrence(*p.arrays, p.reset, reverse)) < 1e-5


def test_plain_jax_in_blocks_of_nothing():
    for rows, length in ((0, 5), (2, 0)):
        b, x0, flags = jnp.ones((rows, length, 3)), jnp.ones((rows, 3)), jnp.zeros((1, 0), bool)
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

    def everything(f, dtype):
        x, pull = jax.vjp(f, *(jnp.asarray(z, dtype) for z in p.arrays))
        return x, *pull(jnp.asarray(p.g, dtype))

    truth = jax.jit(lambda: everything(plain_scan, jnp.complex128))()
    theirs = jax.jit(lambda: everything(associative, jnp.complex64))()
    ((x, cotangents),) = solve(layout, [p])
    ((plain_x, plain_cotangents),) = solve(layout, [p], "jax")
    for exact, other, ours, plain in zip(truth, theirs, (x, *cotangents), (plain_x, *plain_cotangents), strict=True):
        assert relative_error(ours, exact) < 1e-6
        assert relative_error(ours, exact) * 100 < relative_error(other, exact)
        assert relative_error(plain, exact) < 1e-4


# Numbers that must not spread.


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "jax"])
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


# Transformations. `pairs` are real functions, so that they show every derivative of the complex case too.


def loss_of(scan, reset=None, reverse=False):
    def loss(a, b, x0):
        x = scan(a, b, x0) if reset is None else scan(a, b, x0, reset=reset, reverse=reverse)
        return jnp.sum(jnp.sin(x) * jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)))

    return loss


@pytest.mark.parametrize("name", ["float64", "complex128", "pairs64"])
@pytest.mark.parametrize("varying", [False, True])
def test_check_grads(name, varying, x64):
    layout = LAYOUTS[name]
    p = problem(layout, (), 4, 2, a=(4, 2) if varying else None)
    reset = jnp.array([False, False, True, False]) if varying else None
    f = jax.jit(lambda a, b, x0: layout.scan(a, b, x0, reset=reset, reverse=varying))
    check_grads(f, [*map(layout.store, p.arrays)], order=2, modes=("fwd", "rev"))


def test_second_derivatives_in_every_order(x64):
    """Forward over reverse, reverse over reverse, reverse over forward; mapped, since Jacobians map."""
    p = problem(LAYOUTS["float64"], (), 4, 2)
    arrays = [*map(jnp.asarray, p.arrays)]
    hessians = [
        lambda f: jax.jacfwd(jax.jacrev(f, (0, 1, 2)), (0, 1, 2)),
        lambda f: jax.jacrev(jax.jacrev(f, (0, 1, 2)), (0, 1, 2)),
        lambda f: jax.jacrev(jax.jacfwd(f, (0, 1, 2)), (0, 1, 2)),
    ]
    expected = jax.jit(hessians[0](loss_of(plain_scan)))(*arrays)
    for hessian in hessians:
        ours = jax.jit(hessian(loss_of(diagonal_scan)))(*arrays)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, expected)


def test_checkpoint_linearize_and_hessian_vector_products(x64):
    p = problem(LAYOUTS["float64"], (2,), 6, 3)
    arrays = tuple(map(jnp.asarray, p.arrays))
    directions = jax.tree.map(jnp.cos, arrays)
    loss = loss_of(diagonal_scan)
    gradient = jax.grad(loss, (0, 1, 2))

    @jax.jit
    def results():
        remade = jax.grad(jax.checkpoint(loss), (0, 1, 2))(*arrays)
        value, pushed = jax.linearize(loss, *arrays)
        products = jax.jvp(gradient, arrays, directions)[1]
        slope = lambda *z: jax.jvp(loss, z, directions)[1]
        again = jax.grad(slope, (0, 1, 2))(*arrays)
        kept = jax.jvp(jax.grad(jax.checkpoint(loss), (0, 1, 2)), arrays, directions)[1]
        return (gradient(*arrays), remade), (products, again, kept), (pushed(*directions), slope(*arrays)), value

    gradients, products, slopes, value = results()
    np.testing.assert_allclose(value, loss(*arrays), rtol=1e-14)
    for first, *others in (gradients, products, slopes):
        for other in others:
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), first, other)
    expected = sum(jnp.vdot(x, y) for x, y in zip(gradients[0], directions, strict=True))
    np.testing.assert_allclose(slopes[0], expected, rtol=1e-12)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "jax"])
def test_vmap_over_every_subset_of_the_arguments(backend):
    """Each of a, b, x0 and reset mapped or not, along any axis, to any axis; states and cotangents."""
    length, states, count = 6, 3, 4
    layout = LAYOUTS["complex64"]
    problems = [problem(layout, (), length, states, reset=(length,), seed=seed) for seed in range(count)]
    g = problems[0].g
    subsets = [s for s in itertools.product((False, True), repeat=4) if any(s)]

    def everything(a, b, x0, reset):
        x, pull = jax.vjp(lambda *z: diagonal_scan(*z, reset=reset), a, b, x0)
        return x, pull(g)

    @jax.jit
    def all_subsets(stacked):
        results = []
        for i, subset in enumerate(subsets):
            axes = [i % (z.ndim) if chosen else None for z, chosen in zip(stacked, subset, strict=True)]
            operands = [z[0] if n is None else jnp.moveaxis(z, 0, n) for z, n in zip(stacked, axes, strict=True)]
            mapped = jax.vmap(everything, in_axes=axes, out_axes=(i % 3, (0, 2, 1)))
            results.append(mapped(*operands))
        return results

    stacked = [jnp.stack(z) for z in zip(*((*p.arrays, p.reset) for p in problems), strict=True)]
    with use_backend(backend):
        solutions = all_subsets(stacked)
    for i, (subset, (x, (da, db, dx0))) in enumerate(zip(subsets, solutions, strict=True)):
        ours = [np.moveaxis(z, n, 0) for z, n in ((x, i % 3), (da, 0), (db, 2), (dx0, 1))]
        for row in range(count):
            a, b, x0, reset = (z[row if chosen else 0] for z, chosen in zip(stacked, subset, strict=True))
            truth = recurrence_vjp(a, b, x0, g, reset)
            for z, exact in zip(ours, (truth[0], *truth[1]), strict=True):
                assert relative_error(z[row], exact) < 2e-6, subset


@pytest.mark.parametrize("a_shape", [(3,), (5, 3)])
def test_nested_vmap(a_shape, x64):
    """Over an inner batch axis too, time-varying and not, with the derivative inside and outside."""
    rng = np.random.default_rng(0)
    a, b, x0 = (jnp.asarray(rng.uniform(-1, 1, s)) for s in ((2, *a_shape), (4, 2, 5, 3), (4, 3)))

    def nested(scan):
        mapped = jax.vmap(jax.vmap(scan, in_axes=(0, 0, None)), in_axes=(None, 0, 0), out_axes=1)
        inside = jax.vmap(jax.vmap(jax.grad(loss_of(scan), (0, 1, 2)), (0, 0, None)), (None, 0, 0), 2)
        crossed = jax.vmap(jax.vmap(scan, in_axes=(None, 0, 0)), in_axes=(0, 1, None))
        outside = jax.grad(lambda *z: jnp.sum(jnp.sin(mapped(*z))), (0, 1, 2))
        pushed = jax.vmap(lambda x0: jax.jvp(mapped, (a, b, x0), (a, b, x0)), out_axes=1)
        return mapped(a, b, x0), inside(a, b, x0), crossed(a, b, x0), outside(a, b, x0), pushed(x0[None])

    ours, expected = jax.jit(lambda: (nested(diagonal_scan), nested(plain_scan)))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, expected)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "jax"])
@pytest.mark.parametrize("axis", ["batch", "state"])
def test_shard_map(axis, backend, x64):
    """Over two devices: a replicated multiplier gets the gradient of both, by reverse, forward and mixed mode."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    one, every = PartitionSpec("d"), PartitionSpec()
    if axis == "batch":
        specs = (every, one, one, every)
    else:
        specs = (one, PartitionSpec(None, None, "d"), PartitionSpec(None, "d"), every)
    p = problem(LAYOUTS["complex128"], (4,), 6, 2, reset=(1, 6))
    reset = jnp.asarray(p.reset)
    arrays = tuple(map(jnp.asarray, p.arrays))
    energy = lambda x: jnp.sum(jnp.abs(jnp.sin(x)))

    def local(a, b, x0, reset):
        return jax.lax.psum(energy(diagonal_scan(a, b, x0, reset=reset)), "d")

    def whole(a, b, x0):
        return energy(diagonal_scan(a, b, x0, reset=reset))

    def derivatives(f):
        gradient = jax.grad(f, (0, 1, 2))
        return gradient(*arrays), jax.jvp(f, arrays, arrays), jax.jvp(gradient, arrays, arrays)[1]

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=every)
    inside = jax.shard_map(lambda *z: jax.grad(local, (0, 1, 2))(*z), mesh=mesh, in_specs=specs, out_specs=specs[:3])
    unchecked = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=every, check_vma=False)
    with use_backend(backend):
        expected = jax.jit(lambda: derivatives(whole))()
        ours = jax.jit(lambda: derivatives(lambda *z: sharded(*z, reset)))()
        within = jax.jit(lambda: inside(*arrays, reset))()
        loose = jax.jit(lambda: jax.grad(lambda *z: unchecked(*z, reset), (0, 1, 2))(*arrays))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, expected)
    for gradient in (within, loose):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), gradient, expected[0])


# Edges.


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "jax"])
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(shape, backend):
    p = problem(LAYOUTS["complex64"], shape[:1], *shape[1:])
    with use_backend(backend):
        for a in (p.a, p.a[None, None], np.ones(shape, np.complex64)):
            arrays = a, p.b, p.x0
            x, pull = jax.vjp(diagonal_scan, *map(jnp.asarray, arrays))
            cotangents = pull(x)
            assert x.shape == shape
            assert [z.shape for z in cotangents] == [z.shape for z in arrays]
            assert not any(z.any() for z in cotangents)
        last = final_state(p.a, p.b, p.x0)
        assert last.shape == p.x0.shape
        if shape[1] == 0:
            np.testing.assert_array_equal(last, p.x0)


@pytest.mark.parametrize("reverse", [False, True])
def test_final_state(reverse):
    p = problem(LAYOUTS["complex64"], (2,), 7, 3, reverse=reverse)
    expected = recurrence(*p.arrays, reverse=reverse)[:, 0 if reverse else -1]
    assert relative_error(final_state(*p.arrays, reverse=reverse), expected) < 1e-6


def test_eager_is_jitted_and_numpy_serves():
    p = problem(LAYOUTS["float32"], (2,), 50, 5, reset=(50,))
    eager = diagonal_scan(*p.arrays, reset=p.reset)
    assert isinstance(eager, jax.Array) and eager.dtype == jnp.float32
    np.testing.assert_array_equal(eager, jax.jit(diagonal_scan)(*p.arrays, reset=p.reset))
    np.testing.assert_array_equal(
        diagonal_scan(p.a, p.b, reset=p.reset), diagonal_scan(p.a, p.b, 0 * p.x0, reset=p.reset)
    )


@native
@pytest.mark.parametrize("rows", [1, 9])
def test_the_same_bits_every_time(rows):
    layout = LAYOUTS["complex64"]
    p = problem(layout, (rows,), 5000, 16, radius=(0.999, 0.999))
    inputs = [layout.store(z) for z in (*p.arrays, p.g)]

    @jax.jit
    def everything(a, b, x0, g):
        x, pull = jax.vjp(diagonal_scan, a, b, x0)
        return x, pull(g)

    first = jax.tree.map(np.asarray, everything(*inputs))
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, everything(*inputs), first)


@contextlib.contextmanager
def counted_compilations():
    seen = []
    counting = [True]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: seen.append(event) if counting[0] and "backend_compile" in event else None
    )
    yield seen
    counting[0] = False


def test_the_second_eager_call_compiles_nothing():
    p = problem(LAYOUTS["complex64"], (2,), 11, 3, reset=(11,))
    arrays = [*map(jnp.asarray, p.arrays)]

    def call():
        x, pull = jax.vjp(lambda *z: diagonal_scan(*z, reset=p.reset), *arrays)
        return pull(x)

    with counted_compilations() as first:
        call()
    with counted_compilations() as second:
        call()
    assert first and not second


# Backends.


@native
def test_use_backend_switches_a_jitted_function():
    """The backend is part of jit's cache key, and what runs is what was asked for."""
    layout = LAYOUTS["complex64"]
    p = problem(layout, (1,), 2000, 4, radius=(0.999, 0.999))
    arrays = [*map(layout.store, p.arrays)]
    traced = []

    @jax.jit
    def f(a, b, x0):
        traced.append(s5eqx.ops._backend.current_backend())
        return diagonal_scan(a, b, x0)

    results = {}
    for backend in ("native", "jax", "native", "jax"):
        with use_backend(backend):
            results.setdefault(backend, []).append(np.asarray(f(*arrays)))
            assert ("s5eqx_scan_forward" in f.lower(*arrays).as_text()) == (backend == "native")
    assert traced[:2] == ["native", "jax"] and len(results) == 2
    for first, again in results.values():
        np.testing.assert_array_equal(first, again)
    truth = recurrence(*p.arrays)
    errors = {backend: relative_error(x[0], truth) for backend, x in results.items()}
    assert errors["native"] < 2e-7 < errors["jax"] < 1e-4  # double states against single ones
    calls = len(traced)
    for backend in ("jax", "native"):
        with use_backend(backend):
            f(*arrays)
    assert len(traced) == calls


@native
def test_the_gradient_keeps_the_backend_of_its_forward_pass():
    a, b = jnp.ones(2) / 2, jnp.ones((3, 2))
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(diagonal_scan(a, b) ** 2)))
    for backend, expected in (("native", True), ("jax", False)):
        with use_backend(backend):
            text = gradient.lower(b).as_text()
        assert ("s5eqx_scan_forward" in text) == expected


@native
def test_backends_of_other_platforms():
    """No kernel there: "auto" lowers to plain JAX, "native" says what is missing."""
    b = jnp.ones((3, 2))
    for platform in ("cuda", "tpu"):
        if platform in [x.platform for x in s5eqx.backends() if x.live]:
            continue
        scan = jax.jit(lambda b: diagonal_scan(b[0], b))
        assert "s5eqx_scan_" not in scan.trace(b).lower(lowering_platforms=(platform,)).as_text()
        with use_backend("native"), pytest.raises(RuntimeError, match=r'not live on .*Use "auto"'):
            scan.trace(b).lower(lowering_platforms=(platform,))


def test_use_backend_nests_and_restores():
    with use_backend("jax"):
        with contextlib.suppress(ZeroDivisionError), use_backend("auto"):
            assert s5eqx.ops._backend.current_backend() == "auto"
            raise ZeroDivisionError
        assert s5eqx.ops._backend.current_backend() == "jax"
    with pytest.raises(Exception, match="nonsense") as error, use_backend("nonsense"):
        pass
    assert all(name in str(error.value) for name in ("auto", "native", "jax"))


# What does not fit.

c64, bf16 = jnp.complex64, jnp.bfloat16


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: diagonal_scan(jnp.ones(3, c64), jnp.ones((5, 3))), TypeError, "share one dtype.*complex64.*float32"),
        (lambda: diagonal_scan(jnp.ones(3), jnp.ones((5, 3)), jnp.ones(3, c64)), TypeError, "x0 of complex64"),
        (lambda: diagonal_scan(jnp.ones(3, bf16), jnp.ones((5, 3), bf16)), TypeError, "bfloat16.*Cast before"),
        (lambda: diagonal_scan(jnp.ones(5), jnp.ones((5, 3))), ValueError, r"\(5, 3\).*got \(5,\).*trailing axis"),
        (lambda: diagonal_scan(jnp.ones((2, 5, 3)), jnp.ones((5, 3))), ValueError, r"a .*\(5, 3\).*got \(2, 5, 3\)"),
        (lambda: diagonal_scan(jnp.ones(3), jnp.ones((5, 3)), jnp.ones((2, 3))), ValueError, r"x0 .*got \(2, 3\)"),
        (
            lambda: diagonal_scan(jnp.ones(3), jnp.ones((5, 3)), reset=jnp.ones(4, bool)),
            ValueError,
            r"reset .*\(5,\).*got \(4,\)",
        ),
        (lambda: diagonal_scan(jnp.ones(3, int), jnp.ones((5, 3), int)), Exception, "parameter 'a'"),
        (lambda: diagonal_scan(jnp.ones(3), jnp.ones(3)), Exception, "parameter 'b'"),
        (lambda: diagonal_scan(jnp.ones(3), jnp.ones((5, 3)), reset=jnp.ones(5)), Exception, "parameter 'reset'"),
        (lambda: diagonal_scan_pairs(jnp.ones((3, 2)), jnp.ones((5, 3, 3))), Exception, "parameter 'b'"),
        (lambda: diagonal_scan_pairs(jnp.ones(3, c64), jnp.ones((5, 3, 2))), Exception, "parameter 'a'"),
        (lambda: diagonal_scan_pairs(jnp.ones((3, 1)), jnp.ones((5, 3, 2))), Exception, "a .*2"),
        (lambda: diagonal_scan_pairs(jnp.ones(()), jnp.ones((5, 3, 2))), Exception, "a .*2"),
        (lambda: diagonal_scan_pairs(jnp.ones((3, 2)), jnp.ones((5, 3, 2)), jnp.ones((3, 1))), Exception, "x0 .*2"),
        (lambda: final_state(jnp.ones(3), jnp.ones((0, 3)), jnp.ones(4)), ValueError, r"x0 .*got \(4,\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    """What must hold, what came, and how to fix it."""
    with pytest.raises(error, match=f"(?s){message}"):
        call()
