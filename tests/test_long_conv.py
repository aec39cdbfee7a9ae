"""Long convolutions against loops in numpy: kernels, both directions, dropout, and what they refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_jit

from s5eqx import nn

D, K, L, LAM = 3, 9, 7, 0.5


class Large(nn.AbstractKernelInit):
    """Some taps above `LAM`, some below."""

    def __call__(self, channels, width, max_length, *, dtype, key):
        return jr.normal(key, (channels, width, max_length), dtype)


def squash(k):
    return np.where(np.abs(k) > LAM, k - np.sign(k) * LAM, 0.0)


def sequence():
    return jnp.asarray(np.random.default_rng(0).standard_normal((L, D)))


def in_loops(conv, x, backward=None):
    y = np.zeros((L, *conv.D.shape))
    kernel = squash(conv.kernel)
    for t in range(L):
        y[t] = np.asarray(conv.D) * x[t]
        y[t] += sum(kernel[:, :, t - s] * x[s] for s in range(t + 1))
        if backward is not None:
            y[t] += sum((squash(backward)[:, :, s - t - 1] * x[s] for s in range(t + 1, L)), np.zeros_like(y[t]))
    return y.reshape(L, conv.D.size)


def test_causal(key, x64):
    conv, x = nn.SquashedConvolution(D, K, channels=2, init=Large(), lam=LAM, key=key), sequence()
    np.testing.assert_allclose(quick_jit(conv)(x), in_loops(conv, np.asarray(x)), rtol=0, atol=1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("glu", [True, False])
def test_layers(glu, key, x64):
    """The second kernel sees only what is to come; both are gated, or not, in the same way."""
    build = lambda layer: layer(D, K, channels=2, init=Large(), lam=LAM, glu=glu, key=key)
    causal, both, x = build(nn.LongConv), build(nn.BidirectionalLongConv), sequence()
    for layer, one, y in (
        (causal, causal, in_loops(causal.conv, np.asarray(x))),
        (both, both.forward, in_loops(both.forward.conv, np.asarray(x), both.kernel_backward)),
    ):
        g = jax.nn.gelu(y, approximate=False)
        expected = one.output_linear(g) if glu else nn.linear(one.output_linear, g)
        np.testing.assert_allclose(quick_jit(layer)(x), expected, rtol=0, atol=1e-12)
        assert quick_jit(layer)(x[:0]).shape == (0, D)


def test_the_squash_has_no_gradient_below_its_threshold(key):
    conv = nn.SquashedConvolution(D, K, init=Large(), lam=LAM, key=key)
    gradient = jax.grad(lambda kernel: jnp.sum(eqx.tree_at(lambda c: c.kernel, conv, kernel).processed()))(conv.kernel)
    np.testing.assert_array_equal(gradient, np.abs(conv.kernel) > LAM)


@pytest.mark.smoke
@pytest.mark.parametrize("taps", [8, 9, 1])
def test_smoothing(taps, x64):
    rng, p = np.random.default_rng(1), 2
    k = rng.standard_normal((2, D, taps))
    padded = np.pad(k, ((0, 0), (0, 0), (p, p)))
    in_time = np.stack([padded[..., j : j + 2 * p + 1].mean(-1) for j in range(taps)], -1)
    np.testing.assert_allclose(nn.SmoothTime(2 * p + 1)(jnp.asarray(k)), in_time, rtol=0, atol=1e-14)

    spectrum = np.pad(np.fft.rfft(k), ((0, 0), (0, 0), (p, p)))
    bell = np.exp(-0.5 * np.arange(-p, p + 1) ** 2)
    blurred = np.stack([(spectrum[..., f : f + 2 * p + 1] * bell).sum(-1) for f in range(taps // 2 + 1)], -1)
    in_frequency = np.fft.irfft(blurred, taps)
    np.testing.assert_allclose(nn.SmoothFrequency(2 * p + 1)(jnp.asarray(k)), in_frequency, rtol=0, atol=1e-13)


def test_smoothing_comes_before_the_squash(key, x64):
    conv = nn.SquashedConvolution(D, K, init=Large(), lam=LAM, smooth=nn.SmoothTime(3), key=key)
    np.testing.assert_array_equal(conv.processed(), squash(nn.SmoothTime(3)(conv.kernel)).swapaxes(1, 2))


def test_initial_kernels(key):
    """Standard deviations over many kernels; the share above the threshold is what is said of the published ones."""
    draw = lambda init, width, taps, channels: init(channels, width, taps, dtype=jnp.float32, key=key)
    np.testing.assert_allclose(jnp.std(draw(nn.RandomKernel(), 8, 64, 16)), 0.002, rtol=0.05)
    k = draw(nn.GeometricDecay(), 7, 4, 40000)
    expected = 0.02 * np.exp(-np.outer(3.0 ** (np.arange(7) / 7), np.arange(4) / 4))
    np.testing.assert_allclose(jnp.std(k, axis=0), expected, rtol=0.02)
    for init, share in ((nn.RandomKernel(), 0.13), (nn.GeometricDecay(), 0.34)):
        assert abs(jnp.mean(jnp.abs(draw(init, 64, 1024, 1)) > 0.003) - share) < 0.01
    assert jnp.all(jnp.isfinite(draw(nn.GeometricDecay(), 1, 4, 1)))


def test_kernel_dropout_is_of_taps(key, x64):
    """One kernel for the whole call: the layer stays a convolution."""
    conv = nn.SquashedConvolution(D, K, init=Large(), lam=0.0, dropout=0.5, key=key)
    impulse = jnp.zeros((K, D)).at[0].set(1.0)
    response = quick_jit(lambda x: conv(x, key=key))
    taps = response(impulse) - impulse * conv.D
    np.testing.assert_allclose(taps, conv.processed(key=key)[0], rtol=0, atol=1e-13)
    late = response(jnp.roll(impulse, 2, axis=0)) - jnp.roll(impulse, 2, axis=0) * conv.D
    np.testing.assert_allclose(late[2:], taps[:-2], rtol=0, atol=1e-13)
    kept = np.asarray(conv.processed(key=key)[0])
    kept, whole = kept[kept != 0], 2 * np.asarray(conv.kernel[0]).T[kept != 0]
    assert 0.2 < len(kept) / (D * K) < 0.8
    np.testing.assert_allclose(kept, whole, rtol=1e-12)
    with pytest.raises(RuntimeError, match="key"):
        conv(impulse)
    assert jnp.all(eqx.nn.inference_mode(conv).processed() != 0)


@pytest.mark.parametrize("layer", [nn.SquashedConvolution, nn.LongConv, nn.BidirectionalLongConv])
def test_what_they_refuse(layer, key):
    mixer, x = layer(D, 4, key=key), jnp.zeros((5, D))
    with pytest.raises(ValueError, match="larger max_length"):
        mixer(x)
    with pytest.raises(ValueError, match="takes no `reset`"):
        mixer(x[:4], reset=jnp.zeros(4, bool))
    for options, why in (
        ({"channels": 0}, "channels must be positive"),
        ({"lam": -1.0}, "at least 0"),
        ({"dropout": 1.0}, "dropout is a probability"),
    ):
        with pytest.raises(ValueError, match=why):
            layer(D, 4, **options, key=key)
    for smooth in (nn.SmoothTime, nn.SmoothFrequency):
        with pytest.raises(ValueError, match="must be odd"):
            smooth(4)


def test_a_longer_stream_is_refused(key):
    layer = nn.LongConv(D, 4, key=key)
    state, _ = quick_jit(layer.prefill)(layer.init_state(), jnp.zeros((4, D)))
    for call, x in ((layer.step, jnp.zeros(D)), (layer.prefill, jnp.zeros((1, D)))):
        with pytest.raises(RuntimeError, match="longer than its convolution's kernel, 4 steps"):
            quick_jit(call)(state, x)
