"""The small layers, each against its formula."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dense, drawn, on_device, quick_jit

from s5eqx import nn

D, L = 4, 9


def rows(seed=0, shape=(L, D)):
    return np.random.default_rng(seed).standard_normal(shape)


def gelu(y):
    return 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def convolved(layer, x):
    taps = np.asarray(layer.weight)[::-1]
    columns = [np.convolve(taps[:, d], x[:, d])[: len(x)] for d in range(x.shape[1])]
    return np.stack(columns, axis=1) + np.asarray(layer.bias)


def normalised(x):
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def test_linear_and_norm_equal_equinox(key):
    linear = lambda key, bias: eqx.nn.Linear(D, 3, use_bias=bias, key=key)
    layers = drawn(lambda key: [linear(key, True), linear(key, False), eqx.nn.LayerNorm(D)], key)

    @quick_jit
    def both(x):
        pairs = zip((nn.linear, nn.linear, nn.layer_norm), layers, strict=True)
        return [((ours(layer, x), ours(layer, x[0])), (jax.vmap(layer)(x), layer(x[0]))) for ours, layer in pairs]

    for ours, theirs in both(rows().astype(np.float32)):
        for got, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_norm_is_float32_inside_and_float64_stays(x64):
    x = 100 + rows()
    half, norm = on_device(x, jnp.bfloat16), quick_jit(eqx.nn.LayerNorm)(D)
    run = quick_jit(lambda x, half: (nn.layer_norm(norm, x), nn.layer_norm(nn.cast(norm, jnp.bfloat16), half)))
    wide, got = run(x, half)
    np.testing.assert_allclose(wide, normalised(x), rtol=1e-12)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, float), normalised(np.asarray(half, float)), atol=0.02)


@pytest.mark.smoke
def test_activations(key, x64):
    gated = drawn(lambda key: [layer(D, key=key) for layer in (nn.HalfGLU1, nn.HalfGLU2, nn.FullGLU)], key)
    half1, half2, full = gated
    y, g = rows(), gelu(rows())
    expected = (
        g,
        g * sigmoid(dense(half1.out2, g)),
        y * sigmoid(dense(half2.out2, g)),
        dense(full.out1, g) * sigmoid(dense(full.out2, g)),
    )
    found = quick_jit(lambda y: [(layer(y), layer(y[3])) for layer in (nn.Gelu(), *gated)])(y)
    for (of_rows, of_one), each in zip(found, expected, strict=True):
        np.testing.assert_allclose(of_rows, each, atol=1e-12)
        np.testing.assert_allclose(of_one, each[3], atol=1e-12)


@pytest.mark.smoke
def test_mlp(key, x64):
    mlp, x = drawn(lambda key: nn.MLP(D, 7, key=key), key), rows()
    h = dense(mlp.fc1, x)
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(quick_jit(mlp)(x), dense(mlp.fc2, h), atol=1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_short_conv(kernel_size, key, x64):
    conv, x = drawn(lambda key: nn.ShortConv(D, kernel_size, key=key), key), rows()
    np.testing.assert_allclose(quick_jit(conv)(x), convolved(conv, x), atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_hyena(order, key, x64):
    """Pieces in the order x_0, ..., x_{N-1}, v; the first operator meets the last gate."""
    bank = lambda key: nn.MixerBank(tuple(nn.ShortConv(D, 5, key=key) for _ in range(order - 1)))
    layer = drawn(lambda key: nn.Hyena(D, bank(key), order=order, activation=nn.Gelu(), key=key), key)
    z = convolved(layer.short_conv, dense(layer.in_proj, rows()))
    *gates, v = np.split(z, order + 1, axis=1)
    for conv in layer.bank.operators():
        v = convolved(conv, v * gates.pop())
    expected = dense(layer.out_proj, gelu(v * gates.pop()))
    np.testing.assert_allclose(quick_jit(layer)(rows()), expected, atol=1e-12)


def test_hyena_s5_builds_separate_operators(key):
    @quick_jit
    def operators(key):
        layer = nn.hyena_s5(D, 8, order=3, num_blocks=2, dt_min=0.01, activation=nn.HalfGLU2, key=key)
        return [(operator.B, operator.activation.out2.weight) for operator in layer.bank.operators()]

    for a, b in zip(*operators(key), strict=True):
        assert not np.any(np.asarray(a) == np.asarray(b))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda bank, key: nn.Hyena(D, bank, order=1, key=key), "order must be at least 2"),
        (lambda bank, key: nn.hyena_s5(D, 8, order=1, key=key), "order must be at least 2"),
        (lambda bank, key: nn.Hyena(D, bank, order=3, key=key), "takes a bank of 2 operators; got 1"),
        (lambda bank, key: nn.Hyena(D + 1, bank, key=key), "must map width 5 to width 5; S5 refuses"),
        (lambda bank, key: nn.Hyena(D, bank, short_filter=-1, key=key), "short_filter at least 0; got 4 and -1"),
        (lambda bank, key: nn.ShortConv(D, 0, key=key), "kernel_size=0"),
        (lambda bank, key: nn.MLP(D, 0, key=key), "hidden=0"),
        (lambda bank, key: nn.Block(bank.operators()[0], nn.MLP(6, 6, key=key)), "must map width 6 to width 6"),
        (
            lambda bank, key: nn.Block(nn.BidirectionalS5(D, 8, key=key), nn.MLP(D, D, key=key)),
            "mixer must be causal",
        ),
        (lambda bank, key: nn.StochasticDepth(1.0), "rate is a probability to drop and lies in [0, 1); got 1.0"),
    ],
)
def test_layers_that_do_not_fit(build, message, key):
    bank = lambda key: nn.MixerBank((nn.S5(D, 8, key=key),))
    with pytest.raises(ValueError, match=re.escape(message)):
        eqx.filter_eval_shape(lambda key: build(bank(key), key), key)


@pytest.mark.smoke
def test_stochastic_depth(key):
    """It keeps with probability 1 - p, the whole array at once, and rescales: the mean is the input."""
    drop, x = nn.StochasticDepth(0.25), on_device(rows(), np.float32)
    out = np.asarray(quick_jit(lambda key: jax.vmap(lambda k: drop(x, key=k))(jr.split(key, 4000)))(key))
    kept = np.all(out == np.asarray(x) / 0.75, axis=(1, 2))
    assert np.all(kept | np.all(out == 0, axis=(1, 2)))
    np.testing.assert_allclose(np.mean(kept), 0.75, atol=4 * math.sqrt(0.25 * 0.75 / 4000))
    with pytest.raises(RuntimeError, match=r"Pass `key`, or set inference"):
        drop(x)
    np.testing.assert_array_equal(eqx.nn.inference_mode(drop)(x), x)
    np.testing.assert_array_equal(nn.StochasticDepth()(x), x)


def test_block_drops_each_branch_as_a_whole(key):
    """It is the plain block with each branch dropped or doubled: four outputs, equally likely."""
    build = lambda rate: lambda key: nn.Block(nn.ShortConv(D, 3, key=key), nn.MLP(D, 8, key=key), drop_path=rate)
    plain, block = (drawn(build(rate), key) for rate in (0.0, 0.5))

    @quick_jit
    def run(x, key):
        def residual(scale1, scale2):
            h = x + scale1 * plain.mixer(nn.layer_norm(plain.norm1, x))
            return h + scale2 * plain.mlp(nn.layer_norm(plain.norm2, h))

        whole = plain(x), eqx.nn.inference_mode(block)(x)
        outcomes = [residual(i, j) for i in (0.0, 2.0) for j in (0.0, 2.0)]
        return whole, residual(1.0, 1.0), outcomes, jax.vmap(lambda k: block(x, key=k))(jr.split(key, 400))

    whole, expected, outcomes, out = run(rows().astype(np.float32), key)
    for y in whole:
        np.testing.assert_allclose(y, expected, atol=1e-5)
    hits = np.all(np.isclose(np.asarray(out)[:, None], outcomes, atol=1e-5), axis=(2, 3))
    assert np.all(hits.sum(axis=1) == 1)
    np.testing.assert_allclose(hits.mean(axis=0), 0.25, atol=0.1)


def test_hyena_dropout_acts_on_the_products(key):
    layer = drawn(lambda key: nn.hyena_s5(D, 8, order=3, dropout=0.4, key=key), key)
    x = on_device(rows(), np.float32)
    call = quick_jit(lambda key: layer(x, key=key))
    np.testing.assert_array_equal(call(key), call(key))
    assert not np.allclose(call(key), call(jr.key(1)))
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(layer, x)
    silent, without = eqx.nn.inference_mode(layer), eqx.tree_at(lambda h: h.dropout.p, layer, 0.0)
    np.testing.assert_allclose(*quick_jit(lambda x: (silent(x), without(x)))(x), atol=1e-6)


def test_cast_and_mask_keep_the_recurrence(key):
    block = drawn(lambda key: nn.Block(nn.hyena_s5(D, 8, activation=nn.HalfGLU2, key=key), nn.MLP(D, 8, key=key)), key)
    model = {"block": block, "both": (drawn(lambda key: nn.BidirectionalS5(D, 8, key=key), key), None)}
    model["count"] = on_device(np.arange(3))
    mask = nn.recurrence_mask(model)
    assert jax.tree.structure(mask) == jax.tree.structure(jax.tree.map(lambda _: True, model))
    s5 = lambda m: m["block"].mixer.bank.operators()[0]
    assert all(getattr(s5(mask), name) is True for name in nn.S5.recurrence)
    assert sum(jax.tree.leaves(mask)) == 2 * len(nn.S5.recurrence) + 1

    half = nn.cast(model, jnp.bfloat16)
    for leaf, kept, before in zip(*map(jax.tree.leaves, (half, mask, model)), strict=True):
        if eqx.is_inexact_array(before):
            assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16)
        else:
            assert leaf is before
    x = on_device(rows(), jnp.bfloat16)
    assert eqx.filter_eval_shape(half["block"], x).dtype == jnp.bfloat16
