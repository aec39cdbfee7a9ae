"""S4ND: equal to a convolution written out, on every grid and at every rate; and what it refuses."""

import functools
import itertools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dense, drawn, on_device, quick_jit, relative_error, slow
from jax import lax

from s5eqx import nn
from s5eqx.interop import load, save

forward = quick_jit(lambda layer, x, rate=1.0: layer(x, rate=rate))


def kernels(layer, grid, rates, lib):
    """For each axis past and future, as (rank, c, D, L), from the formula of the zero-order hold."""
    found = []
    for ssm, causal, length, rate in zip(layer.axes, layer.causal, grid, rates, strict=True):
        times = (len(layer.D[0]) // len(ssm.A_real), 1)
        A = lib.tile(-lib.exp(lib.asarray(ssm.A_real)) + 1j * lib.asarray(ssm.A_imag), times)
        Delta = rate * lib.exp(lib.asarray(ssm.log_Delta))[:, None]
        C = lib.asarray(ssm.C)[..., 0] + 1j * lib.asarray(ssm.C)[..., 1]
        powers = lib.exp((A * Delta)[..., None] * lib.arange(length)[None, None])
        k = 2 * lib.real(lib.einsum("cdp,dpl->cdl", C * ((lib.exp(A * Delta) - 1) / A)[None], powers))
        past, *future = k.reshape(1 if causal else 2, layer.rank, *layer.D.shape, length)
        found.append((past, future[0] if future else lib.zeros_like(past)))
    return found


def in_loops(layer, x, rates):
    """The convolution and the skip, one pair of points after the other."""
    grid, c, D = x.shape[:-1], *layer.D.shape
    k = kernels(layer, grid, rates, np)
    y = np.zeros((*grid, c, D))
    for at in itertools.product(*map(range, grid)):
        y[at] = np.asarray(layer.D) * x[at]
        for of in itertools.product(*map(range, grid)):
            lags = [i - j for i, j in zip(at, of, strict=True)]
            taps = [
                past[..., lag] if lag >= 0 else future[..., -1 - lag]
                for (past, future), lag in zip(k, lags, strict=True)
            ]
            y[at] += np.mean(functools.reduce(np.multiply, taps), axis=0) * x[of]
    return y.reshape(*grid, c * D)


def in_matrices(layer, x, rates):
    """The same with a dense matrix for each axis, for gradients."""
    matrices = []
    for past, future in kernels(layer, x.shape[:-1], rates, jnp):
        lag = np.arange(past.shape[-1])[:, None] - np.arange(past.shape[-1])
        here, ahead = past[..., np.maximum(lag, 0)], future[..., np.maximum(-1 - lag, 0)]
        matrices.append(jnp.where(lag >= 0, here, ahead))
    out, into = "ijk"[: x.ndim - 1], "uvw"[: x.ndim - 1]
    terms = ",".join(f"rcd{i}{u}" for i, u in zip(out, into, strict=True))
    y = jnp.einsum(f"{terms},{into}d->{out}cd", *matrices, x) / layer.rank
    y = y + layer.D * x[..., None, :]
    return y.reshape(*x.shape[:-1], layer.D.size)


CASES = {
    "one_axis": ((7,), {}),
    "one_causal_axis": ((5,), {"causal": True, "channels": 2}),
    "one_sample": ((1,), {"rank": 2}),
    "image": ((5, 4), {"rank": 2, "channels": 2}),
    "mixed_image": ((2, 7), {"causal": (True, False), "num_ssm": 1}),
    "column": ((6, 1), {"causal": (False, True)}),
    "video": ((2, 3, 4), {"rank": 2, "channels": 2, "causal": (True, False, False)}),
    "causal_video": ((3, 1, 2), {"causal": True}),
}


def build(name, key, *, width=2, slower=1.0, **options):
    """A layer with states that are slow and fast, and an input."""
    grid, given = CASES[name]
    options = {"num_axes": len(grid), "activation": eqx.nn.Identity(), "glu": False} | given | options
    layer = drawn(lambda key: nn.S4ND(width, 6, **options, key=key), key)
    continuous = lambda layer: [z for ssm in layer.axes for z in (ssm.A_real, ssm.A_imag, ssm.log_Delta)]
    changes = (lambda z: z - 2, lambda z: 10 * z, lambda z: z - math.log(slower))
    values = [on_device(f(z)) for f, z in zip(changes * len(grid), jax.device_get(continuous(layer)), strict=True)]
    return eqx.tree_at(continuous, layer, values), on_device(np.random.default_rng(1).standard_normal((*grid, width)))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_convolution_written_out(name, key, x64):
    """With rates of its own for each axis."""
    layer, x = build(name, key)
    rates = (0.5, 1.0, 1.7)[: layer.num_axes]
    expected = dense(layer.output_linear, in_loops(layer, np.asarray(x), rates))
    assert relative_error(forward(layer, x, rates), expected) < 1e-10


@pytest.mark.parametrize("name", ["mixed_image", slow("video")])
def test_gradients_are_those_of_dense_matrices(name, key, x64):
    """Of every parameter and of the input, none of them idle."""
    layer, x = build(name, key)
    weights = np.random.default_rng(2).standard_normal(x.shape)
    rates = (0.5, 1.0, 1.7)[: layer.num_axes]
    in_dense = lambda layer, x, rates: layer.read_out(in_matrices(layer, x, rates))

    def gradient(function):
        loss = lambda given: jnp.sum(weights * function(*given, rates))
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return jax.device_get(quick_jit(eqx.filter_grad(loss))((layer, x)))

    given, expected = gradient(lambda layer, x, rates: layer(x, rate=rates)), gradient(in_dense)
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(expected), strict=True):
        assert np.any(b), jax.tree_util.keystr(path)
        assert relative_error(a, b) < 1e-10, jax.tree_util.keystr(path)


@pytest.mark.smoke
def test_one_causal_axis_is_s4d(key, x64):
    options = {"channels": 2, "bandlimit": 0.7, "train_B": True, "discretisation": nn.Bilinear()}
    s4d = drawn(lambda key: nn.S4D(3, 8, **options, key=key), key)
    layer = drawn(lambda key: nn.S4ND(3, 8, num_axes=1, causal=True, **options, key=key), key)
    ssm = eqx.tree_at(lambda ssm: ssm.D, s4d.ssm, None)
    parts = lambda layer: (layer.axes[0], layer.D, layer.output_linear)
    layer = eqx.tree_at(parts, layer, (ssm, s4d.ssm.D, s4d.output_linear))
    x = np.random.default_rng(0).standard_normal((19, 3))
    assert relative_error(*quick_jit(lambda x: (layer(x), s4d(x)))(x)) < 1e-12


@pytest.mark.parametrize("causal", [(True, False), (False, True)])
def test_causal_by_axis(causal, key, x64):
    """What a point sees: on a causal axis nothing behind it, on another all."""
    layer, x = build("image", key, causal=causal)
    seen = quick_jit(jax.grad(lambda x: jnp.sum(layer(x)[2, 1])))(x)
    rows, columns = np.arange(5)[:, None] <= 2, np.arange(4)[None] <= 1
    expected = (rows | (not causal[0])) & (columns | (not causal[1]))
    np.testing.assert_array_equal(np.abs(seen).min(axis=-1) > 1e-10, expected)
    np.testing.assert_array_equal(np.abs(seen).max(axis=-1) < 1e-12, ~expected)


def test_a_kernel_at_half_the_spacing_is_the_same_kernel_finer(key, x64):
    """A tap of the zero-order hold is the integral over its interval: two of half the length add up to it."""
    layer, _ = build("image", key)
    kernel = quick_jit(lambda rate, length: layer.kernel(0, length, rate=rate))
    length = 8
    coarse, fine = np.asarray(kernel(1.0, length)), np.asarray(kernel(0.5, 2 * length))
    past = fine[..., : 2 * length].reshape(*fine.shape[:-1], length, 2).sum(axis=-1)
    future = fine[..., : 2 * length - 1 : -1][..., : 2 * length - 2]
    future = future.reshape(*fine.shape[:-1], length - 1, 2).sum(axis=-1)
    np.testing.assert_allclose(coarse[..., :length], past, atol=1e-12)
    np.testing.assert_allclose(coarse[..., length:], future[..., ::-1], atol=1e-12)
    assert not np.allclose(coarse[..., :length], np.asarray(kernel(1.0, 2 * length))[..., : 2 * length : 2])


def test_finer_grids_come_to_one_output(key, x64):
    """With the rate, and of a smooth input; the error falls as the spacing does. Without it nothing of that is so."""
    layer, _ = build("image", key, slower=20.0)

    def output(n, rate):
        at = (np.arange(n) + 0.5) / n
        x = np.stack([np.sin(3 * at)[:, None] * np.cos(2 * at), np.cos(5 * at)[:, None] * at], axis=-1)
        y = forward(layer, x, rate)
        return np.asarray(y).reshape(8, n // 8, 8, n // 8, 2).mean(axis=(1, 3))

    finest = output(64, 8 / 64)
    errors = [relative_error(output(n, 8 / n), finest) for n in (8, 16)]
    assert errors[0] < 0.2 and errors[1] < 0.6 * errors[0]
    assert relative_error(output(16, 1.0), finest) > 10 * errors[1]


@pytest.mark.smoke
def test_bandlimit_is_that_of_training(key, x64):
    """What it dropped does not come back on a finer grid, and what was trained stays on a coarser one."""
    free, limited = (build("image", key, width=5, bandlimit=limit)[0] for limit in (None, 0.8))
    ssm = jax.device_get(free.axes[1])
    slow = np.exp(ssm.log_Delta)[:, None] * np.abs(ssm.A_imag) / (2 * np.pi) < 0.4
    assert 0 < np.sum(slow) < slow.size
    by_hand = eqx.tree_at(lambda layer: layer.axes[1].C, free, on_device(np.where(slow[None, ..., None], ssm.C, 0.0)))
    kernels = quick_jit(lambda layer: [layer.kernel(1, 9, rate=rate) for rate in (0.25, 1.0, 3.0)])
    for given, expected in zip(kernels(limited), kernels(by_hand), strict=True):
        np.testing.assert_allclose(given, expected, atol=1e-14)


def test_what_is_held_does_not_grow_with_the_rank(key):
    """By value and gradient: no product of kernels is formed before it is summed."""

    def temporaries(rank):
        layer, _ = build("image", key, rank=rank)
        params, rest = eqx.partition(layer, eqx.is_inexact_array)
        loss = lambda params, x: jnp.sum(eqx.combine(params, rest)(x))
        program = jax.jit(jax.grad(loss, (0, 1))).lower(params, np.ones((48, 64, 2), np.float32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 1.5 * temporaries(1)


def test_batches(key, x64):
    layer, _ = build("image", key)
    x = np.random.default_rng(0).standard_normal((3, 5, 4, 2))
    together = quick_jit(lambda x: jax.vmap(layer)(x))(x)
    np.testing.assert_allclose(together, [forward(layer, row) for row in x], atol=1e-12)


def test_bfloat16(key):
    """The kernels and the convolution stay in float32; the output has the dtype of the input."""
    layer, x = build("image", key)
    narrow = quick_jit(nn.cast)(layer, jnp.bfloat16)
    assert {a.dtype.name for a in jax.tree.leaves((narrow.axes, narrow.D))} == {"float32"}
    y = forward(narrow, on_device(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), forward(layer, x), atol=0.05)


def test_dropout(key):
    layer, x = build("image", key, dropout=0.5)
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(layer, x)
    dropped = quick_jit(lambda key: layer(x, key=key))
    assert not np.allclose(dropped(key), dropped(jr.fold_in(key, 1)))
    np.testing.assert_allclose(forward(eqx.nn.inference_mode(layer), x), forward(build("image", key)[0], x), atol=1e-6)


def test_round_trip_through_a_file(key, tmp_path):
    layer, _ = build("mixed_image", key, glu=True, bandlimit=0.5)
    save(tmp_path / "layer", layer)
    assert eqx.tree_equal(*jax.device_get((load(tmp_path / "layer"), layer)))


def test_a_system_without_a_skip(key, x64):
    """In every form it is the one whose `D` is zero."""
    with_skip = drawn(lambda key: nn.DiagonalSSM(2, 4, channels=2, key=key), key)
    zero = eqx.tree_at(lambda s: s.D, with_skip, on_device(np.zeros((2, 2))))
    ssm = drawn(lambda key: nn.DiagonalSSM(2, 4, channels=2, skip=False, key=key), key)
    x, reset = np.random.default_rng(0).standard_normal((70, 2)), np.isin(np.arange(70), [0, 63, 64])

    @quick_jit
    def run(ssm):
        state = ssm.init_state()
        scanned = lax.scan(lambda s, t: ssm.step(s, t[0], reset=t[1]), state, (x, reset))
        return ssm(x), ssm(x, reset=reset), ssm.prefill(state, x), ssm.prefill(state, x, reset=reset), scanned

    assert ssm.D is None
    for given, expected in zip(jax.tree.leaves(run(ssm)), jax.tree.leaves(run(zero)), strict=True):
        np.testing.assert_allclose(given, expected, atol=1e-14)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_axes": 4}, "num_axes must be 1, 2 or 3, the axes of a sequence, an image or a video; got 4"),
        ({"num_axes": 0}, "num_axes must be 1, 2 or 3"),
        ({"causal": (True,)}, "causal must be one for all, or one for each of num_axes=2 axes; got (True,)"),
        ({"rank": 0}, "channels and rank must be positive; got channels=1, rank=0"),
        ({"channels": 0}, "channels and rank must be positive"),
        ({"state_size": 7}, "must be even and positive; got 7"),
        ({"num_ssm": 4}, "a divisor of width"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"bandlimit": 0.0}, "bandlimit must be positive"),
        ({"dropout": 1.0}, "dropout is a probability"),
    ],
)
def test_what_cannot_be_built(options, message, key):
    with pytest.raises(ValueError, match=re.escape(message)):
        nn.S4ND(6, **{"state_size": 8, **options}, key=key)


@pytest.mark.parametrize(
    "shape, rate, message",
    [
        ((3, 2), 1.0, "An S4ND of num_axes=2 takes so many axes"),
        ((2, 3, 4, 2), 1.0, "got an input of shape (2, 3, 4, 2)"),
        ((3, 0, 2), 1.0, "none of them empty"),
        ((3, 4, 2), 0.0, "rate must be positive, as 0.5 for a grid of twice the resolution; got 0.0"),
        ((3, 4, 2), (1.0, -1.0), "rate must be positive"),
        ((3, 4, 2), (1.0, math.nan), "rate must be positive"),
        ((3, 4, 1), 1.0, "2 channels; got an input of shape (3, 4, 1)"),
        ((3, 4, 2), (1.0, 1.0, 1.0), "rate must be one for all, or one for each of num_axes=2 axes"),
    ],
)
def test_what_cannot_be_run(shape, rate, message, key):
    layer, _ = build("image", key)
    with pytest.raises(ValueError, match=re.escape(message)):
        eqx.filter_eval_shape(layer, np.ones(shape, np.float32), rate=rate)
