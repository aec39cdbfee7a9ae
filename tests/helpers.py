"""What several test files share: the recurrence in double precision, and how errors are measured."""

import functools
import random

import equinox as eqx
import jax
import numpy as np
import pytest


def recurrence(a, b, x0, reset=None, reverse=False):
    """x[t] = a[t] x[t-1] + b[t], one step after the other in double precision: what every scan must equal."""
    a, b, x, drop = _in_double(a, b, x0, reset)
    states = np.empty_like(b)
    for t in _times(b, reverse):
        x = np.where(drop[..., t, None], b[..., t, :], a[..., t, :] * x + b[..., t, :])
        states[..., t, :] = x
    return states


def recurrence_vjp(a, b, x0, g, reset=None, reverse=False, conjugate=False):
    """The states, and the cotangents of a, b and x0 in their own shapes.

    `conjugate` for real gradients, as those of float pairs; JAX's own for complex numbers have no conjugates.
    """
    shapes = [np.shape(z) for z in (a, b, x0)]
    states = recurrence(a, b, x0, reset, reverse)
    a, b, x0, drop = _in_double(a, b, x0, reset)
    conj = np.conj if conjugate else np.asarray
    da, db, carry = np.empty_like(b), np.empty_like(b), np.zeros_like(x0)
    times = list(_times(b, reverse))
    for i, t in reversed(list(enumerate(times))):
        before = states[..., times[i - 1], :] if i else x0
        db[..., t, :] = g[..., t, :] + carry
        entering = np.where(drop[..., t, None], 0, db[..., t, :])
        da[..., t, :] = np.where(drop[..., t, None], 0, entering * conj(before))
        carry = conj(a[..., t, :]) * entering
    return states, tuple(_sum_to(z, shape) for z, shape in zip((da, db, carry), shapes, strict=True))


def _in_double(a, b, x0, reset):
    wide = np.complex128 if np.iscomplexobj(b) else np.float64
    b = np.asarray(b, wide)
    a = np.broadcast_to(np.asarray(a, wide), b.shape)
    x0 = np.broadcast_to(np.asarray(x0, wide), b.shape[:-2] + b.shape[-1:])
    return a, b, x0, np.broadcast_to(False if reset is None else np.asarray(reset), b.shape[:-1])


def _times(b, reverse):
    return range(b.shape[-2])[:: -1 if reverse else 1]


def _sum_to(z, shape):
    """The transpose of broadcasting `shape` to that of `z`."""
    z = z.sum(axis=tuple(range(z.ndim - len(shape))))
    stretched = tuple(i for i, (n, m) in enumerate(zip(shape, z.shape, strict=True)) if n == 1 != m)
    return z.sum(axis=stretched, keepdims=True)


def relative_error(given, truth):
    """The largest difference over the largest value."""
    given, truth = np.asarray(given), np.asarray(truth)
    return np.max(np.abs(given - truth), initial=0.0) / (np.max(np.abs(truth), initial=0.0) or 1.0)


def to_pairs(z):
    return np.stack([np.real(z), np.imag(z)], axis=-1)


def to_complex(pairs):
    pairs = np.asarray(pairs)
    return pairs[..., 0] + 1j * pairs[..., 1]


def on_device(z, dtype=None):
    """As `jnp.asarray`, which compiles a program for every shape."""
    return jax.device_put(np.asarray(z, dtype))


def drawn(build, key, dtype=None):
    """The model with every weight drawn anew at one scale, so that no term hides behind a small one; it costs no
    compilation."""
    rng = np.random.default_rng(2208)
    draw = lambda leaf: on_device(0.3 * rng.standard_normal(leaf.shape), dtype or leaf.dtype)
    skeleton = eqx.filter_eval_shape(build, key)
    return jax.tree.map(lambda leaf: draw(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, skeleton)


def dense(layer, x):
    """What a linear layer with a bias is, in NumPy."""
    return x @ np.asarray(layer.weight).T + np.asarray(layer.bias)


@functools.cache
def _drawing(task, count):
    return jax.jit(lambda key: jax.vmap(task.draw)(jax.random.split(key, count)))


def examples(task, count, key):
    """Of a synthetic task, without regard to a test set, which takes time to find."""
    return jax.device_get(_drawing(task, count)(key))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
"""The values of a test's parameters for which it is slow."""


def but_slow(cases, *names):
    """The values of a test's parameter, for some of which it is slow, since others run the same code."""
    assert {*names} <= {*cases}
    return [slow(case) if case in names else case for case in cases]


def precisions(everyday, other):
    """A fixture that runs a test in one precision, and in the other among the slow tests."""

    @pytest.fixture(params=[everyday, slow(other)], name="dtype")
    def dtype(request):
        if request.param == "float64":
            request.getfixturevalue("x64")
        return np.dtype(request.param)

    return dtype


def _one(cases, seed):
    return [random.Random(seed).choice(cases)]


one_or_all = pytest.mark.parametrize("chosen", [pytest.param(_one, id="one"), slow(lambda cases, _: cases, id="all")])
"""Of many like cases `chosen(cases, seed)` draws one; among the slow tests it takes all."""

quick_jit = functools.partial(
    eqx.filter_jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)
"""`eqx.filter_jit` for what runs once or twice: it compiles in half the time, and runs slower."""
