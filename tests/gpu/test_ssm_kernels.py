"""The fused state-space step: its everyday tests on a CUDA device, the sizes at which its kernels change their way, and
what XLA may do around them.

A tile is 256 steps of up to 16 states of float32, 128 of 32, 64 of 64. Rows of more than two tiles look back over runs
of tiles, in groups of 16; many rows are taken one by one.
"""

# ruff: noqa: F401  # collected from here
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured_graphs import check_captured
from helpers import relative_error
from ssm_problems import CHUNK, check, in_dtype, problem
from test_cuda_ssm_on_host import PLAIN, SPLIT_TF32, TF32, operands
from test_cuda_ssm_on_host import truth as gradients_of_pairs
from test_ssm_kernel import (
    test_a_bad_row_stays_alone,
    test_a_growing_channel_without_input_stays_zero,
    test_batches,
    test_lengths,
    test_nothing_crosses_a_reset,
    test_resets_at_the_seams,
    test_resets_shared_by_all_rows,
    test_the_same_bits_every_time,
    test_widths_and_states,
)

from s5eqx.ops import _native, ssm

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products():
    """Those of plain JAX, which runs the sizes that the kernels do not take."""
    with jax.default_matmul_precision("highest"):
        yield


def everything(*inputs, reset=None):
    outputs, pull = jax.vjp(lambda *z: ssm(*z, reset=reset), *inputs)
    return *outputs, *pull(jax.tree.map(jnp.ones_like, outputs))


def same_bits(x, y):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(x), jax.device_get(y))


def test_it_is_the_kernels_that_run():
    p = problem(2, 200, 12, 5)
    text = jax.jit(everything).lower(*in_dtype(p.inputs, "float32")).compile().as_text()
    assert "s5eqx_ssm_forward" in text and "s5eqx_ssm_backward" in text


def test_ends_of_tiles_and_runs(dtype):
    lengths = [255, 256, 257, 512, 513, 1025, 4097, 16 * 256 + 1]
    check([problem(2, n, 12 - i % 2, 16 - i % 3, reset=i % 2 == 0) for i, n in enumerate(lengths)], dtype)
    check([problem(1, n, 5, states) for n, states in ((64 * 40, 31), (64 * 17 + 1, 32), (200, 32))], dtype)


@pytest.mark.parametrize("width, states", [(64, 16), (256, 64), (130, 31), (4, 64), (256, 1)])
def test_sizes_of_layers(width, states):
    check([problem(3, 64 * 19 + 3, width, states, reset=True)], "float32")


def test_many_rows():
    """Several to a block, and blocks of several tiles."""
    check(
        [problem(rows, length, 6, 5, reset=True) for rows, length in ((1060, 700), (2200, 70), (600, 1300))], "float32"
    )


def test_across_super_groups_nearly_undamped():
    """Runs of many tiles in the backward pass; a wrong power of a multiplier or a lost carry shows."""
    check(
        [problem(rows, 64 * 1100 + 5, 8, 40, radius=(0.99999, 0.99999), reset=rows > 1) for rows in (1, 2)], "float32"
    )


def call(p, backward, projection, missing=0):
    """The FFI target itself: results but the workspace, of which some bytes may be missing."""
    u, a, w_in, w_out, skip, x0, _, g, g_last = map(jnp.asarray, operands(p, "float32"))
    inputs, flags = (u, a, w_in, w_out, skip, x0), jnp.zeros((1, 0), bool)
    kept = jax.ShapeDtypeStruct((len(u), -(-u.shape[1] // CHUNK), *a.shape), u.dtype)
    results = {False: [u, x0, kept], True: [*inputs]}[backward]
    target = f"s5eqx_ssm_{'backward' if backward else 'forward'}"
    size = _native._backend("cuda")[1].ssm_workspace_bytes(target, *u.shape, len(a), 4, projection) - missing
    results = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in results] + [jax.ShapeDtypeStruct((size,), jnp.uint8)]
    also = (call(p, False, projection)[2], g, g_last) if backward else ()
    attributes = {"chunk": np.int64(CHUNK), "projection": np.int64(projection)}
    return jax.ffi.ffi_call(target, results)(*inputs, flags, *also, **attributes)[:-1]


@pytest.mark.parametrize("projection, bound", [(PLAIN, 2e-6), (SPLIT_TF32, 4e-6), (TF32, 3e-3)])
def test_tensor_cores(projection, bound):
    """As exact as float32, or as TF32. Where there are none, all are float32."""
    for size in ((2, 700, 64, 16), (1, 300, 130, 31), (1, 130, 9, 64)):
        p = problem(*size)
        exact = gradients_of_pairs(p, "float32")
        y, last, _ = call(p, False, projection)
        for ours, wanted in zip((y, last, *call(p, True, projection)), exact, strict=True):
            assert relative_error(ours, wanted) < bound


def test_a_workspace_too_small_is_refused():
    p = problem(1, 5000, 4, 4)
    for backward in (False, True):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"s5eqx ssm: the workspace must hold"):
            jax.block_until_ready(call(p, backward, PLAIN, missing=1))


def test_operands_that_start_anywhere():
    """XLA hands over pieces of larger buffers as they lie. An operand off 16 bytes changes no bit of the result."""
    p = problem(3, 1601, 12, 5)
    u, *weights, x0 = in_dtype(p.inputs, "float32")

    @jax.jit
    def from_pieces(i, u, weights, x0):
        row = lambda z: jax.lax.dynamic_index_in_dim(z, i, keepdims=False)
        return everything(u[1:, 3:], *weights, x0[1:]), everything(
            row(u).ravel()[12 * 3 :].reshape(-1, 12), *weights, row(x0)
        )

    found = from_pieces(1, u, weights, x0)
    whole = jax.jit(everything)
    same_bits(found[0], whole(jnp.array(u[1:, 3:]), *weights, jnp.array(x0[1:])))
    same_bits(found[1], whole(jnp.array(u[1, 3:]), *weights, jnp.array(x0[1])))


@pytest.mark.parametrize("rows, length", [(2, 40), (1, 3001), (1060, 301)])
def test_every_number_of_the_results_is_written(rows, length):
    """The results lie where arrays of NaN were, and have the bits that they have elsewhere."""
    inputs = in_dtype(problem(rows, length, 5, 3).inputs, "float32")
    run = lambda poison, *z: everything(*z)
    expected = jax.jit(run)(None, *inputs)
    poison = [jnp.full_like(z, np.nan) for z in expected]
    results = jax.jit(run, donate_argnums=0, keep_unused=True)(poison, *inputs)
    same_bits(results, expected)
    assert all(np.isfinite(z).all() for z in results)


CAPTURED = """
import hashlib, jax, numpy as np, ssm_problems as t
from s5eqx.ops import ssm
digest = hashlib.sha256()

@jax.jit
def program(*inputs):
    outputs, pull = jax.vjp(ssm, *inputs)
    again = ssm(outputs[0], *inputs[1:])
    return outputs, pull(outputs), again

kept = []
for seed in range(6):  # what a captured program is replayed with lies elsewhere each time
    for shape in ((2, 300, 6, 5), (1, 3001, 8, 16)):
        kept.append(program(*t.in_dtype(t.problem(*shape, seed=seed).inputs, "float32")))
for result in jax.tree.leaves(jax.device_get(kept)):
    assert np.isfinite(result).all()
    digest.update(np.ascontiguousarray(result))
print(digest.hexdigest())
"""


def test_the_same_bits_from_captured_graphs():
    check_captured(CAPTURED)
