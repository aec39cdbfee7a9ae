"""Every transformation of JAX on the scan, against the same one on a plain `jax.lax.scan`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit, recurrence_vjp, relative_error, slow
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads
from scan_problems import LAYOUTS, native, plain_scan, problem

from s5eqx.ops import diagonal_scan, use_backend


def loss_of(scan, reset=None, reverse=False):
    def loss(a, b, x0):
        x = scan(a, b, x0) if reset is None else scan(a, b, x0, reset=reset, reverse=reverse)
        return jnp.sum(jnp.sin(x) * jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)))

    return loss


@pytest.mark.parametrize(
    "name, varying",
    [
        ("complex128", True),
        ("pairs64", False),
        *(slow("float64", varying) for varying in (False, True)),
        slow("complex128", False),
        slow("pairs64", True),
    ],
)
def test_check_grads(name, varying, x64):
    layout = LAYOUTS[name]
    p = problem(layout, (), 4, 2, a=(4, 2) if varying else None)
    reset = on_device([False, False, True, False]) if varying else None
    f = jax.jit(lambda a, b, x0: layout.scan(a, b, x0, reset=reset, reverse=varying))
    check_grads(f, [*map(layout.store, p.arrays)], order=2, modes=("fwd", "rev"))


def test_second_derivatives_in_every_order(x64):
    """Forward over reverse, reverse over reverse, reverse over forward; mapped, since Jacobians map."""
    p = problem(LAYOUTS["float64"], (), 4, 2)
    hessians = [
        lambda f: jax.jacfwd(jax.jacrev(f, (0, 1, 2)), (0, 1, 2)),
        lambda f: jax.jacrev(jax.jacrev(f, (0, 1, 2)), (0, 1, 2)),
        lambda f: jax.jacrev(jax.jacfwd(f, (0, 1, 2)), (0, 1, 2)),
    ]

    @quick_jit
    def results(*arrays):
        return hessians[0](loss_of(plain_scan))(*arrays), [f(loss_of(diagonal_scan))(*arrays) for f in hessians]

    expected, found = results(*p.arrays)
    for ours in found:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, expected)


@pytest.mark.smoke
def test_checkpoint_linearize_and_hessian_vector_products(x64):
    p = problem(LAYOUTS["float64"], (2,), 6, 3)
    arrays = tuple(map(on_device, p.arrays))
    directions = tuple(on_device(np.cos(z)) for z in p.arrays)
    loss = loss_of(diagonal_scan)
    gradient = jax.grad(loss, (0, 1, 2))

    @quick_jit
    def results():
        remade = jax.grad(jax.checkpoint(loss), (0, 1, 2))(*arrays)
        value, pushed = jax.linearize(loss, *arrays)
        products = jax.jvp(gradient, arrays, directions)[1]
        slope = lambda *z: jax.jvp(loss, z, directions)[1]
        again = jax.grad(slope, (0, 1, 2))(*arrays)
        kept = jax.jvp(jax.grad(jax.checkpoint(loss), (0, 1, 2)), arrays, directions)[1]
        values = value, loss(*arrays)
        return (gradient(*arrays), remade), (products, again, kept), (pushed(*directions), slope(*arrays)), values

    gradients, products, slopes, values = results()
    np.testing.assert_allclose(*values, rtol=1e-14)
    for first, *others in (gradients, products, slopes):
        for other in others:
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), first, other)
    expected = sum(np.vdot(x, y) for x, y in zip(gradients[0], directions, strict=True))
    np.testing.assert_allclose(slopes[0], expected, rtol=1e-12)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), slow("jax")])
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

    @quick_jit
    def all_subsets(stacked):
        results = []
        for i, subset in enumerate(subsets):
            axes = [i % (z.ndim) if chosen else None for z, chosen in zip(stacked, subset, strict=True)]
            operands = [z[0] if n is None else jnp.moveaxis(z, 0, n) for z, n in zip(stacked, axes, strict=True)]
            mapped = jax.vmap(everything, in_axes=axes, out_axes=(i % 3, (0, 2, 1)))
            results.append(mapped(*operands))
        return results

    stacked = [np.stack(z) for z in zip(*((*p.arrays, p.reset) for p in problems), strict=True)]
    with use_backend(backend):
        solutions = jax.device_get(all_subsets(stacked))
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
    a, b, x0 = (on_device(rng.uniform(-1, 1, s)) for s in ((2, *a_shape), (4, 2, 5, 3), (4, 3)))

    def nested(scan):
        mapped = jax.vmap(jax.vmap(scan, in_axes=(0, 0, None)), in_axes=(None, 0, 0), out_axes=1)
        inside = jax.vmap(jax.vmap(jax.grad(loss_of(scan), (0, 1, 2)), (0, 0, None)), (None, 0, 0), 2)
        crossed = jax.vmap(jax.vmap(scan, in_axes=(None, 0, 0)), in_axes=(0, 1, None))
        outside = jax.grad(lambda *z: jnp.sum(jnp.sin(mapped(*z))), (0, 1, 2))
        pushed = jax.vmap(lambda x0: jax.jvp(mapped, (a, b, x0), (a, b, x0)), out_axes=1)
        return mapped(a, b, x0), inside(a, b, x0), crossed(a, b, x0), outside(a, b, x0), pushed(x0[None])

    ours, expected = quick_jit(lambda: (nested(diagonal_scan), nested(plain_scan)))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, expected)


@pytest.mark.parametrize(
    "axis, backend",
    [
        pytest.param("batch", "native", marks=native),
        pytest.param("state", "native", marks=native),
        ("batch", "jax"),
        slow("state", "jax"),
    ],
)
def test_shard_map(axis, backend, x64):
    """Over two devices: a replicated multiplier gets the gradient of both, by reverse, forward and mixed mode."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    one, every = PartitionSpec("d"), PartitionSpec()
    if axis == "batch":
        specs = (every, one, one, every)
    else:
        specs = (one, PartitionSpec(None, None, "d"), PartitionSpec(None, "d"), every)
    p = problem(LAYOUTS["complex128"], (4,), 6, 2, reset=(1, 6))
    reset = on_device(p.reset)
    arrays = tuple(map(on_device, p.arrays))
    energy = lambda x: jnp.sum(jnp.abs(jnp.sin(x)))

    def local(a, b, x0, reset):
        return jax.lax.psum(energy(diagonal_scan(a, b, x0, reset=reset)), "d")

    def whole(a, b, x0):
        return energy(diagonal_scan(a, b, x0, reset=reset))

    def derivatives(f):
        return jax.jvp(jax.value_and_grad(f, (0, 1, 2)), arrays, arrays), jax.jvp(f, arrays, arrays)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=every)
    inside = jax.shard_map(lambda *z: jax.grad(local, (0, 1, 2))(*z), mesh=mesh, in_specs=specs, out_specs=specs[:3])
    unchecked = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=every, check_vma=False)

    @quick_jit
    def results():
        loose = jax.grad(lambda *z: unchecked(*z, reset), (0, 1, 2))(*arrays)
        return derivatives(whole), derivatives(lambda *z: sharded(*z, reset)), inside(*arrays, reset), loose

    with use_backend(backend):
        expected, ours, *gradients = results()
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12)
    jax.tree.map(close, ours, expected)
    for gradient in gradients:
        jax.tree.map(close, gradient, expected[0][0][1])
