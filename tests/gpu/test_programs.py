"""What XLA may do around the kernels: where their operands lie, what memory held before, loops, captured graphs."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import test_scan
from captured_graphs import check_captured
from helpers import recurrence, recurrence_vjp, relative_error
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scan_problems import LAYOUTS, problem

from s5eqx import nn
from s5eqx.ops import _native, diagonal_scan, final_state, use_backend

pytestmark = pytest.mark.gpu
layout = test_scan.layout  # the fixture


def everything(layout, a, b, x0, g, **options):
    x, pull = jax.vjp(lambda *z: layout.scan(*z, **options), a, b, x0)
    return x, *pull(g)


def stored(layout, p):
    return [layout.store(z) for z in (*p.arrays, p.g)]


def same_bits(x, y):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(x), jax.device_get(y))


def test_it_is_the_kernels_that_run():
    """Not the fallback: forward, backward and the final state, in a program compiled without asking for them."""
    p = problem(LAYOUTS["complex64"], (2,), 5, 3)
    arrays = stored(LAYOUTS["complex64"], p)

    @jax.jit
    def program(a, b, x0, g):
        return everything(LAYOUTS["complex64"], a, b, x0, g), final_state(a, b, x0)

    text = program.lower(*arrays).compile().as_text()
    for target in ("s5eqx_scan_forward", "s5eqx_scan_backward", "s5eqx_scan_final"):
        assert target in text


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("name", ["float32", "complex64", "complex128", "pairs32"])
def test_operands_that_start_anywhere(name, varying, request):
    """XLA hands over pieces of larger buffers as they lie. An operand off 16 bytes changes no bit of the result."""
    layout = LAYOUTS[name]
    if layout.is_double:
        request.getfixturevalue("x64")
    rows, length, states = 3, 1601, 5
    p = problem(layout, (rows,), length, states, a=(rows, length, states) if varying else None)
    one = [z if z.ndim == 1 else z[1] for z in (*p.arrays, p.g)]
    cuts = {
        "rows": [z if z.ndim == 1 else z[1:] for z in (*p.arrays, p.g)],
        "a row": one,
        "later steps": [z[1:] if z.ndim > 1 else z for z in one],
    }

    @jax.jit
    def from_pieces(i, a, b, x0, g):
        row = lambda z: jax.lax.dynamic_index_in_dim(z, i, keepdims=False)
        one = [row(a) if varying else a, row(b), row(x0), row(g)]
        later = [one[0][1:] if varying else a, one[1][1:], one[2], one[3][1:]]
        found = {"rows": [a[1:] if varying else a, b[1:], x0[1:], g[1:]], "a row": one, "later steps": later}
        return {cut: everything(layout, *operands) for cut, operands in found.items()}

    found = from_pieces(1, *stored(layout, p))
    whole = jax.jit(lambda operands: everything(layout, *operands))
    for cut, operands in cuts.items():
        same_bits(found[cut], whole([layout.store(z) for z in operands]))
        truth = recurrence_vjp(*operands, conjugate=layout.pairs)
        for ours, exact in zip(found[cut], (truth[0], *truth[1]), strict=True):
            assert relative_error(layout.read(ours), exact) < (1e-12 if layout.is_double else 2e-6), cut


@pytest.mark.parametrize("rows, length", [(2, 40), (1, 3001), (300, 301)])
def test_every_number_of_the_results_is_written(rows, length, layout):
    """The results lie where arrays of NaN were, and have the bits that they have elsewhere."""
    p = problem(layout, (rows,), length, 5, reset=(length,))
    inputs = stored(layout, p)
    run = lambda poison, *z: everything(layout, *z, reset=p.reset)
    expected = jax.jit(run)(None, *inputs)
    fill = complex(np.nan, np.nan) if layout.dtype.startswith("complex") else np.nan
    poison = [jnp.full_like(z, fill) for z in expected]
    addresses = [z.unsafe_buffer_pointer() for z in poison]
    results = jax.jit(run, donate_argnums=0, keep_unused=True)(poison, *inputs)  # memory given for the results
    assert [z.unsafe_buffer_pointer() for z in results] == addresses
    same_bits(results, expected)


def test_donated_operands():
    layout = LAYOUTS["complex64"]
    inputs = stored(layout, problem(layout, (2,), 3001, 16))
    run = lambda *z: everything(layout, *z)
    expected = jax.jit(run)(*inputs)
    same_bits(jax.jit(run, donate_argnums=(1, 2, 3))(*inputs), expected)
    assert inputs[1].is_deleted()


def test_inside_loops():
    """A scan over stacked layers, whose operands and results are slices at run time; under remat, with gradients."""
    layout = LAYOUTS["complex64"]
    layers = [problem(layout, (2,), 1601, 5, seed=seed) for seed in range(4)]
    a, x0 = (jnp.stack([layout.store(getattr(p, name)) for p in layers]) for name in ("a", "x0"))
    b, g = layout.store(layers[0].b), layout.store(layers[0].g)

    def layer(x, parameters):
        x = diagonal_scan(parameters[0], x, parameters[1])
        x = x / jnp.abs(x).max().astype(x.dtype)
        return x, x[:, -1]

    def looped(a, b, x0):
        return jax.lax.scan(jax.checkpoint(layer), b, (a, x0))

    def unrolled(a, b, x0):
        lasts = []
        for parameters in zip(a, x0, strict=True):
            b, last = layer(b, parameters)
            lasts.append(last)
        return b, jnp.stack(lasts)

    def run(f):
        x, pull = jax.vjp(f, a, b, x0)
        return x, pull((g, jnp.ones_like(x[1])))

    found, expected = jax.jit(lambda: (run(looped), run(unrolled)))()
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(ours, theirs) < 1e-5
    x = layers[0].b
    for p in layers:
        x = recurrence(p.a, x, p.x0)
        x = x / np.abs(x).max()
    assert relative_error(found[0][0], x) < 1e-5


CAPTURED = """
import hashlib, jax, numpy as np, scan_problems as t
from s5eqx.ops import final_state
digest = hashlib.sha256()
for name in ("complex64", "float32"):
    layout = t.LAYOUTS[name]

    @jax.jit
    def program(a, b, x0, g):
        x, pull = jax.vjp(layout.scan, a, b, x0)
        y = layout.scan(a, 2 * x, reverse=True)
        return x, y, pull(g + y), final_state(a, y)

    kept = []
    for seed in range(6):  # what a captured program is replayed with lies elsewhere each time
        for shape in ((2, 300, 5), (1, 3001, 16)):
            p = t.problem(layout, shape[:1], *shape[1:], seed=seed)
            kept.append(program(*(layout.store(z) for z in (*p.arrays, p.g))))
    for result in jax.tree.leaves(jax.device_get(kept)):
        assert np.isfinite(result).all()
        digest.update(np.ascontiguousarray(result))
print(digest.hexdigest())
"""


def test_the_same_bits_from_captured_graphs():
    check_captured(CAPTURED)


def test_a_workspace_too_small_is_refused():
    a, b = jnp.full((1, 1, 16), 0.5), jnp.ones((1, 5000, 16))
    size = _native.workspace_bytes("cuda", "s5eqx_scan_forward", a.shape, b.shape, b.dtype, False)

    def call(size):
        results = [jax.ShapeDtypeStruct(b.shape, b.dtype), jax.ShapeDtypeStruct((size,), jnp.uint8)]
        x, _ = jax.ffi.ffi_call("s5eqx_scan_forward", results)(
            a, b, jnp.zeros((1, 16)), jnp.zeros((1, 0), bool), reverse=False, pairs=False
        )
        return np.asarray(x)

    assert size and relative_error(call(size)[0, -1], 2 * np.ones(16)) < 1e-6
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"s5eqx.*workspace"):
        call(size - 1)


def test_a_whole_layer():
    """Kernels and plain JAX in the same layer: outputs and gradients of all weights."""
    layer, u = nn.S5(6, 8, key=jr.key(0)), jr.normal(jr.key(1), (3, 1601, 6))

    @jax.jit
    def value_and_gradient(layer, u):
        weights = jr.normal(jr.key(2), u.shape)
        return jax.value_and_grad(lambda layer: jnp.mean(weights * jax.vmap(layer)(u)))(layer)

    with use_backend("native"):
        ours = value_and_gradient(layer, u)
    with use_backend("jax"):
        plain = value_and_gradient(layer, u)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert relative_error(x, y) < 1e-4


def test_a_second_device():
    """The same bits there, and from programs whose batch or states are split over both."""
    devices = jax.devices("cuda")[:2]
    if len(devices) < 2:
        # Most machines have one. What is emitted for several is tested on virtual CPU devices, in test_sharding.py.
        pytest.skip("there is one CUDA device")
    layout = LAYOUTS["complex64"]
    p = problem(layout, (4,), 3001, 32)
    inputs = stored(layout, p)
    run = jax.jit(lambda *z: everything(layout, *z))
    truth = recurrence_vjp(*p.arrays, p.g)
    mesh = Mesh(np.array(devices), ("d",))
    split_batch = [PartitionSpec(), *[PartitionSpec("d")] * 3]
    split_states = [PartitionSpec("d"), PartitionSpec(None, None, "d"), PartitionSpec(None, "d")]
    placements = [[devices[0]] * 4, [devices[1]] * 4]
    placements += [
        [NamedSharding(mesh, spec) for spec in specs] for specs in (split_batch, [*split_states, split_states[1]])
    ]
    results = [run(*map(jax.device_put, inputs, placement)) for placement in placements]
    same_bits(results[0], results[1])
    for result in results:
        for ours, exact in zip(result, (truth[0], *truth[1]), strict=True):
            assert relative_error(ours, exact) < 2e-6
