"""Attention against loops in numpy: windows, packed sequences, padding, rotary positions, dropout, bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dense, drawn, on_device, quick_jit

from s5eqx import nn

D, H, L = 8, 2, 9
RESET = np.isin(np.arange(L), [4, 6])


def sequence(dtype=float, length=L):
    return np.random.default_rng(0).standard_normal((length, D)).astype(dtype)


def in_loops(layer, x, window, reset, keep):
    """Token by token and head by head, as it is written in the docstring."""
    q, k, v = np.moveaxis(dense(layer.Wqkv, x).reshape(L, 3, H, D // H), 1, 0)
    y = np.zeros((L, H, D // H))
    for t in range(L):
        start = max(s for s in range(t + 1) if s == 0 or reset[s])
        for h in range(H):
            seen = [s for s in range(max(start, t - window + 1), t + 1) if keep[s]]
            w = np.exp([q[t, h] @ k[s, h] / np.sqrt(D // H) for s in seen])
            y[t, h] = sum((w_s / w.sum() * v[s, h] for w_s, s in zip(w, seen, strict=True)), np.zeros(D // H))
    return dense(layer.out_proj, y.reshape(L, D))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_what_the_loops_say(window, packed, padded, key, x64):
    layer, x = drawn(lambda key: nn.Attention(D, H, max_length=L, window=window, key=key), key), sequence()
    # The first two are left out, so that token 0 has nothing to attend to; so is one in the middle.
    reset, keep = packed & RESET, ~(padded & np.isin(np.arange(L), [0, 1, 5]))
    given = ({"reset": reset} if packed else {}) | ({"key_padding_mask": keep} if padded else {})
    expected = in_loops(layer, x, window or L, reset, keep)

    @quick_jit
    def gradient_and_output(layer, x):
        return jax.grad(lambda x: (jnp.sum((y := layer(x, **given)) ** 2), y), has_aux=True)(x)

    gradient, y = gradient_and_output(layer, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)

    # JAX's own attention, which runs below float64.
    low = jax.tree.map(lambda a: on_device(a, np.float32) if eqx.is_array(a) else a, layer)
    low_gradient, low_y = gradient_and_output(low, sequence(np.float32))
    np.testing.assert_allclose(low_y, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(low_gradient, gradient, rtol=0, atol=2e-5)


@pytest.mark.smoke
def test_rotary_pairs(x64):
    """Every pair turns as a complex number does; what is not turned stays."""
    x, positions = np.random.default_rng(0).standard_normal((5, H, 6)), np.array([0, 1, 7, 1000, 131072], np.int32)
    turned = quick_jit(lambda rotary, x, t: (rotary(x, t), rotary(x[3], t[3]), rotary(x.astype(jnp.bfloat16), t)))
    turn = np.exp(1j * positions[:, None, None] * 100.0 ** (-np.array([0, 2]) / 4))
    for interleaved, a, b in ((False, x[..., :2], x[..., 2:4]), (True, x[..., 0:4:2], x[..., 1:4:2])):
        z = (a + 1j * b) * turn
        expected = np.stack([z.real, z.imag], -1 if interleaved else -2).reshape(5, H, 4)
        rotary = nn.Rotary(4, base=100.0, interleaved=interleaved)
        got, one, low = map(np.asarray, turned(rotary, x, positions))
        np.testing.assert_allclose(got[..., :4], expected, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
        np.testing.assert_array_equal(one, got[3])
        # The angles are float32 at least: in bfloat16, position 1000 would be off by radians.
        np.testing.assert_allclose(low.astype(float), got, rtol=0, atol=0.03)


def test_dropout_is_of_weights(key):
    layer = drawn(lambda key: nn.Attention(D, H, max_length=L, dropout=0.4, key=key), key)
    x = sequence(np.float32)
    draw = jax.vmap(lambda key: layer(x, key=key))
    whole, draws = quick_jit(lambda key: (eqx.nn.inference_mode(layer)(x), draw(jr.split(key, 4000))))(key)
    draws = np.asarray(draws)
    np.testing.assert_allclose(draws.mean(axis=0), whole, rtol=0, atol=0.03)
    # The first token has one weight a head: either lost, or 1 / 0.6 of what it was.
    to_zero = np.all(np.abs(draws[:, 0] - np.asarray(layer.out_proj.bias)) < 1e-6, axis=1)
    np.testing.assert_allclose(to_zero.mean(), 0.4**H, atol=0.03)
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(layer, x)


def test_a_reset_drops_what_is_not_finite(key):
    layer = drawn(lambda key: nn.Attention(D, H, max_length=L, short_conv=3, key=key), key)
    step, state = quick_jit(layer.step), quick_jit(layer.init_state)()
    broken = jax.tree.map(lambda a: np.full_like(a, np.nan) if eqx.is_inexact_array(a) else a, state)
    expected = step(state, sequence()[0], reset=np.array(False))
    got = step(broken, sequence()[0], reset=np.array(True))
    assert eqx.tree_equal(*jax.tree.map(np.asarray, (got, expected)))


def test_lengths(key):
    build = lambda **options: drawn(lambda key: nn.Attention(D, H, **options, key=key), key)
    layer, x = build(max_length=L), sequence(np.float32, L + 1)
    too_long = "longer than the attention's max_length, 9 tokens"
    run = lambda x, reset=None: layer.prefill(layer.init_state(), x, reset=reset)
    for call in (layer, run):
        with pytest.raises(ValueError, match=too_long):
            eqx.filter_eval_shape(call, x)
    run, step = quick_jit(run), quick_jit(layer.step)
    state, _ = run(x, np.arange(L + 1) == 1)  # two sequences, the second one just fits
    with pytest.raises(RuntimeError, match=too_long):
        run(x, np.arange(L + 1) > L)
    with pytest.raises(RuntimeError, match=too_long):
        step(state, x[0])
    step(state, x[0], reset=np.array(True))
    assert quick_jit(build(window=2))(x).shape == x.shape


@pytest.mark.smoke
@pytest.mark.parametrize(
    "options, why",
    [
        ({"num_heads": 3, "max_length": 4}, "multiple of num_heads; got 8 and 3"),
        ({}, "at least one"),
        ({"max_length": 4, "window": 0}, "positive number"),
        ({"max_length": 4, "rotary": nn.Rotary(6), "num_heads": 2}, "at most all 4 entries"),
        ({"max_length": 4, "short_conv": -1}, "number of taps"),
        ({"max_length": 4, "dropout": 1.0}, "dropout is a probability"),
    ],
)
def test_what_it_refuses_to_build(options, why, key):
    with pytest.raises(ValueError, match=why):
        nn.Attention(D, **options, key=key)


def test_rotary_refuses():
    for dim, base in ((3, 1.0), (0, 1.0), (2, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            nn.Rotary(dim, base)
