"""S4D beyond the law: where it starts, long sequences, what is held in memory, both directions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, relative_error, slow, to_complex
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
    @quick_jit
    def eigenvalues(key):
        ssm = nn.DiagonalSSM(2, 8, num_ssm=2, A_init=init, real_part=nn.SoftplusReal(), key=key)
        return -ssm.real_part(ssm.A_real), ssm.A_imag

    A_real, A_imag = eigenvalues(key)
    np.testing.assert_allclose(A_real, np.broadcast_to(real, (2, 4)), rtol=1e-12)
    np.testing.assert_allclose(A_imag, np.broadcast_to(imag, (2, 4)), rtol=2e-6)


def test_random_eigenvalues_differ_by_system(key):
    decay, frequency = nn.RandomInit()(3, 2000, dtype=jnp.float32, key=key)
    decay, frequency = np.asarray(decay), np.asarray(frequency)
    assert np.all(decay == 0.5)
    assert abs(np.std(frequency) - 1) < 0.05
    assert not np.any(frequency[0] == frequency[1])


def test_a_decay_of_zero_is_kept_off_the_axis(key, x64):
    class OnTheAxis(nn.AbstractAInit):
        def __call__(self, num_ssm, state_size, *, dtype, key):
            return jnp.zeros((num_ssm, state_size // 2)), jnp.ones((num_ssm, state_size // 2))

    A_real = quick_jit(lambda key: nn.DiagonalSSM(2, 4, A_init=OnTheAxis(), key=key).A_real)(key)
    np.testing.assert_allclose(np.exp(A_real), 1e-4)


def test_initial_B(key, x64):
    """Drawn to unit size, and a part of C where it is not trained."""
    options = {"num_ssm": 1, "A_init": nn.InvInit(), "B_init": nn.NormalBInit()}

    @quick_jit
    def run(key):
        ssms = [nn.DiagonalSSM(3, 8, train_B=train, **options, key=key) for train in (True, False)]
        return ssms, [ssm.kernel(5) for ssm in ssms]

    (trained, folded), kernels = run(key)
    A = -np.exp(trained.A_real) + 1j * np.asarray(trained.A_imag)
    np.testing.assert_allclose(2 * np.sum(np.abs(to_complex(trained.B) / A) ** 2), 1)
    assert folded.B is None
    np.testing.assert_allclose(*kernels, atol=1e-14)


@pytest.mark.parametrize("length", [slow(1), slow(2), 13, 2048])
def test_kernel_keeps_its_phase_in_float32(length, key):
    """The eigenvalues are those of float32; their powers are as exact as rounding allows."""
    ssm = quick_jit(lambda key: nn.DiagonalSSM(2, 64, dt_min=1e-4, key=key))(key)
    dA, dB, C = (np.asarray(z, np.complex128) for z in quick_jit(ssm.discretised)())
    powers = dA ** np.arange(length)[:, None, None]
    expected = 2 * np.einsum("cdp,ldp->cld", C * dB, powers).real
    assert relative_error(kernel(ssm, length), expected) < 3e-7


@quick_jit
def whole_and_in_steps(key, state, x, reset):
    ssm = nn.DiagonalSSM(2, 4, channels=2, train_B=True, bandlimit=0.1, key=key)
    each = jnp.zeros(len(x), bool) if reset is None else reset
    return ssm.prefill(state, x, reset=reset), lax.scan(lambda s, t: ssm.step(s, t[0], reset=t[1]), state, (x, each))


@pytest.mark.parametrize("flags", [None, [0, 63, 64, 100], [65, 128]])
def test_long_sequences(flags, key, x64):
    """Longer than what is scanned at once; 137 is prime."""
    rng, L = np.random.default_rng(0), 137
    state, x = to_complex(rng.standard_normal((2, 2, 2))), rng.standard_normal((L, 2))
    reset = None if flags is None else np.isin(np.arange(L), flags)
    (last, y), expected = whole_and_in_steps(key, state, x, reset)
    assert relative_error(y, expected[1]) < 1e-12
    assert relative_error(last, expected[0]) < 1e-12


def test_no_gradient_crosses_a_reset_between_chunks(key):
    @quick_jit
    def gradient(key):
        ssm, reset = nn.DiagonalSSM(2, 4, key=key), jnp.arange(150) == 70
        loss = lambda state, x: jnp.sum(ssm.prefill(state, x, reset=reset)[1][70:])
        return jax.grad(loss, (0, 1))(ssm.init_state() + 1, jnp.ones((150, 2)))

    to_state, to_x = map(np.asarray, gradient(key))
    assert np.all(to_state == 0) and np.all(to_x[:70] == 0) and np.all(to_x[70:] != 0)


@pytest.mark.parametrize("resets", [False, True])
def test_states_are_not_held_over_the_length(resets, key):
    """No array of the forward or the backward pass is as large as the states of all steps."""
    L, D, P = 1024, 4, 32

    def gradients(key):
        def loss(ssm, state, x):
            last, y = ssm.prefill(state, x, reset=jnp.zeros(L, bool) if resets else None)
            return jnp.sum(y) + jnp.sum(jnp.abs(last))

        ssm = nn.DiagonalSSM(D, 2 * P, key=key)
        return jax.grad(loss, (0, 1, 2))(ssm, ssm.init_state(), jnp.ones((L, D)))

    jaxpr = jax.make_jaxpr(gradients)(key)
    assert max(_sizes(jaxpr.jaxpr)) <= L * D * P / 4


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)  # a closed one holds an open one
            yield from _sizes(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.smoke
def test_bandlimit_drops_fast_states(key, x64):
    @quick_jit
    def run(key):
        ssm, limited = (nn.DiagonalSSM(3, 16, dt_min=0.05, bandlimit=limit, key=key) for limit in (None, 0.2))
        cycles = jnp.exp(ssm.log_Delta)[:, None] * ssm.A_imag / (2 * jnp.pi)
        slow = cycles < 0.1
        by_hand = eqx.tree_at(lambda s: s.C, ssm, jnp.where(slow[None, :, :, None], ssm.C, 0.0))
        return slow, limited.kernel(9), by_hand.kernel(9)

    slow, limited, by_hand = map(np.asarray, run(key))
    assert 0 < np.sum(slow) < slow.size
    np.testing.assert_allclose(limited, by_hand, atol=1e-14)


@pytest.mark.parametrize("glu", [slow(False), True])
def test_bidirectional(glu, key, x64):
    """Both sums as they are written, for two sequences in one."""
    L, cut = 11, 4
    build = lambda key: nn.BidirectionalS4D(3, 4, channels=2, glu=glu, activation=eqx.nn.Identity(), key=key)
    layer = drawn(build, key)
    ssm, x = layer.forward.ssm, np.random.default_rng(0).standard_normal((L, 3))

    @quick_jit
    def run(x, reset):
        kernels = ssm.kernel(L), eqx.tree_at(lambda s: s.C, ssm, layer.C_backward).kernel(L)
        return kernels, layer(x), layer(x, reset=reset)

    kernels, whole, split = run(x, np.arange(L) == cut)
    past, future, D = map(np.asarray, (*kernels, ssm.D))
    for t0, t1, got in ((0, L, whole), (cut, L, split), (0, cut, split)):
        y = np.zeros((L, 2, 3))
        for t in range(t0, t1):
            y[t] = D * x[t] + sum(past[:, j] * x[t - j] for j in range(t - t0 + 1))
            y[t] += sum(future[:, j] * x[t + 1 + j] for j in range(t1 - t - 1))
        expected = quick_jit(layer.forward.read_out)(y.reshape(L, 6))
        np.testing.assert_allclose(np.asarray(got)[t0:t1], np.asarray(expected)[t0:t1], atol=1e-12)


def test_bidirectional_gradients_do_not_cross_a_reset(key):
    layer = drawn(lambda key: nn.BidirectionalS4D(2, 4, key=key), key)
    x = on_device(np.random.default_rng(0).standard_normal((9, 2)), np.float32)
    to_x = np.asarray(quick_jit(jax.grad(lambda x: jnp.sum(layer(x, reset=jnp.arange(9) == 4)[4:])))(x))
    assert np.all(to_x[:4] == 0) and np.all(to_x[4:] != 0)


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
        eqx.filter_eval_shape(lambda key: nn.S4D(6, **{"state_size": 8, **options}, key=key), key)
