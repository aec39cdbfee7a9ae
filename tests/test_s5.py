"""S5: its eigenvalues, its discretisations, its layer against a loop in NumPy."""

import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import drawn, quick_jit, slow, to_complex

from s5eqx import nn

D, L = 3, 11


def s5(key, **options):
    return nn.S5(D, 8, num_blocks=2, key=key, **options)


def naive(layer, C, u, intervals=None, reset=None, reverse=False):
    """The layer as it is written in the paper, less its skip: one step after the other.

    Step t has the interval between its sample and the one that was visited before it; the first that is visited, that
    of the earliest sample of its sequence.
    """
    Lambda = np.minimum(layer.Lambda_re, -1e-4 if layer.clip_eigs else np.inf) + 1j * np.asarray(layer.Lambda_im)
    B, C = to_complex(layer.B), to_complex(C)
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
    build = lambda key: s5(key, discretisation=discretisation, conj_sym=conj_sym, step_rescale=1.7)
    layer = drawn(build, key)
    assert np.any(np.asarray(layer.Lambda_re) > 0)  # clipped
    rng = np.random.default_rng(0)
    u, intervals, reset = rng.standard_normal((L, D)), rng.uniform(0.1, 4, L), rng.random(L) < 0.2
    for options in ({}, {"intervals": intervals}, {"intervals": intervals, "reset": reset}):
        y = quick_jit(layer)(u, **options)
        expected = naive(layer, layer.C, u, **options) + np.asarray(layer.D) * u
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


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
    got_value, got_slope = quick_jit(lambda z: jax.jvp(gain, (z,), (jnp.ones_like(z),)))(Lambda)
    np.testing.assert_allclose(got_value, value.astype(complex), rtol=5e-7)
    np.testing.assert_allclose(got_slope, slope.astype(complex), rtol=5e-6)


@pytest.mark.parametrize("discretisation", [nn.ZOH(), nn.Bilinear()])
def test_clipped_systems_are_stable(discretisation, key):
    def build(clip_eigs):
        layer = drawn(lambda key: s5(key, discretisation=discretisation, clip_eigs=clip_eigs), key)
        leaves = np.array([0.5, 0.0, -1e-5, -40.0], np.float32), np.full(4, np.log(0.01), np.float32)
        return eqx.tree_at(lambda s: (s.Lambda_re, s.log_Delta), layer, leaves)

    @quick_jit
    def size_and_gradient(layer):
        size = lambda layer: (jnp.sum(sizes := jnp.abs(layer.discretised()[0])), sizes)
        gradient, sizes = eqx.filter_grad(size, has_aux=True)(layer)
        return sizes, gradient.Lambda_re

    sizes, gradient = map(np.asarray, size_and_gradient(build(clip_eigs=True)))
    assert np.all(sizes < 1)
    np.testing.assert_array_equal(gradient[:3], 0)
    assert gradient[3] != 0
    assert np.asarray(size_and_gradient(build(clip_eigs=False))[0])[0] > 1


@pytest.mark.parametrize("C_init", [*map(slow, (nn.TruncatedNormal(), nn.LecunNormal())), nn.ComplexNormal()])
def test_every_leaf_is_real_and_the_effective_C_learns(C_init, key):
    """With C as complex pairs, as in the reference, the two updates cancel and C never moves."""
    optimiser = optax.adamw(1e-2, weight_decay=0.0)
    u, target = np.random.default_rng(0).standard_normal((2, L, D)).astype(np.float32)

    @quick_jit
    def start(key):
        layer = s5(key, C_init=C_init)
        return layer, optimiser.init(layer)

    @quick_jit
    def train(layer, state):
        loss, gradient = eqx.filter_value_and_grad(lambda s: jnp.mean((s(jnp.asarray(u)) - target) ** 2))(layer)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in integers
            updates, state = optimiser.update(gradient, state, layer)
        return eqx.apply_updates(layer, updates), state, loss, layer.discretised()[2]

    layer, state = start(key)
    assert all(jnp.isrealobj(a) for a in jax.tree.leaves(eqx.filter(layer, eqx.is_array)))
    losses, Cs = [], []
    for _ in range(21):
        layer, state, loss, C = train(layer, state)
        losses.append(loss)
        Cs.append(np.asarray(C))
    assert np.min(np.abs(Cs[-1] - Cs[0])) > 0.02
    assert losses[-1].item() < 0.9 * losses[0].item()


def test_dt_bounds_and_dtype(key, x64):
    build = lambda key: nn.S5(4, 2000, dt_min=0.01, dt_max=0.5, num_blocks=1000, dtype=np.float32, key=key)
    Delta = np.exp(quick_jit(lambda key: build(key).log_Delta)(key))
    assert Delta.min() >= 0.01 * (1 - 1e-6) and Delta.max() <= 0.5 * (1 + 1e-6)
    np.testing.assert_allclose(np.mean(np.log(Delta)), np.log(0.01 * 0.5) / 2, atol=0.1)
    layer = eqx.filter_eval_shape(build, key)
    assert {a.dtype for a in jax.tree.leaves(layer) if isinstance(a, jax.ShapeDtypeStruct)} == {np.dtype(np.float32)}
    state = lambda build: eqx.filter_eval_shape(lambda key: build(key).init_state(), key)
    assert state(build).dtype == jnp.complex64
    assert state(s5).dtype == jnp.complex128


@pytest.mark.parametrize("activation", [slow(eqx.nn.Identity()), nn.Gelu()])
def test_bidirectional_equals_the_loop(activation, key, x64):
    build = lambda key: nn.BidirectionalS5(D, 8, num_blocks=2, step_rescale=1.7, activation=activation, key=key)
    layer = drawn(build, key)
    assert not isinstance(layer, nn.AbstractCausalMixer)
    u = np.random.default_rng(0).standard_normal((L, D))
    reset = np.isin(np.arange(L), [0, 4, 5])
    intervals = np.random.default_rng(1).uniform(0.1, 4, L)
    for options in ({}, {"reset": reset}, {"intervals": intervals}, {"intervals": intervals, "reset": reset}):
        y = naive(layer.forward, layer.forward.C, u, **options) + np.asarray(layer.forward.D) * u
        y = y + naive(layer.forward, layer.C_backward, u, **options, reverse=True)
        np.testing.assert_allclose(quick_jit(layer)(u, **options), quick_jit(activation)(y), rtol=0, atol=1e-12)
    assert quick_jit(layer)(u[:0], intervals=intervals[:0], reset=reset[:0]).shape == (0, D)


@pytest.mark.smoke
@pytest.mark.parametrize("irregular", [slow(False), True])
def test_bidirectional_packs_sequences(irregular, key, x64):
    """Each is as it is alone, in value and gradient, and knows nothing of the others."""
    layer = drawn(lambda key: nn.BidirectionalS5(D, 8, key=key), key)
    rng = np.random.default_rng(0)
    u, weights = rng.standard_normal((2, L, D))
    given = u, rng.uniform(0.1, 4, L) if irregular else None
    reset = np.isin(np.arange(L), [5, 6])

    @quick_jit
    def run(given, weights, reset):
        weigh = lambda given: (jnp.sum(weights * (y := layer(given[0], intervals=given[1], reset=reset))), y)
        return jax.grad(weigh, has_aux=True)(given)

    for piece in (slice(0, 5), slice(5, 6), slice(6, L)):
        inside = np.isin(np.arange(L), np.arange(L)[piece])
        gradients, y = run(given, weights * inside[:, None], reset)
        alone_gradients, alone_y = run(jax.tree.map(lambda a, piece=piece: a[piece], given), weights[piece], None)
        np.testing.assert_allclose(np.asarray(y)[piece], alone_y, atol=1e-12)
        for got, alone in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone_gradients), strict=True):
            np.testing.assert_allclose(np.asarray(got)[piece], alone, atol=1e-12)
            np.testing.assert_array_equal(np.asarray(got)[~inside], 0)


@pytest.mark.parametrize("cls", [nn.S5, nn.BidirectionalS5])
def test_gradient_to_the_intervals(cls, key, x64):
    """Against central differences, one interval at a time."""
    layer = drawn(lambda key: cls(D, 8, key=key), key)
    rng = np.random.default_rng(0)
    u, weights = rng.standard_normal((2, L, D))
    intervals, reset = rng.uniform(0.3, 4, L), np.arange(L) == 4
    loss = quick_jit(jax.value_and_grad(lambda t: jnp.sum(weights * layer(u, intervals=t, reset=reset))))
    value, gradient = lambda intervals: loss(intervals)[0].item(), np.asarray(loss(intervals)[1])
    differences = [(value(intervals + e) - value(intervals - e)) / 2e-4 for e in 1e-4 * np.eye(L)]
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-9)
    assert np.all(np.abs(gradient) > 1e-6)


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
