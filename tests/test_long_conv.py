"""Long convolutions against loops in numpy: kernels, both directions, dropout, and what they refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit

from s5eqx import nn

D, K, L, LAM = 3, 9, 7, 0.2  # some of the taps that are drawn lie above LAM, some below


def squash(k):
    k = np.asarray(k)
    return np.where(np.abs(k) > LAM, k - np.sign(k) * LAM, 0.0)


def sequence():
    return np.random.default_rng(0).standard_normal((L, D))


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
    conv, x = drawn(lambda key: nn.SquashedConvolution(D, K, channels=2, lam=LAM, key=key), key), sequence()
    np.testing.assert_allclose(quick_jit(conv)(x), in_loops(conv, x), rtol=0, atol=1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("glu", [True, False])
def test_layers(glu, key, x64):
    """The second kernel sees only what is to come; both are gated, or not, in the same way."""
    build = lambda layer: drawn(lambda key: layer(D, K, channels=2, lam=LAM, glu=glu, key=key), key)
    causal, both, x = build(nn.LongConv), build(nn.BidirectionalLongConv), sequence()

    @quick_jit
    def run(layer, one, x, y):
        g = jax.nn.gelu(y, approximate=False)
        return layer(x), layer(x[:0]), one.output_linear(g) if glu else nn.linear(one.output_linear, g)

    for layer, one, y in (
        (causal, causal, in_loops(causal.conv, x)),
        (both, both.forward, in_loops(both.forward.conv, x, both.kernel_backward)),
    ):
        got, empty, expected = run(layer, one, x, y)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        assert empty.shape == (0, D)


def test_the_squash_has_no_gradient_below_its_threshold(key):
    conv = drawn(lambda key: nn.SquashedConvolution(D, K, lam=LAM, key=key), key)
    total = lambda kernel: jnp.sum(eqx.tree_at(lambda c: c.kernel, conv, kernel).processed())
    np.testing.assert_array_equal(quick_jit(jax.grad(total))(conv.kernel), np.abs(conv.kernel) > LAM)


@pytest.mark.smoke
@pytest.mark.parametrize("taps", [8, 9, 1])
def test_smoothing(taps, x64):
    rng, p = np.random.default_rng(1), 2
    k = rng.standard_normal((2, D, taps))
    padded = np.pad(k, ((0, 0), (0, 0), (p, p)))
    in_time = np.stack([padded[..., j : j + 2 * p + 1].mean(-1) for j in range(taps)], -1)

    spectrum = np.pad(np.fft.rfft(k), ((0, 0), (0, 0), (p, p)))
    bell = np.exp(-0.5 * np.arange(-p, p + 1) ** 2)
    blurred = np.stack([(spectrum[..., f : f + 2 * p + 1] * bell).sum(-1) for f in range(taps // 2 + 1)], -1)
    in_frequency = np.fft.irfft(blurred, taps)
    found = quick_jit(lambda k: [smooth(2 * p + 1)(k) for smooth in (nn.SmoothTime, nn.SmoothFrequency)])(k)
    np.testing.assert_allclose(found[0], in_time, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found[1], in_frequency, rtol=0, atol=1e-13)


def test_smoothing_comes_before_the_squash(key, x64):
    conv = drawn(lambda key: nn.SquashedConvolution(D, K, lam=LAM, smooth=nn.SmoothTime(3), key=key), key)
    processed, smooth = quick_jit(lambda: (conv.processed(), nn.SmoothTime(3)(conv.kernel)))()
    np.testing.assert_array_equal(processed, squash(smooth).swapaxes(1, 2))


def test_initial_kernels(key):
    """Standard deviations over many kernels; the share above the threshold is what is said of the published ones."""
    call = lambda init, *shape: quick_jit(init)(*shape, dtype=jnp.float32, key=key)
    draw = lambda init, width, taps, channels: np.asarray(call(init, channels, width, taps))
    np.testing.assert_allclose(np.std(draw(nn.RandomKernel(), 8, 64, 16)), 0.002, rtol=0.05)
    k = draw(nn.GeometricDecay(), 7, 4, 40000)
    expected = 0.02 * np.exp(-np.outer(3.0 ** (np.arange(7) / 7), np.arange(4) / 4))
    np.testing.assert_allclose(np.std(k, axis=0), expected, rtol=0.02)
    for init, share in ((nn.RandomKernel(), 0.13), (nn.GeometricDecay(), 0.34)):
        assert abs(np.mean(np.abs(draw(init, 64, 1024, 1)) > 0.003) - share) < 0.01
    assert np.all(np.isfinite(draw(nn.GeometricDecay(), 1, 4, 1)))


def test_kernel_dropout_is_of_taps(key, x64):
    """One kernel for the whole call: the layer stays a convolution."""
    conv = drawn(lambda key: nn.SquashedConvolution(D, K, lam=0.0, dropout=0.5, key=key), key)
    impulse, later = (np.eye(K)[:, [at]].repeat(D, axis=1) for at in (0, 2))

    @quick_jit
    def run(key, impulse, later):
        calls = [conv(x, key=key) for x in (impulse, later)]
        return *calls, conv.processed(key=key)[0], eqx.nn.inference_mode(conv).processed()

    taps, late, kept, silent = map(np.asarray, run(key, impulse, later))
    skip = np.asarray(conv.D)
    taps, late = taps - impulse * skip, late - later * skip
    np.testing.assert_allclose(taps, kept, rtol=0, atol=1e-13)
    np.testing.assert_allclose(late[2:], taps[:-2], rtol=0, atol=1e-13)
    kept, whole = kept[kept != 0], 2 * np.asarray(conv.kernel)[0].T[kept != 0]
    assert 0.2 < len(kept) / (D * K) < 0.8
    np.testing.assert_allclose(kept, whole, rtol=1e-12)
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(conv, on_device(impulse))
    assert np.all(silent != 0)


@pytest.mark.parametrize("layer", [nn.SquashedConvolution, nn.LongConv, nn.BidirectionalLongConv])
def test_what_they_refuse(layer, key):
    build = lambda **options: drawn(lambda key: layer(D, 4, **options, key=key), key)
    zeros = lambda *shape: on_device(np.zeros(shape), np.float32)
    with pytest.raises(ValueError, match="larger max_length"):
        eqx.filter_eval_shape(build(), zeros(5, D))
    with pytest.raises(ValueError, match="takes no `reset`"):
        eqx.filter_eval_shape(build(), zeros(4, D), reset=on_device(np.zeros(4), bool))
    for options, why in (
        ({"channels": 0}, "channels must be positive"),
        ({"lam": -1.0}, "at least 0"),
        ({"dropout": 1.0}, "dropout is a probability"),
    ):
        with pytest.raises(ValueError, match=why):
            build(**options)
    for smooth in (nn.SmoothTime, nn.SmoothFrequency):
        with pytest.raises(ValueError, match="must be odd"):
            smooth(4)


def test_a_longer_stream_is_refused(key):
    layer, x = drawn(lambda key: nn.LongConv(D, 4, key=key), key), np.zeros((4, D), np.float32)
    state, _ = quick_jit(lambda x: layer.prefill(layer.init_state(), x))(x)
    for call, more in ((layer.step, x[0]), (layer.prefill, x[:1])):
        with pytest.raises(RuntimeError, match="longer than its convolution's kernel, 4 steps"):
            quick_jit(call)(state, more)
