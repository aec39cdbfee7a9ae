"""LRU and RG-LRU beyond the law: the recurrences as they are written, and where they start."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, drawn, on_device, quick_jit, to_complex

from s5eqx import nn


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.smoke
def test_lru_is_its_recurrence(key, x64):
    lru = drawn(lambda key: nn.LRU(3, 4, key=key), key)
    B, C = to_complex(lru.B), to_complex(lru.C)
    Lambda = np.exp(-np.exp(lru.nu_log) + 1j * np.exp(lru.theta_log))
    x, D = np.random.default_rng(0).standard_normal((6, 3)), np.asarray(lru.D)
    state, y = np.zeros(4, complex), []
    for u in x:
        state = Lambda * state + np.exp(lru.gamma_log) * (B @ u)
        y.append((C @ state).real + D * u)
    np.testing.assert_allclose(quick_jit(lru)(x), y, atol=1e-13)


@pytest.mark.parametrize("r_min, r_max, max_phase", [(0.0, 1.0, 2 * np.pi), (0.9, 0.99, 0.3), (0.5, 0.5, 1.0)])
def test_lru_starts_on_its_ring(r_min, r_max, max_phase, key, x64):
    lru = nn.LRU(2, 4000, r_min=r_min, r_max=r_max, max_phase=max_phase, key=key)
    B, C = np.asarray(lru.B), np.asarray(lru.C)
    radius, phase = np.exp(-np.exp(lru.nu_log)), np.exp(lru.theta_log)
    assert np.all((radius > r_min - 1e-12) & (radius < r_max + 1e-12))
    assert np.all((phase > 0) & (phase <= max_phase))
    assert abs(np.mean(radius**2) - (r_min**2 + r_max**2) / 2) < 0.02
    assert abs(np.mean(phase) / max_phase - 0.5) < 0.02
    np.testing.assert_allclose(np.exp(lru.gamma_log), np.sqrt(1 - radius**2), rtol=1e-6)
    assert abs(np.std(B) * 2 - 1) < 0.05 and abs(np.std(C) * 4000**0.5 - 1) < 0.05


def test_lru_starts_finite_at_the_ends_of_the_ring(key):
    """|lambda|^2 drawn at exactly 0 or 1 would be an infinite parameter."""
    for r in (1.0, 1e-30):
        lru = nn.LRU(2, 3, r_min=r, r_max=r, key=key)
        assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(eqx.filter(lru, eqx.is_array)))


@pytest.mark.smoke
def test_rg_lru_is_its_recurrence(key, x64):
    layer = drawn(lambda key: nn.RGLRU(3, c=5.0, key=key), key)
    x = np.random.default_rng(0).standard_normal((6, 3))
    r, i = (sigmoid(dense(p, x)) for p in (layer.a_proj, layer.x_proj))
    a = sigmoid(np.asarray(layer.Lambda)) ** (5 * r)
    h, expected = np.zeros(3), []
    for t in range(6):
        h = a[t] * h + np.sqrt(1 - a[t] ** 2) * i[t] * x[t]
        expected.append(h)
    np.testing.assert_allclose(quick_jit(layer)(x), expected, atol=1e-13)


@pytest.mark.slow
def test_rg_lru_starts_slow(key, x64):
    a = sigmoid(np.asarray(quick_jit(lambda key: nn.RGLRU(4000, key=key).Lambda)(key))) ** 8
    assert 0.9 <= a.min() < 0.901 and 0.998 < a.max() <= 0.999


def test_rg_lru_with_a_closed_gate_has_a_gradient(key):
    layer = drawn(lambda key: nn.RGLRU(2, key=key), key)
    layer = eqx.tree_at(lambda l: l.a_proj.bias, layer, on_device(np.full(2, -200), np.float32))
    gradient = quick_jit(eqx.filter_grad(lambda layer, x: jnp.sum(layer(x))))(layer, np.ones((3, 2), np.float32))
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(gradient))


def test_errors(key):
    with pytest.raises(ValueError, match="r_min"):
        nn.LRU(2, 3, r_min=0.9, r_max=0.5, key=key)
    with pytest.raises(ValueError, match="state_size"):
        nn.LRU(2, 0, key=key)
    with pytest.raises(ValueError, match="must be positive"):
        nn.RGLRU(2, c=0.0, key=key)
