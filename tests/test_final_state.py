"""The last state alone: the scan's own, in value and in every derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit, recurrence, relative_error, slow
from jax.test_util import check_grads
from scan_problems import BACKENDS, LAYOUTS, OF_EACH_KERNEL, native, problem

from s5eqx.ops import final_state, final_state_pairs, use_backend


def final_of(layout, p):
    final = final_state_pairs if layout.pairs else final_state
    return lambda a, b, x0: final(a, b, x0, reset=p.reset, reverse=p.reverse)


def last_of(layout, p):
    """The same by the scan."""

    def last(a, b, x0):
        return layout.scan(a, b, x0, reset=p.reset, reverse=p.reverse)[
            (..., 0 if p.reverse else -1, *(slice(None),) * (1 + layout.pairs))
        ]

    return last


def problems_of(layout, lengths, rows=(1, 3, 9)):
    """One row, few (split over time) and many; shared and own multipliers, with and without resets."""
    return [
        problem(layout, (n,), length, 5, a=a, reset=reset, reverse=reverse)
        for n, reverse in zip(rows, (False, True, False), strict=True)
        for length in lengths
        for a, reset in (((5,), False), ((n, length, 5), False), ((length, 5), (n, length)), ((n, 1, 5), (1, length)))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OF_EACH_KERNEL)
def test_final_state(name, backend, request):
    layout = LAYOUTS[name]
    if layout.is_double:
        request.getfixturevalue("x64")
    problems = problems_of(layout, [1, 2, 2 * layout.block(5) + 3] if backend == "native" else [1, 7])

    @quick_jit
    def finals(inputs):
        return [final_of(layout, p)(*arrays) for p, arrays in zip(problems, inputs, strict=True)]

    with use_backend(backend):
        results = finals([[*map(layout.store, p.arrays)] for p in problems])
    for p, last in zip(problems, results, strict=True):
        expected = recurrence(*p.arrays, p.reset, p.reverse)[:, 0 if p.reverse else -1]
        assert last.shape == p.x0.shape + (2,) * layout.pairs, p.label
        assert relative_error(layout.read(last), expected) < (1e-12 if layout.is_double else 1e-6), p.label


@native
@pytest.mark.parametrize("name", ["complex64", "pairs64"])
def test_the_bits_are_those_of_the_scan(name, request):
    """However many threads there are: the blocks and the order in which they are joined are the same."""
    layout = LAYOUTS[name]
    if layout.is_double:
        request.getfixturevalue("x64")
    problems = problems_of(layout, [4 * layout.block(5) + 1])

    @quick_jit
    def both(inputs):
        return [
            (final_of(layout, p)(*arrays), last_of(layout, p)(*arrays))
            for p, arrays in zip(problems, inputs, strict=True)
        ]

    for p, (final, last) in zip(problems, both([[*map(layout.store, p.arrays)] for p in problems]), strict=True):
        np.testing.assert_array_equal(final, last, p.label)


@native
def test_the_states_between_are_not_written():
    b = np.ones((3, 50, 4), np.float32)
    text = jax.jit(lambda b: final_state(b[0, 0], b)).lower(b).as_text()
    assert "s5eqx_scan_final" in text and "s5eqx_scan_forward" not in text
    pushed = jax.jit(lambda b: jax.jvp(lambda b: final_state(jnp.ones(4), b), (b,), (b,))).lower(b).as_text()
    assert pushed.count("@s5eqx_scan_final") == 2 and "s5eqx_scan_forward" not in pushed


@pytest.mark.parametrize(
    "name, varying",
    [
        ("float64", False),
        ("pairs64", True),
        *(slow(name, False) for name in ("complex128", "pairs64")),
        *(slow(name, True) for name in ("float64", "complex128")),
    ],
)
def test_check_grads(name, varying, x64):
    layout = LAYOUTS[name]
    p = problem(layout, (2,), 4, 2, a=(4, 2) if varying else None, reverse=varying)
    if varying:
        p = p._replace(reset=np.array([False, False, True, False]))
    check_grads(jax.jit(final_of(layout, p)), [*map(layout.store, p.arrays)], order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize(
    "name, backend",
    [
        pytest.param("complex64", "native", marks=native),
        pytest.param("pairs32", "native", marks=native),
        ("pairs32", "jax"),
        slow("complex64", "jax"),
    ],
)
def test_derivatives_and_maps_are_those_of_the_scan(name, backend):
    layout = LAYOUTS[name]
    p = problem(layout, (3,), 40, 2, reset=(3, 40), reverse=True)
    arrays = [layout.store(z) for z in p.arrays]
    some = [(0,), (1,), (2,), (1, 2), (0, 1, 2)]

    def everything(last):
        f = last(layout, p)
        results = [f(*arrays)]
        for chosen in some:
            partly = lambda *z, chosen=chosen: f(
                *(dict(zip(chosen, z, strict=True)).get(i, arrays[i]) for i in range(3))
            )
            primals = [arrays[i] for i in chosen]
            value, tangent = jax.jvp(partly, primals, primals)
            results += [value, tangent, jax.vjp(partly, *primals)[1](tangent)]
        unbatched = last(layout, p._replace(reset=p.reset[0]))
        mapped = jax.vmap(jax.vmap(unbatched, (None, 1, None)), (0, None, 0))
        own = jnp.stack([arrays[0], arrays[0]])
        results.append(mapped(own, jnp.moveaxis(arrays[1], 0, 1), own))
        return results

    with use_backend(backend):
        ours, expected = quick_jit(lambda: (everything(final_of), everything(last_of)))()
    for one, other in zip(ours, expected, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, other)


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_reset(backend):
    layout = LAYOUTS["complex64"]
    p = problem(layout, (2,), 20, 3, a=(20, 3))
    p = p._replace(reset=np.arange(20) == 12)
    b = p.b.copy()
    b[:, 11] = np.nan

    @quick_jit
    def everything(*arrays):
        last, pull = jax.vjp(final_of(layout, p), *arrays)
        return last, *pull(last)

    with use_backend(backend):
        last, _, db, dx0 = jax.device_get(everything(p.a, b, p.x0))
    assert relative_error(last, recurrence(p.a[12:], p.b[:, 12:], 0 * p.x0)[:, -1]) < 1e-6
    assert not db[:, :12].any() and not dx0.any() and np.isfinite(db).all()


@pytest.mark.smoke
def test_no_steps():
    a, b, x0 = (on_device(np.ones(shape), np.float32) for shape in ((3, 2), (2, 0, 3, 2), (2, 3, 2)))
    np.testing.assert_array_equal(final_state_pairs(a, b, x0), x0)
    last = quick_jit(jax.grad(lambda x0, a, b: final_state(a, b, x0).sum()))
    np.testing.assert_array_equal(last(*(np.ones(shape, np.float32) for shape in (3, 3, (2, 0, 3)))), np.full(3, 2))
