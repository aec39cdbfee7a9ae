"""The small layers, each against its formula."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, quick_jit

from s5eqx import nn

D, L = 4, 9


def rows(seed=0, shape=(L, D)):
    return np.random.default_rng(seed).standard_normal(shape)


def gelu(y):
    return 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def dense(layer, x):
    return x @ np.asarray(layer.weight).T + np.asarray(layer.bias)


def test_linear_and_norm_equal_equinox(key):
    x = jnp.asarray(rows(), jnp.float32)
    for layer in (eqx.nn.Linear(D, 3, key=key), eqx.nn.Linear(D, 3, use_bias=False, key=key)):
        np.testing.assert_allclose(nn.linear(layer, x), jax.vmap(layer)(x), atol=1e-6)
        np.testing.assert_allclose(nn.linear(layer, x[0]), layer(x[0]), atol=1e-6)
    layer = eqx.tree_at(lambda n: (n.weight, n.bias), eqx.nn.LayerNorm(D), (x[0], x[1]))
    np.testing.assert_allclose(nn.layer_norm(layer, x), jax.vmap(layer)(x), atol=1e-5)
    np.testing.assert_allclose(nn.layer_norm(layer, x[2]), layer(x[2]), atol=1e-5)


def test_norm_is_float32_inside_and_float64_stays(x64):
    x = 100 + rows()
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    got = nn.layer_norm(eqx.nn.LayerNorm(D), jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    half = jnp.asarray(x, jnp.bfloat16)
    got = nn.layer_norm(nn.cast(eqx.nn.LayerNorm(D), jnp.bfloat16), half)
    assert got.dtype == jnp.bfloat16
    exact = nn.layer_norm(eqx.nn.LayerNorm(D), half.astype(float))
    np.testing.assert_allclose(got.astype(float), exact, atol=0.02)


@pytest.mark.smoke
def test_activations(key, x64):
    y, (key1, key2, key3) = rows(), jr.split(key, 3)
    half1, half2, full = nn.HalfGLU1(D, key=key1), nn.HalfGLU2(D, key=key2), nn.FullGLU(D, key=key3)
    g = gelu(y)
    for layer, expected in (
        (nn.Gelu(), g),
        (half1, g * sigmoid(dense(half1.out2, g))),
        (half2, y * sigmoid(dense(half2.out2, g))),
        (full, dense(full.out1, g) * sigmoid(dense(full.out2, g))),
    ):
        np.testing.assert_allclose(layer(jnp.asarray(y)), expected, atol=1e-12)
        np.testing.assert_allclose(layer(jnp.asarray(y[3])), expected[3], atol=1e-12)


@pytest.mark.smoke
def test_mlp(key, x64):
    mlp, x = nn.MLP(D, 7, key=key), rows()
    h = dense(mlp.fc1, x)
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(mlp(jnp.asarray(x)), dense(mlp.fc2, h), atol=1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_short_conv(kernel_size, key, x64):
    conv, x = nn.ShortConv(D, kernel_size, key=key), rows()
    conv = eqx.tree_at(lambda c: c.bias, conv, jnp.asarray(rows(1, (D,))))
    convolve = lambda taps, x: np.convolve(taps[::-1], x)[:L]
    expected = np.stack([convolve(np.asarray(conv.weight)[:, d], x[:, d]) for d in range(D)], axis=1)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected + np.asarray(conv.bias), atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_hyena(order, key, x64):
    """Pieces in the order x_0, ..., x_{N-1}, v; the first operator meets the last gate."""
    keys = jr.split(key, order)
    convs = tuple(nn.ShortConv(D, 5, key=k) for k in keys[1:])
    layer = nn.Hyena(D, nn.MixerBank(convs), order=order, activation=nn.Gelu(), key=keys[0])
    z = layer.short_conv(jnp.asarray(dense(layer.in_proj, rows())))
    *gates, v = (z[:, i * D : (i + 1) * D] for i in range(order + 1))
    for o, conv in enumerate(convs):
        v = conv(v * gates[order - 1 - o])
    expected = dense(layer.out_proj, gelu(np.asarray(v * gates[0])))
    np.testing.assert_allclose(layer(jnp.asarray(rows())), expected, atol=1e-12)


def test_hyena_s5_builds_separate_operators(key):
    layer = nn.hyena_s5(D, 8, order=3, num_blocks=2, dt_min=0.01, activation=nn.HalfGLU2, key=key)
    first, second = layer.bank.operators()
    for a, b in ((first.B, second.B), (first.activation.out2.weight, second.activation.out2.weight)):
        assert not jnp.any(a == b)


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
    bank = nn.MixerBank((nn.S5(D, 8, key=key),))
    with pytest.raises(ValueError, match=re.escape(message)):
        build(bank, key)


@pytest.mark.smoke
def test_stochastic_depth(key):
    """It keeps with probability 1 - p, the whole array at once, and rescales: the mean is the input."""
    drop, x = nn.StochasticDepth(0.25), jnp.asarray(rows(), jnp.float32)
    out = jax.vmap(lambda k: drop(x, key=k))(jr.split(key, 4000))
    kept = jnp.all(out == x[None] / 0.75, axis=(1, 2))
    assert jnp.all(kept | jnp.all(out == 0, axis=(1, 2)))
    np.testing.assert_allclose(jnp.mean(kept), 0.75, atol=4 * math.sqrt(0.25 * 0.75 / 4000))
    with pytest.raises(RuntimeError, match=r"Pass `key`, or set inference"):
        drop(x)
    np.testing.assert_array_equal(eqx.nn.inference_mode(drop)(x), x)
    np.testing.assert_array_equal(nn.StochasticDepth()(x), x)


def test_block_drops_each_branch_as_a_whole(key):
    """It is the plain block with each branch dropped or doubled: four outputs, equally likely."""
    key1, key2, key = jr.split(key, 3)
    mixer, mlp = nn.ShortConv(D, 3, key=key1), nn.MLP(D, 8, key=key2)
    plain, block = nn.Block(mixer, mlp), nn.Block(mixer, mlp, drop_path=0.5)
    x = jnp.asarray(rows(), jnp.float32)

    @quick_jit
    def residual(scale1, scale2):
        h = x + scale1 * mixer(nn.layer_norm(plain.norm1, x))
        return h + scale2 * mlp(nn.layer_norm(plain.norm2, h))

    expected = residual(jnp.ones(()), jnp.ones(()))
    for model in (plain, eqx.nn.inference_mode(block)):
        np.testing.assert_allclose(quick_jit(model)(x), expected, atol=1e-5)
    outcomes = jnp.stack([residual(jnp.asarray(i), jnp.asarray(j)) for i in (0.0, 2.0) for j in (0.0, 2.0)])
    out = quick_jit(jax.vmap(lambda k: block(x, key=k)))(jr.split(key, 400))
    hits = np.all(np.isclose(out[:, None], outcomes[None], atol=1e-5), axis=(2, 3))
    assert np.all(hits.sum(axis=1) == 1)
    np.testing.assert_allclose(hits.mean(axis=0), 0.25, atol=0.1)


def test_hyena_dropout_acts_on_the_products(key):
    layer = nn.hyena_s5(D, 8, order=3, dropout=0.4, key=key)
    x = jnp.asarray(rows(), jnp.float32)
    call = quick_jit(lambda key: layer(x, key=key))
    np.testing.assert_array_equal(call(key), call(key))
    assert not np.allclose(call(key), call(jr.key(1)))
    with pytest.raises(RuntimeError, match="key"):
        layer(x)
    silent, without = eqx.nn.inference_mode(layer), eqx.tree_at(lambda h: h.dropout.p, layer, 0.0)
    np.testing.assert_allclose(quick_jit(silent)(x), quick_jit(without)(x), atol=1e-6)


def test_cast_and_mask_keep_the_recurrence(key):
    block = drawn(lambda key: nn.Block(nn.hyena_s5(D, 8, activation=nn.HalfGLU2, key=key), nn.MLP(D, 8, key=key)), key)
    model = {"block": block, "both": (drawn(lambda key: nn.BidirectionalS5(D, 8, key=key), key), None)}
    model["count"] = jnp.arange(3)
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
    x = jnp.asarray(rows(), jnp.bfloat16)
    assert eqx.filter_eval_shape(half["block"], x).dtype == jnp.bfloat16
