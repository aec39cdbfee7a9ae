"""Attention against loops in numpy: windows, packed sequences, padding, rotary positions, dropout, bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, quick_jit

from s5eqx import nn

D, H, L = 8, 2, 9
RESET = np.isin(np.arange(L), [4, 6])


def sequence(dtype=float, length=L):
    return jnp.asarray(np.random.default_rng(0).standard_normal((length, D)), dtype)


def in_loops(layer, x, window, reset, keep):
    """Token by token and head by head, as it is written in the docstring."""
    x, W, b = (np.asarray(a) for a in (x, layer.Wqkv.weight, layer.Wqkv.bias))
    q, k, v = np.moveaxis((x @ W.T + b).reshape(L, 3, H, D // H), 1, 0)
    y = np.zeros((L, H, D // H))
    for t in range(L):
        start = max(s for s in range(t + 1) if s == 0 or reset[s])
        for h in range(H):
            seen = [s for s in range(max(start, t - window + 1), t + 1) if keep[s]]
            w = np.exp([q[t, h] @ k[s, h] / np.sqrt(D // H) for s in seen])
            y[t, h] = sum((w_s / w.sum() * v[s, h] for w_s, s in zip(w, seen, strict=True)), np.zeros(D // H))
    return y.reshape(L, D) @ np.asarray(layer.out_proj.weight).T + np.asarray(layer.out_proj.bias)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_what_the_loops_say(window, packed, padded, key, x64):
    layer, x = drawn(lambda key: nn.Attention(D, H, max_length=L, window=window, key=key), key), sequence()
    # The first two are left out, so that token 0 has nothing to attend to; so is one in the middle.
    reset, keep = packed & RESET, ~(padded & np.isin(np.arange(L), [0, 1, 5]))
    given = {"reset": jnp.asarray(reset)} if packed else {}
    if padded:
        given["key_padding_mask"] = jnp.asarray(keep)
    expected = in_loops(layer, x, window or L, reset, keep)
    np.testing.assert_allclose(quick_jit(layer)(x, **given), expected, rtol=0, atol=1e-12)

    # JAX's own attention, which runs below float64.
    low = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_array(a) else a, layer)
    gradient = lambda layer, x: jnp.sum(layer(x, **given) ** 2)
    got = quick_jit(lambda layer, x: (layer(x, **given), jax.grad(gradient, 1)(layer, x)))(low, sequence(jnp.float32))
    np.testing.assert_allclose(got[0], expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[1], quick_jit(jax.grad(gradient, 1))(layer, x), rtol=0, atol=2e-5)


@pytest.mark.smoke
def test_rotary_pairs(x64):
    """Every pair turns as a complex number does; what is not turned stays."""
    x, positions = jr.normal(jr.key(0), (5, H, 6)), jnp.array([0, 1, 7, 1000, 131072], jnp.int32)
    turn = np.exp(1j * np.asarray(positions)[:, None, None] * 100.0 ** (-np.array([0, 2]) / 4))
    for interleaved, a, b in ((False, x[..., :2], x[..., 2:4]), (True, x[..., 0:4:2], x[..., 1:4:2])):
        z = (np.asarray(a) + 1j * np.asarray(b)) * turn
        expected = np.stack([z.real, z.imag], -1 if interleaved else -2).reshape(5, H, 4)
        rotary = nn.Rotary(4, base=100.0, interleaved=interleaved)
        got = rotary(x, positions)
        np.testing.assert_allclose(got[..., :4], expected, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
        np.testing.assert_array_equal(rotary(x[3], positions[3]), got[3])
        # The angles are float32 at least: in bfloat16, position 1000 would be off by radians.
        low = rotary(x.astype(jnp.bfloat16), positions)
        np.testing.assert_allclose(low.astype(float), got, rtol=0, atol=0.03)


def test_dropout_is_of_weights(key):
    layer, x = nn.Attention(D, H, max_length=L, dropout=0.4, key=key), sequence(jnp.float32)
    call = quick_jit(lambda layer, key: layer(x, key=key))
    whole = call(eqx.nn.inference_mode(layer), None)
    draws = quick_jit(jax.vmap(lambda key: layer(x, key=key)))(jr.split(key, 4000))
    np.testing.assert_allclose(jnp.mean(draws, axis=0), whole, rtol=0, atol=0.03)
    # The first token has one weight a head: either lost, or 1 / 0.6 of what it was.
    to_zero = jnp.all(jnp.abs(draws[:, 0] - layer.out_proj.bias[None]) < 1e-6, axis=1)
    np.testing.assert_allclose(jnp.mean(to_zero), 0.4**H, atol=0.03)
    with pytest.raises(RuntimeError, match="key"):
        layer(x)


def test_a_reset_drops_what_is_not_finite(key):
    layer = drawn(lambda key: nn.Attention(D, H, max_length=L, short_conv=3, key=key), key)
    step = quick_jit(layer.step)
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if eqx.is_inexact_array(a) else a, layer.init_state())
    new_state, y = step(layer.init_state(), sequence()[0], reset=jnp.array(False))
    got_state, got = step(broken, sequence()[0], reset=jnp.array(True))
    assert eqx.tree_equal((got_state, got), (new_state, y))


def test_lengths(key):
    layer, x = nn.Attention(D, H, max_length=L, key=key), sequence(jnp.float32, L + 1)
    too_long = "longer than the attention's max_length, 9 tokens"
    for call in (layer, lambda x: layer.prefill(layer.init_state(), x)):
        with pytest.raises(ValueError, match=too_long):
            call(x)
    run = quick_jit(lambda state, x, reset: layer.prefill(state, x, reset=reset))
    state, _ = run(layer.init_state(), x, jnp.arange(L + 1) == 1)  # two sequences, the second one just fits
    with pytest.raises(RuntimeError, match=too_long):
        run(layer.init_state(), x, jnp.arange(L + 1) > L)
    with pytest.raises(RuntimeError, match=too_long):
        quick_jit(layer.step)(state, x[0])
    quick_jit(layer.step)(state, x[0], reset=jnp.array(True))
    assert nn.Attention(D, window=2, key=key)(x).shape == x.shape


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
