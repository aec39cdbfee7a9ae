"""The state-space step against a complex loop in double precision, through every transformation of JAX."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit, relative_error, slow
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads
from scan_problems import BACKENDS, native
from ssm_problems import CHUNK, NAMES, draw, in_dtype, naive

from s5eqx.ops import ssm, use_backend


def over_batch(axes):
    """`naive` over the leading axes of u, x0 and reset."""

    def f(u, Lambda_bar, B_bar, C, D, x0, gain=None, reset=None):
        example = lambda u, x0, reset: naive(u, Lambda_bar, B_bar, C, D, x0, gain, reset)
        for _ in range(axes):
            example = jax.vmap(example)
        return example(u, x0, reset)

    return f


def ours(u, Lambda_bar, B_bar, C, D, x0, gain=None, reset=None):
    return ssm(u, Lambda_bar, B_bar, C, D, x0, gain=gain, reset=reset)


def loss_of(f, *fixed):
    """A real function of all that `f` returns, with a gradient that differs from entry to entry."""

    def loss(*inputs):
        y, last = f(*inputs, *fixed)
        weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return jnp.sum(weight * jnp.sin(y)) + jnp.sum(jnp.sin(last.real) * jnp.cos(last.imag))

    return loss


def value_and_gradients(f, inputs, *fixed):
    present = tuple(i for i, z in enumerate(inputs) if z is not None)
    return f(*inputs, *fixed), jax.grad(loss_of(f, *fixed), present)(*inputs)


def agree(x, y, tolerance=1e-12):
    for given, expected in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert given.shape == expected.shape
        assert relative_error(given, expected) < tolerance


@functools.cache
def by_the_naive_loop(batch, x0, varying, gain):
    """Inputs in single precision, flags, and the results in double precision with the flags and without."""
    inputs = in_dtype(draw(batch, CHUNK + 3, varying=varying, gain=gain, x0=x0), "float32")
    flags = np.random.default_rng(1).random((*batch, CHUNK + 3)) < 0.03
    f = functools.partial(value_and_gradients, over_batch(len(batch)), in_dtype(inputs, "float64"))
    both = quick_jit(jax.vmap(f))(on_device([flags, np.zeros_like(flags)]))
    return inputs, on_device(flags), jax.device_get(both)


@pytest.mark.parametrize(
    "backend, dtype, tolerance",
    [
        pytest.param("native", "float32", 2e-5, marks=native),
        pytest.param("native", "float64", 1e-12, marks=[native, pytest.mark.slow]),
        ("jax", "float64", 1e-12),
    ],
)
@pytest.mark.parametrize(
    "batch, x0, varying, gain",
    [
        ((2, 3), True, False, False),
        ((), True, True, True),
        ((3,), False, False, True),
        *(slow(*case) for case in (((), True, False, False), ((3,), False, False, False), ((2, 3), True, True, False))),
    ],
)
def test_against_the_naive_loop(batch, x0, varying, gain, backend, dtype, tolerance, x64):
    """y, the last state, and the gradients of everything; with and without resets."""
    inputs, flags, expected = by_the_naive_loop(batch, x0, varying, gain)

    @quick_jit
    def everything(given, reset):
        return value_and_gradients(ours, given, reset), value_and_gradients(ours, given)

    with use_backend(backend):
        found = everything(in_dtype(inputs, dtype), flags)
    assert found[0][0][0].dtype == dtype and found[0][0][1].dtype == np.result_type(dtype, np.complex64)
    for i, one in enumerate(found):
        agree(one, jax.tree.map(lambda z, i=i: z[i], expected), tolerance)


@pytest.mark.smoke
@pytest.mark.parametrize("states, width, length", [(1, 1, 1), (67, 5, 2), (16, 3, 2100)])
def test_sizes(states, width, length, x64):
    inputs = in_dtype(draw((1,), length, width, states), "float64")
    agree(*quick_jit(lambda: (value_and_gradients(ours, inputs), value_and_gradients(over_batch(1), inputs)))())


def test_numpy_arrays_serve():
    """Double precision ones too: they become what JAX makes of them."""
    arrays, reset = draw((2,), 5), np.arange(5) == np.array([[2], [3]])
    for inputs in (arrays, [np.asarray(z) for z in in_dtype(arrays[:6], "float32")]):
        found = ours(*inputs, reset=reset)
        agree(found, ours(*in_dtype(inputs, "float32"), reset=on_device(reset)), 1e-6)
        assert all(isinstance(z, jax.Array) for z in found)


def test_width_of_the_input_is_the_width_of_the_output():
    """u in bfloat16 (or another float) gives y in it; the recurrence keeps the precision of the weights."""
    u, *weights = in_dtype(draw((2,), 9), "float32")

    @quick_jit
    def results(low):
        gradient = jax.grad(lambda u: jnp.sum(ours(u, *weights)[0]))(low)
        return ours(low, *weights), ours(low.astype(jnp.float32), *weights), gradient

    for dtype, tolerance in ((jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)):
        (y, last), (y_exact, last_exact), gradient = results(on_device(u, dtype))
        assert y.dtype == gradient.dtype == dtype and last.dtype == jnp.complex64
        np.testing.assert_array_equal(last, last_exact)
        assert relative_error(np.asarray(y, np.float32), y_exact) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("batch, length", [((2,), 0), ((0,), 5), ((), 0)])
def test_empty(batch, length, gain, backend):
    """Nothing to read: the last state is x0, and passes its gradient on."""
    inputs = in_dtype(draw(batch, length, gain=gain, varying=gain), "float32")

    @quick_jit
    def everything(*inputs):
        (y, last), pull = jax.vjp(ours, *inputs)
        return y, last, pull((y, jnp.ones_like(last)))

    with use_backend(backend):
        y, last, cotangents = jax.device_get(everything(*inputs))
    assert y.shape == (*batch, length, 3)
    for z, ct in zip(inputs, cotangents, strict=True):
        assert ct is None or ct.shape == z.shape
    if length == 0:
        np.testing.assert_array_equal(last, inputs[5])
        np.testing.assert_array_equal(cotangents[5], np.ones_like(last))
    assert not any(ct.any() for ct in cotangents[:5])


def test_an_infinite_state_keeps_its_other_part():
    u, Lambda_bar, B_bar, C, D, x0, _ = draw((), 1)
    x0[0] = complex(2, np.inf)
    inputs = in_dtype((0 * u, np.ones_like(Lambda_bar), B_bar, C, D, x0), "float32")
    (_, last), (_, empty) = quick_jit(lambda u, *others: (ours(u, *others), ours(u[:0], *others)))(*inputs)
    last, empty = np.asarray(last), np.asarray(empty)
    assert empty[0].real == 2.0 and np.isposinf(last[0].imag) and np.isfinite(last[1:]).all()


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_reset(backend):
    u, *weights, x0, _ = in_dtype(draw((), 9), "float32")
    reset = np.arange(9) == 4

    def after(u, x0):
        y, last = ours(u, *weights, x0, reset=reset)
        return jnp.sum(y[4:] ** 2) + jnp.sum(jnp.abs(last) ** 2)

    @quick_jit
    def results():
        spoilt = ours(u.at[1].set(jnp.nan), *weights, x0, reset=reset)
        return spoilt, jax.grad(after, (0, 1))(u, x0), ours(u[4:], *weights, None)

    with use_backend(backend):
        (y, last), (du, dx0), (y_fresh, last_fresh) = jax.device_get(results())
    assert np.isnan(y[1:4]).all()
    agree((y[4:], last), (y_fresh, last_fresh), 1e-6)
    assert not du[:4].any() and not dx0.any() and du[4:].all()


# Transformations.


@pytest.mark.parametrize("gain", [slow(False), True])
def test_check_grads(gain, x64):
    inputs = [z for z in in_dtype(draw((2,), CHUNK + 2, 2, 2, gain=gain), "float64") if z is not None]
    check_grads(jax.jit(ours), inputs, order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), slow("jax")])
def test_vmap_over_every_argument(backend, x64):
    """One argument mapped at a time (x0 alone among them), all of them, all but the weights; gradients inside."""
    count, length = 3, CHUNK + 2
    examples = [draw((), length, seed=seed)[:6] for seed in range(count)]
    resets = np.random.default_rng(0).random((count, length)) < 0.05
    stacked = [*map(np.stack, zip(*examples, strict=True)), resets]
    subsets = [{i} for i in range(7)] + [{0, 5}, {0, 6}, {0, 2, 5}, {0, 5, 6}, set(range(7))]
    axes = [
        tuple(i % z.ndim if k in subset else None for k, z in enumerate(stacked)) for i, subset in enumerate(subsets)
    ]
    rows = [[z[row if k in subset else 0] for k, z in enumerate(stacked)] for subset in subsets for row in range(count)]

    def example(f):
        return lambda *inputs: value_and_gradients(f, [*inputs[:6], None], inputs[6])

    @quick_jit
    def everything(operands, each):
        maps = [jax.vmap(example(ours), own, i % 2)(*z) for i, (own, z) in enumerate(zip(axes, operands, strict=True))]
        return maps, jax.vmap(example(naive))(*each)

    operands = [
        [z[0] if n is None else np.moveaxis(z, 0, n) for n, z in zip(own, stacked, strict=True)] for own in axes
    ]
    with use_backend(backend):
        found, expected = jax.device_get(everything(operands, [np.stack(z) for z in zip(*rows, strict=True)]))
    for i, one in enumerate(found):
        truth = jax.tree.map(lambda z, i=i: z[count * i : count * (i + 1)], expected)
        agree(jax.tree.map(lambda z, i=i: np.moveaxis(z, i % 2, 0), one), truth)


def test_every_other_transformation(x64):
    """Per-example gradients, nested maps, jvp, linearize, checkpoint, second derivatives, alone and combined."""
    inputs = tuple(in_dtype(draw((2, 3), CHUNK + 2)[:6], "float64"))
    mapped = (0, None, None, None, None, 0)
    every = tuple(range(6))

    def nested(f, out_axes=0):
        return jax.vmap(jax.vmap(f, in_axes=mapped), in_axes=mapped, out_axes=out_axes)

    def losses(f, whole):
        return loss_of(f), loss_of(nested(f, 1)), loss_of(whole)

    def found():
        loss, mean, whole = losses(ours, ours)
        gradient = jax.grad(loss, every)
        value, pushed = jax.linearize(mean, *inputs)
        slope = lambda *z: jax.jvp(mean, z, inputs)[1]
        return [
            nested(gradient)(*inputs),
            nested(lambda *z: jax.jvp(gradient, z, z)[1])(*inputs),
            (value, jax.grad(mean, every)(*inputs)),
            (pushed(*inputs), jax.grad(slope, every)(*inputs)),
            jax.jvp(jax.grad(mean, every), inputs, inputs)[1],
            jax.jvp(jax.grad(jax.checkpoint(whole), every), inputs, inputs),
            nested(lambda *z: jax.jvp(ours, z, z))(*inputs),
        ]

    def expected():
        loss, mean, whole = losses(naive, over_batch(2))
        value_and_slope = jax.jvp(jax.value_and_grad(mean, every), inputs, inputs)
        return [
            *nested(lambda *z: jax.jvp(jax.grad(loss, every), z, z))(*inputs),
            *value_and_slope,
            value_and_slope[1][1],
            jax.jvp(jax.grad(whole, every), inputs, inputs),
            nested(lambda *z: jax.jvp(naive, z, z))(*inputs),
        ]

    agree(*quick_jit(lambda: (found(), expected()))())


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), slow("jax")])
def test_shard_map_with_replicated_weights(backend, x64):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    one, every = PartitionSpec("d"), PartitionSpec()
    specs = (one, every, every, every, every, one)
    inputs = tuple(in_dtype(draw((4,), CHUNK + 2)[:6], "float64"))

    def energy(*z):
        y, last = ours(*z)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.abs(last))

    local = lambda *z: jax.lax.psum(energy(*z), "d")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=every)
    gradient = lambda f: jax.grad(f, tuple(range(6)))
    within = jax.shard_map(gradient(local), mesh=mesh, in_specs=specs, out_specs=specs)
    both = lambda f: jax.jvp(gradient(f), inputs, inputs)

    with use_backend(backend):
        found, inside, expected = quick_jit(lambda: (both(sharded), within(*inputs), both(energy)))()
    agree(found, expected)
    agree(inside, expected[0])


# What does not fit.


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"C": np.complex128}, TypeError, "C in the dtype of B_bar, complex64; got complex128.*Cast"),
        ({"Lambda_bar": np.complex128}, TypeError, "Lambda_bar in the dtype of B_bar"),
        ({"x0": np.complex128}, TypeError, "x0 in the dtype of B_bar"),
        ({"D": np.float64}, TypeError, "D in float32, the real dtype of B_bar; got float64"),
        ({"u": np.int32}, Exception, "parameter 'u'"),
        ({"B_bar": np.float32}, Exception, "parameter 'B_bar'"),
    ],
)
def test_dtypes_that_do_not_fit(change, error, message, x64):
    inputs = dict(zip(NAMES, in_dtype(draw((), 5)[:6], "float32"), strict=False))
    for name, dtype in change.items():
        inputs[name] = (inputs[name].real if dtype in (np.float32, np.int32) else inputs[name]).astype(dtype)
    with pytest.raises(error, match=f"(?s){message}"):
        ssm(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit(name):
    inputs = dict(zip(NAMES, in_dtype(draw((2,), 5, gain=True), "float32"), strict=True))
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(Exception, match=r"(?s)parameter '.*Expected type"):
        ssm(**inputs)


def test_every_pair_of_options_composes():
    """x0, gain, reset and a varying Lambda_bar: each combination runs, under jit, with the shapes stated."""
    for varying, gain, x0, reset in itertools.product((False, True), repeat=4):
        inputs = in_dtype(draw((2,), 4, varying=varying, gain=gain, x0=x0), "float32")
        flags = jax.ShapeDtypeStruct((2, 4), bool) if reset else None
        y, last = jax.eval_shape(ours, *inputs, flags)
        assert y.shape == (2, 4, 3) and last.shape == (2, 4) and last.dtype == jnp.complex64
