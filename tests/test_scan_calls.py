"""Calling the scan: empty axes, eager and jitted, the choice of a backend, and what does not fit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit, recurrence, relative_error
from scan_problems import BACKENDS, LAYOUTS, native, problem

import s5eqx
from s5eqx.ops import diagonal_scan, diagonal_scan_pairs, final_state, use_backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(shape, backend):
    p = problem(LAYOUTS["complex64"], shape[:1], *shape[1:])

    @quick_jit
    def everything(a, b, x0):
        x, pull = jax.vjp(diagonal_scan, a, b, x0)
        return x, pull(x), final_state(a, b, x0)

    with use_backend(backend):
        for a in (p.a, p.a[None, None], np.ones(shape, np.complex64)):
            x, cotangents, last = jax.device_get(everything(a, p.b, p.x0))
            assert x.shape == shape
            assert [z.shape for z in cotangents] == [z.shape for z in (a, p.b, p.x0)]
            assert not any(z.any() for z in cotangents)
            assert last.shape == p.x0.shape
            if shape[1] == 0:
                np.testing.assert_array_equal(last, p.x0)


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
    arrays = [*map(on_device, p.arrays)]

    def call():
        x, pull = jax.vjp(lambda *z: diagonal_scan(*z, reset=p.reset), *arrays)
        return pull(x)

    with counted_compilations() as first:
        call()
    with counted_compilations() as second:
        call()
    assert first and not second


# Backends.


@pytest.mark.smoke
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
    a, b = np.full(2, 0.5, np.float32), np.ones((3, 2), np.float32)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(diagonal_scan(a, b) ** 2)))
    for backend, expected in (("native", True), ("jax", False)):
        with use_backend(backend):
            text = gradient.lower(b).as_text()
        assert ("s5eqx_scan_forward" in text) == expected


@native
def test_backends_of_other_platforms():
    """No kernel there: "auto" lowers to plain JAX, "native" says what is missing."""
    b = np.ones((3, 2), np.float32)
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


def ones(shape, dtype=np.float32):
    return on_device(np.ones(shape), dtype)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: diagonal_scan(ones(3, c64), ones((5, 3))), TypeError, "share one dtype.*complex64.*float32"),
        (lambda: diagonal_scan(ones(3), ones((5, 3)), ones(3, c64)), TypeError, "x0 of complex64"),
        (lambda: diagonal_scan(ones(3, bf16), ones((5, 3), bf16)), TypeError, "bfloat16.*Cast before"),
        (lambda: diagonal_scan(ones(5), ones((5, 3))), ValueError, r"\(5, 3\).*got \(5,\).*trailing axis"),
        (lambda: diagonal_scan(ones((2, 5, 3)), ones((5, 3))), ValueError, r"a .*\(5, 3\).*got \(2, 5, 3\)"),
        (lambda: diagonal_scan(ones(3), ones((5, 3)), ones((2, 3))), ValueError, r"x0 .*got \(2, 3\)"),
        (
            lambda: diagonal_scan(ones(3), ones((5, 3)), reset=ones(4, bool)),
            ValueError,
            r"reset .*\(5,\).*got \(4,\)",
        ),
        (lambda: diagonal_scan(ones(3, int), ones((5, 3), int)), Exception, "parameter 'a'"),
        (lambda: diagonal_scan(ones(3), ones(3)), Exception, "parameter 'b'"),
        (lambda: diagonal_scan(ones(3), ones((5, 3)), reset=ones(5)), Exception, "parameter 'reset'"),
        (lambda: diagonal_scan_pairs(ones((3, 2)), ones((5, 3, 3))), Exception, "parameter 'b'"),
        (lambda: diagonal_scan_pairs(ones(3, c64), ones((5, 3, 2))), Exception, "parameter 'a'"),
        (lambda: diagonal_scan_pairs(ones((3, 1)), ones((5, 3, 2))), Exception, "a .*2"),
        (lambda: diagonal_scan_pairs(ones(()), ones((5, 3, 2))), Exception, "a .*2"),
        (lambda: diagonal_scan_pairs(ones((3, 2)), ones((5, 3, 2)), ones((3, 1))), Exception, "x0 .*2"),
        (lambda: final_state(ones(3), ones((0, 3)), ones(4)), ValueError, r"x0 .*got \(4,\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    """What must hold, what came, and how to fix it."""
    with pytest.raises(error, match=f"(?s){message}"):
        call()
