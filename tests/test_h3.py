"""H3 beyond the law: the formula of its heads, the short memory, what it refuses."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_jit

from s5eqx import nn


def test_heads(key, x64):
    """Every sum as it is written, in the order (head, channel)."""
    L, D, d = 7, 6, 3
    layer = nn.h3(D, 4, head_dim=d, key=key)
    layer = eqx.tree_at(lambda l: l.shift.B, layer, jr.normal(key, (D, 4)))
    x = jr.normal(key, (L, D))
    q, k, v = (np.asarray(nn.linear(p, x)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    short = np.zeros((L, D))
    short[:4] = [np.sum(layer.shift.B[:, : 4 - l] * layer.shift.C[:, l:], axis=1) for l in range(4)]
    long = np.asarray(quick_jit(layer.ssm.kernel)(L)[0])
    convolve = lambda kernel, u: np.array([np.sum(kernel[: t + 1] * u[t::-1]) for t in range(L)])
    k = np.stack([convolve(short[:, c], k[:, c]) for c in range(D)], axis=1) + np.asarray(layer.shift.D) * k
    o = np.zeros((L, D))
    for h in range(D // d):
        for j in range(d):
            for i in range(d):
                kv = k[:, h * d + i] * v[:, h * d + j]
                kv = convolve(long[:, h], kv) + float(layer.ssm.D[0, h]) * kv
                o[:, h * d + j] += q[:, h * d + i] * kv
    np.testing.assert_allclose(quick_jit(layer)(x), nn.linear(layer.output_linear, jnp.asarray(o)), atol=1e-12)


def test_shift_starts_as_the_last_inputs(key, x64):
    shift = nn.ShiftSSM(2, 3, key=key)
    x = jr.normal(key, (5, 2))
    state, y = quick_jit(shift.prefill)(shift.init_state(), x)
    np.testing.assert_allclose(state, x[:1:-1].T, atol=1e-15)
    np.testing.assert_allclose(y[-1], jnp.sum(shift.C * state, axis=1) + shift.D * x[-1], atol=1e-14)
    assert jnp.all(jnp.abs(shift.C) <= 3**-0.5)


@pytest.mark.smoke
def test_shift_forgets(key, x64):
    """What it held before a chunk of at least its own size leaves no trace."""
    shift = nn.ShiftSSM(2, 3, key=key)
    x = jr.normal(key, (4, 2))
    fresh, used = (quick_jit(shift.prefill)(jnp.full((2, 3), held), x) for held in (0.0, 1e3))
    np.testing.assert_array_equal(used[0], fresh[0])
    np.testing.assert_allclose(used[1][2:], fresh[1][2:], atol=1e-12)
    assert jnp.all(used[1][:2] != fresh[1][:2])


@pytest.mark.parametrize("head_dim", [0, 4])
def test_width_is_a_multiple_of_head_dim(head_dim, key):
    with pytest.raises(ValueError, match="multiple of head_dim"):
        nn.h3(6, 4, head_dim=head_dim, key=key)


def test_parts_must_fit(key):
    shift, ssm = nn.ShiftSSM(6, 3, key=key), nn.DiagonalSSM(6, 4, key=key)
    with pytest.raises(ValueError, match="ssm must map width 3"):
        nn.H3(6, shift, ssm, head_dim=2, key=key)
    with pytest.raises(ValueError, match="shift must map width 6"):
        nn.H3(6, nn.ShiftSSM(3, 3, key=key), ssm, key=key)
    with pytest.raises(ValueError, match=r"keep their channels apart.* a S5 mixes them"):
        nn.H3(6, shift, nn.S5(3, 4, key=key), head_dim=2, key=key)
    with pytest.raises(ValueError, match="ssm must be causal"):
        nn.H3(6, shift, nn.BidirectionalS4D(6, 4, key=key), key=key)


def test_h3_conv_takes_no_reset(key):
    layer = nn.h3_conv(4, 8, kernel_dropout=0.0, key=key)
    with pytest.raises(ValueError, match="takes no `reset`"):
        layer(jnp.ones((3, 4)), reset=jnp.zeros(3, bool))
