"""S4D beyond the law: where it starts, long sequences, what is held in memory, both directions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_jit, relative_error, slow, to_complex
from jax import lax

from s5eqx import nn

kernel = quick_jit(lambda ssm, length: ssm.kernel(length))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "init, real, imag",
    [
        (nn.LinInit(), [-0.5] * 4, np.pi * np.arange(4)),
        (nn.InvInit(), [-0.5] * 4, [17.825353, 4.2441318, 1.5278875, 0.3637827]),
        (nn.Inv2Init(), [-0.5] * 4, [17.825353, 7.6394373, 4.2441318, 2.5464790]),
        (nn.QuadInit(), [-0.5] * 4, [0.3183099, 2.8647890, 7.9577472, 15.597185]),
        (nn.LegSInit(), [-0.5] * 4, [-19.857410, -5.3542085, -1.9577941, -0.4274887]),
        (nn.RealInit(), [-1, -2, -3, -4], np.zeros(4)),
    ],
)
def test_initial_eigenvalues(init, real, imag, key, x64):
    ssm = nn.DiagonalSSM(2, 8, num_ssm=2, A_init=init, real_part=nn.SoftplusReal(), key=key)
    np.testing.assert_allclose(-ssm.real_part(ssm.A_real), np.broadcast_to(real, (2, 4)), rtol=1e-12)
    np.testing.assert_allclose(ssm.A_imag, np.broadcast_to(imag, (2, 4)), rtol=2e-6)


def test_random_eigenvalues_differ_by_system(key):
    decay, frequency = nn.RandomInit()(3, 2000, dtype=jnp.float32, key=key)
    assert jnp.all(decay == 0.5)
    assert abs(jnp.std(frequency) - 1) < 0.05
    assert not jnp.any(frequency[0] == frequency[1])


def test_a_decay_of_zero_is_kept_off_the_axis(key, x64):
    class OnTheAxis(nn.AbstractAInit):
        def __call__(self, num_ssm, state_size, *, dtype, key):
            return jnp.zeros((num_ssm, state_size // 2)), jnp.ones((num_ssm, state_size // 2))

    ssm = nn.DiagonalSSM(2, 4, A_init=OnTheAxis(), key=key)
    np.testing.assert_allclose(jnp.exp(ssm.A_real), 1e-4)


def test_initial_B(key, x64):
    """Drawn to unit size, and a part of C where it is not trained."""
    options = {"num_ssm": 1, "A_init": nn.InvInit(), "B_init": nn.NormalBInit(), "key": key}
    trained = nn.DiagonalSSM(3, 8, train_B=True, **options)
    A = -np.exp(trained.A_real) + 1j * np.asarray(trained.A_imag)
    np.testing.assert_allclose(2 * np.sum(np.abs(to_complex(trained.B) / A) ** 2), 1)
    folded = nn.DiagonalSSM(3, 8, **options)
    assert folded.B is None
    np.testing.assert_allclose(kernel(folded, 5), kernel(trained, 5), atol=1e-14)


@pytest.mark.parametrize("length", [slow(1), slow(2), 13, 2048])
def test_kernel_keeps_its_phase_in_float32(length, key):
    """The eigenvalues are those of float32; their powers are as exact as rounding allows."""
    ssm = quick_jit(lambda key: nn.DiagonalSSM(2, 64, dt_min=1e-4, key=key))(key)
    dA, dB, C = (np.asarray(z, np.complex128) for z in quick_jit(ssm.discretised)())
    powers = dA ** np.arange(length)[:, None, None]
    expected = 2 * np.einsum("cdp,ldp->cld", C * dB, powers).real
    assert relative_error(kernel(ssm, length), expected) < 3e-7


@pytest.mark.parametrize("flags", [None, [0, 63, 64, 100], [65, 128]])
def test_long_sequences(flags, key, x64):
    """Longer than what is scanned at once; 137 is prime."""
    L = 137
    ssm = nn.DiagonalSSM(2, 4, channels=2, train_B=True, bandlimit=0.1, key=key)
    state = lax.complex(*jr.normal(key, (2, 2, 2)))
    x = jr.normal(key, (L, 2))
    reset = None if flags is None else jnp.zeros(L, bool).at[jnp.array(flags)].set(True)
    last, y = quick_jit(ssm.prefill)(state, x, reset=reset)
    each = jnp.zeros(L, bool) if reset is None else reset
    expected = quick_jit(lambda: lax.scan(lambda s, t: ssm.step(s, t[0], reset=t[1]), state, (x, each)))()
    assert relative_error(y, expected[1]) < 1e-12
    assert relative_error(last, expected[0]) < 1e-12


def test_no_gradient_crosses_a_reset_between_chunks(key):
    ssm = nn.DiagonalSSM(2, 4, key=key)
    reset = jnp.zeros(150, bool).at[70].set(True)

    @quick_jit
    def gradient(state, x):
        return jax.grad(lambda state, x: jnp.sum(ssm.prefill(state, x, reset=reset)[1][70:]), (0, 1))(state, x)

    to_state, to_x = gradient(ssm.init_state() + 1, jnp.ones((150, 2)))
    assert jnp.all(to_state == 0) and jnp.all(to_x[:70] == 0) and jnp.all(to_x[70:] != 0)


@pytest.mark.parametrize("resets", [False, True])
def test_states_are_not_held_over_the_length(resets, key):
    """No array of the forward or the backward pass is as large as the states of all steps."""
    L, D, P = 1024, 4, 32
    ssm = nn.DiagonalSSM(D, 2 * P, key=key)
    reset = jnp.zeros(L, bool) if resets else None

    def loss(ssm, state, x):
        last, y = ssm.prefill(state, x, reset=reset)
        return jnp.sum(y) + jnp.sum(jnp.abs(last))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(ssm, ssm.init_state(), jnp.ones((L, D)))
    assert max(_sizes(jaxpr.jaxpr)) <= L * D * P / 4


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)  # a closed one holds an open one
            yield from _sizes(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.smoke
def test_bandlimit_drops_fast_states(key, x64):
    ssm, limited = (nn.DiagonalSSM(3, 16, dt_min=0.05, bandlimit=limit, key=key) for limit in (None, 0.2))
    cycles = jnp.exp(ssm.log_Delta)[:, None] * ssm.A_imag / (2 * jnp.pi)
    slow = cycles < 0.1
    assert 0 < jnp.sum(slow) < slow.size
    by_hand = eqx.tree_at(lambda s: s.C, ssm, jnp.where(slow[None, :, :, None], ssm.C, 0.0))
    np.testing.assert_allclose(kernel(limited, 9), kernel(by_hand, 9), atol=1e-14)


@pytest.mark.parametrize("glu", [slow(False), True])
def test_bidirectional(glu, key, x64):
    """Both sums as they are written, for two sequences in one."""
    L, cut = 11, 4
    layer = nn.BidirectionalS4D(3, 4, channels=2, glu=glu, activation=eqx.nn.Identity(), key=key)
    ssm = layer.forward.ssm
    past = np.asarray(kernel(ssm, L))
    future = np.asarray(kernel(eqx.tree_at(lambda s: s.C, ssm, layer.C_backward), L))
    D, x = np.asarray(ssm.D), np.asarray(jr.normal(key, (L, 3)))
    for t0, t1, reset in ((0, L, None), (cut, L, cut), (0, cut, cut)):
        y = np.zeros((L, 2, 3))
        for t in range(t0, t1):
            y[t] = D * x[t] + sum(past[:, j] * x[t - j] for j in range(t - t0 + 1))
            y[t] += sum(future[:, j] * x[t + 1 + j] for j in range(t1 - t - 1))
        expected = quick_jit(layer.forward.read_out)(jnp.asarray(y.reshape(L, 6)))[t0:t1]
        flags = None if reset is None else jnp.arange(L) == reset
        np.testing.assert_allclose(quick_jit(layer)(x, reset=flags)[t0:t1], expected, atol=1e-12)


def test_bidirectional_gradients_do_not_cross_a_reset(key):
    layer = nn.BidirectionalS4D(2, 4, key=key)
    flags = jnp.arange(9) == 4
    to_x = quick_jit(jax.grad(lambda x: jnp.sum(layer(x, reset=flags)[4:])))(jr.normal(key, (9, 2)))
    assert jnp.all(to_x[:4] == 0) and jnp.all(to_x[4:] != 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state_size": 7}, "even"),
        ({"num_ssm": 4}, "divisor"),
        ({"channels": 0}, "positive"),
        ({"dt_min": 0.2}, "dt_min"),
        ({"bandlimit": 0.0}, "bandlimit"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_errors(options, message, key):
    with pytest.raises(ValueError, match=message):
        nn.S4D(6, **{"state_size": 8, **options}, key=key)
