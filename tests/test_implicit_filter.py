"""Hyena's implicit filters, their heads, and what is refused."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dense, drawn, quick_jit, slow

from s5eqx import nn
from s5eqx.models import LanguageModel

D, K = 4, 10


def x(length=K, width=D):
    return np.random.default_rng(3).standard_normal((length, width)).astype(jnp.result_type(float))


@pytest.mark.smoke
def test_kernels_by_the_formula(key, x64):
    """Tap by tap in NumPy; channel d of operator n is column d (N-1) + n of the network's output."""
    options = {"features": 7, "filter_width": 5, "num_hidden": 1, "frequency": 2.0, "shift": 0.1, "normalize": True}
    build = lambda key: nn.ImplicitFilter(3, K, order=3, **options, key=key)
    bank, kernels = quick_jit(lambda key: ((bank := build(key)), bank.kernels()))(key)
    first, second, last = ([np.asarray(a) for a in jax.tree.leaves(eqx.filter(la, eqx.is_array))] for la in bank.layers)
    for i, tap in enumerate(np.moveaxis(np.asarray(kernels), 1, 0)):
        t, angle = i / (K - 1), 2 * np.pi * i / K * np.array([1e-4, 1.00005, 2])
        z = np.concatenate([[t], np.cos(angle), -np.sin(angle)])
        h = np.sin(2.0 * (first[0] @ z + first[1]))
        h = last[0] @ np.sin(2.0 * (second[0] @ h + second[1]))
        h = h * (np.exp(-t * np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, 6)) + 0.1)
        np.testing.assert_allclose(tap, (h / np.abs(h).sum()).reshape(3, 2).T, rtol=1e-10)


def test_heads_by_the_definition(key, x64):
    """Each head convolves the outer product of its keys and values with one filter; queries contract it."""
    layer = drawn(lambda key: nn.hyena(D, K, num_heads=2, short_filter=0, key=key), key)
    u = x()
    q, k, v = (a.reshape(K, 2, 2) for a in np.split(dense(layer.in_proj, u), 3, axis=1))
    kernels, got = quick_jit(lambda layer: (layer.bank.kernels(), layer(u)))(layer)
    (kernel,), skip = np.asarray(kernels), np.asarray(layer.bank.bias)
    y = np.zeros((K, 2, 2))
    for t in range(K):
        for h in range(2):
            kv = skip[h] * np.outer(k[t, h], v[t, h])
            for s in range(t + 1):
                kv = kv + kernel[t - s, h] * np.outer(k[s, h], v[s, h])
            y[t, h] = q[t, h] @ kv
    np.testing.assert_allclose(got, dense(layer.out_proj, y.reshape(K, D)), atol=1e-12)


@pytest.mark.parametrize("stack", [slow(False), True])
def test_materialised_model_is_the_same_function(stack, key, x64):
    mixer = lambda key: nn.hyena(D, K, order=3, filter_width=3, key=key)
    model = drawn(lambda key: LanguageModel(7, D, mixer, num_layers=2, mlp_width=5, stack=stack, key=key), key)
    explicit = quick_jit(nn.materialise)(model)
    tokens = np.arange(K) % 7

    @quick_jit
    def run(model, explicit):
        banks = [block.mixer.bank for block in explicit.backbone.blocks]
        assert all(type(op) is nn.Convolution for bank in banks for op in bank.operators())
        _, steps = jax.lax.scan(explicit.step, explicit.init_state(), tokens)
        return model(tokens), explicit(tokens), steps

    expected, whole, steps = run(model, explicit)
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    np.testing.assert_allclose(steps, expected, atol=1e-12)


@pytest.mark.parametrize("train_positions", [False, True])
def test_buffers_have_no_gradient(train_positions, key):
    layer = drawn(lambda key: nn.hyena(D, K, train_positions=train_positions, key=key), key)
    gradient = quick_jit(eqx.filter_grad(lambda layer: jnp.sum(layer(x()) ** 2)))(layer)
    gradient = jax.tree.map(np.asarray, gradient.bank)
    z = gradient.z if train_positions else gradient.z.array
    assert np.any(z) == train_positions
    assert not np.any(gradient.t.array) and not np.any(gradient.deltas.array)
    assert np.any(gradient.freq) and all(np.any(layer.weight) for layer in gradient.layers)


def test_normalised_taps_of_a_window_that_underflows_are_finite(key):
    @quick_jit
    def total_and_gradient(key):
        bank = nn.ImplicitFilter(D, K, fast_decay=0.01, slow_decay=0.02, normalize=True, key=key)
        return eqx.filter_value_and_grad(lambda bank: jnp.sum(bank.kernels() ** 2))(bank)

    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(total_and_gradient(key)))


def test_length_is_bounded_at_call_prefill_and_step(key):
    layer = drawn(lambda key: nn.hyena(D, K, key=key), key)
    start = lambda x: layer.prefill(layer.init_state(), x)
    with pytest.raises(ValueError, match=f"got {K + 1}"):
        eqx.filter_eval_shape(start, x(K + 1))
    with pytest.raises(ValueError, match=f"no longer than the kernel, {K} steps; got {K + 1}"):
        eqx.filter_eval_shape(layer, x(K + 1))
    state, _ = quick_jit(start)(x(K - 1))
    with pytest.raises(Exception, match=f"longer than its convolution's kernel, {K} steps"):
        jax.block_until_ready(quick_jit(layer.prefill)(state, x(2)))
    state, _ = quick_jit(layer.step)(state, x()[0])
    with pytest.raises(Exception, match="larger max_length"):
        jax.block_until_ready(quick_jit(layer.step)(state, x()[0]))


def test_dropout_asks_for_a_key_and_draws_anew(key):
    layer = drawn(lambda key: nn.hyena(D, K, dropout=0.5, key=key), key)
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(layer, x())
    draw = jax.vmap(lambda key: layer(x(), key=key))
    two, quiet = quick_jit(lambda key: (draw(jr.split(key)), eqx.nn.inference_mode(layer)(x())))(key)
    assert not np.allclose(*np.asarray(two))
    assert np.all(np.isfinite(quiet))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda key: nn.hyena(D, K, num_heads=3, key=key), "divide the width 4; got 3"),
        (lambda key: nn.hyena(D, K, num_heads=2, order=3, key=key), "Heads need order 2"),
        (lambda key: nn.hyena(D, K, features=4, key=key), "odd and at least 3"),
        (lambda key: nn.hyena(D, 0, key=key), "must be positive"),
        (lambda key: nn.hyena(D, K, num_heads=0, key=key), "num_heads must be positive"),
        (lambda key: nn.hyena(D, K, order=1, key=key), "order must be at least 2"),
        (lambda key: nn.hyena(D, K, fast_decay=0.0, key=key), "decays must be positive"),
        (
            lambda key: nn.Hyena(D, nn.ImplicitFilter(D, K, order=3, key=key), key=key),
            "of order 2 takes a bank of 1 operators; got 2",
        ),
        (lambda key: nn.Hyena(D, nn.ImplicitFilter(D + 1, K, key=key), key=key), "must map width 4 to width 4"),
        (
            lambda key: nn.Hyena(D, nn.MixerBank((nn.S5(2, 4, key=key),)), num_heads=2, key=key),
            "a S5 mixes them",
        ),
    ],
)
def test_layers_that_do_not_fit(build, message, key):
    with pytest.raises(ValueError, match=re.escape(message)):
        eqx.filter_eval_shape(build, key)
