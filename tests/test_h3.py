"""H3 beyond the law: the formula of its heads, the short memory, what it refuses."""

import equinox as eqx
import numpy as np
import pytest
from helpers import dense, drawn, on_device, quick_jit

from s5eqx import nn


def test_heads(key, x64):
    """Every sum as it is written, in the order (head, channel)."""
    L, D, d = 7, 6, 3
    layer = drawn(lambda key: nn.h3(D, 4, head_dim=d, key=key), key)
    x = np.random.default_rng(0).standard_normal((L, D))
    y, long = quick_jit(lambda x: (layer(x), layer.ssm.kernel(L)[0]))(x)
    q, k, v = (dense(p, x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    B, C, skip, long = map(np.asarray, (layer.shift.B, layer.shift.C, layer.ssm.D, long))
    short = np.zeros((L, D))
    short[:4] = [np.sum(B[:, : 4 - l] * C[:, l:], axis=1) for l in range(4)]
    convolve = lambda kernel, u: np.array([np.sum(kernel[: t + 1] * u[t::-1]) for t in range(L)])
    k = np.stack([convolve(short[:, c], k[:, c]) for c in range(D)], axis=1) + np.asarray(layer.shift.D) * k
    o = np.zeros((L, D))
    for h in range(D // d):
        for j in range(d):
            for i in range(d):
                kv = k[:, h * d + i] * v[:, h * d + j]
                kv = convolve(long[:, h], kv) + skip[0, h] * kv
                o[:, h * d + j] += q[:, h * d + i] * kv
    np.testing.assert_allclose(y, dense(layer.output_linear, o), atol=1e-12)


def test_shift_starts_as_the_last_inputs(key, x64):
    x = np.random.default_rng(0).standard_normal((5, 2))

    @quick_jit
    def run(key, x):
        shift = nn.ShiftSSM(2, 3, key=key)
        return shift, *shift.prefill(shift.init_state(), x)

    shift, state, y = run(key, x)
    C, state = np.asarray(shift.C), np.asarray(state)
    np.testing.assert_allclose(state, x[:1:-1].T, atol=1e-15)
    np.testing.assert_allclose(np.asarray(y)[-1], np.sum(C * state, axis=1) + np.asarray(shift.D) * x[-1], atol=1e-14)
    assert np.all(np.abs(C) <= 3**-0.5)


@pytest.mark.smoke
def test_shift_forgets(key, x64):
    """What it held before a chunk of at least its own size leaves no trace."""
    shift = drawn(lambda key: nn.ShiftSSM(2, 3, key=key), key)
    x, run = np.random.default_rng(0).standard_normal((4, 2)), quick_jit(shift.prefill)
    fresh, used = ([np.asarray(z) for z in run(np.full((2, 3), held), x)] for held in (0.0, 1e3))
    np.testing.assert_array_equal(used[0], fresh[0])
    np.testing.assert_allclose(used[1][2:], fresh[1][2:], atol=1e-12)
    assert np.all(used[1][:2] != fresh[1][:2])


@pytest.mark.parametrize("head_dim", [0, 4])
def test_width_is_a_multiple_of_head_dim(head_dim, key):
    with pytest.raises(ValueError, match="multiple of head_dim"):
        nn.h3(6, 4, head_dim=head_dim, key=key)


def test_parts_must_fit(key):
    part = lambda layer, *sizes: drawn(lambda key: layer(*sizes, key=key), key)
    build = lambda *parts, **options: eqx.filter_eval_shape(nn.H3, 6, *parts, **options, key=key)
    shift, ssm = part(nn.ShiftSSM, 6, 3), part(nn.DiagonalSSM, 6, 4)
    with pytest.raises(ValueError, match="ssm must map width 3"):
        build(shift, ssm, head_dim=2)
    with pytest.raises(ValueError, match="shift must map width 6"):
        build(part(nn.ShiftSSM, 3, 3), ssm)
    with pytest.raises(ValueError, match=r"keep their channels apart.* a S5 mixes them"):
        build(shift, part(nn.S5, 3, 4), head_dim=2)
    with pytest.raises(ValueError, match="ssm must be causal"):
        build(shift, part(nn.BidirectionalS4D, 6, 4))


def test_h3_conv_takes_no_reset(key):
    layer = drawn(lambda key: nn.h3_conv(4, 8, kernel_dropout=0.0, key=key), key)
    with pytest.raises(ValueError, match="takes no `reset`"):
        eqx.filter_eval_shape(layer, on_device(np.ones((3, 4)), np.float32), reset=on_device(np.zeros(3), bool))
