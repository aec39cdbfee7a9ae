"""S5: its eigenvalues, its discretisations, its layer against a loop in NumPy."""

import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import drawn, quick_jit, slow

from s5eqx import nn

D, L = 3, 11


def s5(key, **options):
    return nn.S5(D, 8, num_blocks=2, key=key, **options)


def complex_of(pairs):
    return np.asarray(pairs[..., 0]) + 1j * np.asarray(pairs[..., 1])


def naive(layer, C, u, intervals=None, reset=None, reverse=False):
    """The layer as it is written in the paper, less its skip: one step after the other.

    Step t has the interval between its sample and the one that was visited before it; the first that is visited, that
    of the earliest sample of its sequence.
    """
    Lambda = np.minimum(layer.Lambda_re, -1e-4 if layer.clip_eigs else np.inf) + 1j * np.asarray(layer.Lambda_im)
    B, C = complex_of(layer.B), complex_of(C)
    intervals = np.ones(len(u)) if intervals is None else intervals
    reset = np.zeros(len(u), bool) if reset is None else reset
    times = range(len(u))[:: -1 if reverse else 1]
    x, y = np.zeros(len(Lambda), complex), np.zeros(np.shape(u))
    for t in times:
        later = t + 1 if reverse else t  # of the sample and the one before it
        begins = later in (0, len(u)) or reset[later]
        first = max(s for s in range(t + 1) if s == 0 or reset[s])
        z = Lambda * layer.step_rescale * np.exp(layer.log_Delta) * intervals[first if begins else later]
        if isinstance(layer.discretisation, nn.ZOH):
            Lambda_bar, gain = np.exp(z), (np.exp(z) - 1) / Lambda
        else:
            Lambda_bar, gain = (1 + z / 2) / (1 - z / 2), z / Lambda / (1 - z / 2)
        x = Lambda_bar * (0 if begins else x) + gain * (B @ u[t])
        y[t] = (2 if layer.conj_sym else 1) * (C @ x).real
    return y


def test_hippo_is_the_normal_part_of_legs():
    """HiPPO-LegS, in coordinates of unit norm, is this matrix less one of rank 1."""
    n = np.arange(6)
    legs = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)
    S, p = nn.hippo_legs_normal(6), np.sqrt(n + 0.5)
    np.testing.assert_allclose(S - np.outer(p, p), legs, atol=1e-14)
    np.testing.assert_allclose(S @ S.T, S.T @ S, atol=1e-13)


@pytest.mark.smoke
@pytest.mark.parametrize("conj_sym", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_diagonalise(num_blocks, conj_sym):
    Lambda, V, Vinv = nn.diagonalise(12, num_blocks, conj_sym=conj_sym)
    S = np.kron(np.eye(num_blocks), nn.hippo_legs_normal(12 // num_blocks))
    kept = 6 if conj_sym else 12
    assert Lambda.shape == (kept,) and V.shape == (12, kept)
    np.testing.assert_allclose(S @ V, V * Lambda, atol=1e-13)
    np.testing.assert_allclose(Vinv @ V, np.eye(kept), atol=1e-13)
    np.testing.assert_array_equal(Lambda.real, -0.5)
    frequencies = Lambda.imag.reshape(num_blocks, -1)
    assert np.all(np.diff(frequencies) > 0)
    if conj_sym:  # with the half that was dropped, it is the whole matrix again
        assert np.all(frequencies < 0)
        np.testing.assert_allclose(2 * ((V * Lambda) @ Vinv).real, S, atol=1e-13)


@pytest.mark.smoke
@pytest.mark.parametrize("discretisation", [nn.ZOH(), nn.Bilinear()])
@pytest.mark.parametrize("conj_sym", [True, False])
def test_layer_equals_the_loop(discretisation, conj_sym, key, x64):
    layer = s5(key, discretisation=discretisation, conj_sym=conj_sym, step_rescale=1.7)
    layer = eqx.tree_at(lambda s: s.Lambda_re, layer, layer.Lambda_re.at[0].set(0.3))  # clipped
    rng = np.random.default_rng(0)
    u, intervals, reset = rng.standard_normal((L, D)), rng.uniform(0.1, 4, L), rng.random(L) < 0.2
    for options in ({}, {"intervals": intervals}, {"intervals": intervals, "reset": reset}):
        y = quick_jit(layer)(jnp.asarray(u), **jax.tree.map(jnp.asarray, options))
        expected = naive(layer, layer.C, u, **options) + np.asarray(layer.D) * u
        np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize("cls", [nn.S5, nn.BidirectionalS5])
def test_constant_intervals_rescale_the_time_step(cls, key, x64):
    u = jnp.asarray(np.random.default_rng(0).standard_normal((L, D)))
    layer, slower = (cls(D, 8, step_rescale=rescale, key=key) for rescale in (1.0, 2.5))
    call = quick_jit(lambda layer, **options: layer(u, **options))
    np.testing.assert_allclose(call(layer, intervals=jnp.ones(L)), call(layer), atol=1e-13)
    np.testing.assert_allclose(call(layer, intervals=jnp.full(L, 2.5)), call(slower), atol=1e-13)


@pytest.mark.parametrize("discretisation", [nn.ZOH(), nn.Bilinear()])
def test_discretisation_at_small_eigenvalues(discretisation, x64):
    """Value, gradient and curvature against the Taylor series in Lambda; down to and at Lambda = 0."""
    Delta = 0.3
    # d^k gain / dLambda^k at 0, with gain = Delta phi(Lambda Delta)
    derivatives = (1, 1 / 2, 1 / 3) if isinstance(discretisation, nn.ZOH) else (1, 1 / 2, 1 / 2)
    gain = lambda r: discretisation(jax.lax.complex(r, 0.0 * r)[None], jnp.full(1, Delta))[1][0].real
    taylor = quick_jit(lambda r: [gain(r), jax.grad(gain)(r), jax.grad(jax.grad(gain))(r)])
    for r in (0.0, -1e-300, -1e-12):
        expected = [d * Delta ** (k + 1) for k, d in enumerate(derivatives)]
        np.testing.assert_allclose(taylor(jnp.asarray(r)), expected, rtol=1e-11)


def test_zoh_is_accurate_on_both_sides_of_its_switch():
    """In float32, against the quotient in extended precision; gradients too."""
    angle = np.exp(1j * np.linspace(np.pi / 2, np.pi, 5))
    Lambda = (np.geomspace(1e-6, 3, 60)[:, None] * angle).ravel().astype(np.complex64)
    gain = lambda z: nn.ZOH()(z, jnp.ones(z.shape))[1]
    exact = Lambda.astype(np.clongdouble)
    value = (np.expm1(exact.real) * np.exp(1j * exact.imag) + np.expm1(1j * exact.imag)) / exact
    slope = (np.exp(exact) - value) / exact
    np.testing.assert_allclose(gain(Lambda), value.astype(complex), rtol=5e-7)
    np.testing.assert_allclose(
        jnp.diagonal(jax.jacfwd(gain, holomorphic=True)(jnp.asarray(Lambda))), slope.astype(complex), rtol=5e-6
    )


@pytest.mark.parametrize("discretisation", [nn.ZOH(), nn.Bilinear()])
def test_clipped_systems_are_stable(discretisation, key):
    layer = s5(key, discretisation=discretisation)
    layer = eqx.tree_at(lambda s: s.Lambda_re, layer, jnp.asarray([0.5, 0.0, -1e-5, -40.0]))
    Lambda_bar = quick_jit(lambda layer: layer.discretised()[0])
    assert np.all(np.abs(Lambda_bar(layer)) < 1)
    gradient = quick_jit(eqx.filter_grad(lambda s: jnp.sum(jnp.abs(s.discretised()[0]))))(layer)
    np.testing.assert_array_equal(gradient.Lambda_re[:3], 0)
    assert gradient.Lambda_re[3] != 0
    unclipped = eqx.tree_at(lambda s: s.Lambda_re, s5(key, clip_eigs=False), layer.Lambda_re)
    assert np.abs(Lambda_bar(unclipped))[0] > 1


@pytest.mark.parametrize("C_init", [*map(slow, (nn.TruncatedNormal(), nn.LecunNormal())), nn.ComplexNormal()])
def test_every_leaf_is_real_and_the_effective_C_learns(C_init, key):
    """With C as complex pairs, as in the reference, the two updates cancel and C never moves."""
    layer = s5(key, C_init=C_init)
    assert all(jnp.isrealobj(a) for a in jax.tree.leaves(eqx.filter(layer, eqx.is_array)))
    u, target = np.random.default_rng(0).standard_normal((2, L, D)).astype(np.float32)
    optimiser = optax.adamw(1e-2, weight_decay=0.0)
    C = lambda s: s.discretised()[2]

    @eqx.filter_jit
    def train(layer, state):
        loss, gradient = eqx.filter_value_and_grad(lambda s: jnp.mean((s(jnp.asarray(u)) - target) ** 2))(layer)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in integers
            updates, state = optimiser.update(gradient, state, layer)
        return eqx.apply_updates(layer, updates), state, loss

    start, state = layer, optimiser.init(layer)
    for _ in range(20):
        layer, state, loss = train(layer, state)
    assert jnp.min(jnp.abs(C(layer) - C(start))) > 0.02
    assert loss < 0.9 * train(start, optimiser.init(start))[2]


def test_dt_bounds_and_dtype(key, x64):
    layer = nn.S5(4, 2000, dt_min=0.01, dt_max=0.5, num_blocks=1000, dtype=jnp.float32, key=key)
    Delta = np.exp(layer.log_Delta)
    assert Delta.min() >= 0.01 * (1 - 1e-6) and Delta.max() <= 0.5 * (1 + 1e-6)
    np.testing.assert_allclose(np.mean(np.log(Delta)), np.log(0.01 * 0.5) / 2, atol=0.1)
    assert {a.dtype for a in jax.tree.leaves(eqx.filter(layer, eqx.is_array))} == {jnp.dtype(jnp.float32)}
    assert layer.init_state().dtype == jnp.complex64
    assert s5(key).init_state().dtype == jnp.complex128


@pytest.mark.parametrize("activation", [slow(eqx.nn.Identity()), nn.Gelu()])
def test_bidirectional_equals_the_loop(activation, key, x64):
    layer = drawn(lambda key: nn.BidirectionalS5(D, 8, num_blocks=2, activation=activation, key=key), key)
    assert not isinstance(layer, nn.AbstractCausalMixer)
    u = np.random.default_rng(0).standard_normal((L, D))
    reset = np.zeros(L, bool)
    reset[[0, 4, 5]] = True
    intervals = np.random.default_rng(1).uniform(0.1, 4, L)
    for options in ({}, {"reset": reset}, {"intervals": intervals}, {"intervals": intervals, "reset": reset}):
        y = naive(layer.forward, layer.forward.C, u, **options) + np.asarray(layer.forward.D) * u
        y = y + naive(layer.forward, layer.C_backward, u, **options, reverse=True)
        got = quick_jit(layer)(jnp.asarray(u), **jax.tree.map(jnp.asarray, options))
        np.testing.assert_allclose(got, activation(jnp.asarray(y)), atol=1e-12)
    empty = quick_jit(layer)(jnp.zeros((0, D)), intervals=jnp.zeros(0), reset=jnp.zeros(0, bool))
    assert empty.shape == (0, D)


@pytest.mark.smoke
@pytest.mark.parametrize("irregular", [slow(False), True])
def test_bidirectional_packs_sequences(irregular, key, x64):
    """Each is as it is alone, in value and gradient, and knows nothing of the others."""
    layer = nn.BidirectionalS5(D, 8, key=key)
    rng = np.random.default_rng(0)
    u, weights = jnp.asarray(rng.standard_normal((2, L, D)))
    intervals = jnp.asarray(rng.uniform(0.1, 4, L)) if irregular else None
    pieces = [slice(0, 4), slice(4, 5), slice(5, L)]
    reset = (jnp.arange(L) == 4) | (jnp.arange(L) == 5)

    @quick_jit
    def run(given, weights, reset):
        weigh = lambda given: (jnp.sum(weights * (y := layer(given[0], intervals=given[1], reset=reset))), y)
        return jax.grad(weigh, has_aux=True)(given)

    for piece in pieces:
        gradients, y = run((u, intervals), jnp.zeros_like(weights).at[piece].set(weights[piece]), reset)
        cut = jax.tree.map(lambda a, piece=piece: a[piece], (u, intervals))
        alone_gradients, alone_y = run(cut, weights[piece], None)
        np.testing.assert_allclose(y[piece], alone_y, atol=1e-12)
        for got, alone in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone_gradients), strict=True):
            np.testing.assert_allclose(got[piece], alone, atol=1e-12)
            np.testing.assert_array_equal(got.at[piece].set(0), 0)


@pytest.mark.parametrize("cls", [nn.S5, nn.BidirectionalS5])
def test_gradient_to_the_intervals(cls, key, x64):
    """Against central differences, one interval at a time."""
    layer = cls(D, 8, key=key)
    rng = np.random.default_rng(0)
    u, weights = jnp.asarray(rng.standard_normal((2, L, D)))
    intervals, reset = jnp.asarray(rng.uniform(0.3, 4, L)), jnp.arange(L) == 4
    loss = lambda intervals: jnp.sum(weights * layer(u, intervals=intervals, reset=reset))
    value, gradient = quick_jit(loss), quick_jit(jax.grad(loss))(intervals)
    differences = [(value(intervals + e) - value(intervals - e)) / 2e-4 for e in 1e-4 * jnp.eye(L)]
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-9)
    assert jnp.all(jnp.abs(gradient) > 1e-6)


def test_takes_intervals_is_what_the_call_says():
    classes = [cls for cls in vars(nn).values() if inspect.isclass(cls) and issubclass(cls, nn.AbstractMixer)]
    taking = {cls for cls in classes if "intervals" in inspect.signature(cls.__call__).parameters}
    assert taking == {cls for cls in classes if cls.takes_intervals} == {nn.S5, nn.BidirectionalS5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 9, "num_blocks": 2}, "num_blocks must be positive and divide"),
        ({"num_blocks": 0}, "num_blocks must be positive and divide"),
        ({"state_size": 0}, "num_blocks must be positive and divide"),
        ({"state_size": 6, "num_blocks": 2}, "6 / 2 = 3. Change the sizes or pass conj_sym=False"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max; got dt_min=0.0"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "0 < dt_min <= dt_max; got dt_min=0.2, dt_max=0.1"),
        ({"step_rescale": 0.0}, "step_rescale multiplies the time step and must be positive; got 0.0"),
        ({"width": 0}, "width must be positive; got 0"),
        ({"dtype": jnp.bfloat16}, "float32 or float64; got dtype=bfloat16"),
    ],
)
@pytest.mark.parametrize("layer", [nn.S5, nn.BidirectionalS5])
def test_sizes_that_do_not_fit(layer, options, message, key):
    options = {"width": D, "state_size": 8} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(options.pop("width"), options.pop("state_size"), **options, key=key)
