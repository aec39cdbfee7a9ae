"""Solvers against exact solutions, random fields against their spectrum, and examples that seed and number decide."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_jit, relative_error
from scipy.linalg import expm
from test_spectrum import functions

from s5eqx import nn
from s5eqx.data import Burgers, FieldBatch, Heat, burgers, heat, pde, random_coefficients
from s5eqx.data.pde import AbstractOperatorTask
from s5eqx.train import relative_error as loss

# Burgers' equation.


def cole_hopf(viscosity, time, n):
    """Exact, from u = sin(2 pi x) + 1/2: with u = -2 viscosity phi_x / phi, seen from a frame that moves with the mean,
    phi obeys the heat equation, here on 512 points."""
    fine, mean = 512, 0.5
    x = np.arange(fine) / fine
    phi = np.exp((np.cos(2 * np.pi * x) - 1) / (4 * np.pi * viscosity))
    k = 2 * np.pi * np.fft.rfftfreq(fine, 1 / fine)
    later = np.fft.rfft(phi) * np.exp(-viscosity * k**2 * time)
    at = (np.arange(n) / n - mean * time)[:, None]
    weights = np.where((k == 0) | (k == k[-1]), 1, 2)
    wave = weights * np.exp(1j * at * k) * later
    return mean - 2 * viscosity * (wave @ (1j * k)).real / wave.sum(axis=1).real


@pytest.mark.smoke
def test_burgers_is_the_exact_solution(x64):
    """To rounding where the grid resolves it, and with an error that falls as the fourth power of the step."""
    viscosity, time, n = 0.03, 0.3, 256
    exact = cole_hopf(viscosity, time, n)
    u = np.sin(2 * np.pi * np.arange(n) / n) + 0.5
    solve = quick_jit(lambda u: [burgers(u, viscosity, time, num_steps=steps) for steps in (40, 80, 160, 1000)])
    *errors, last = (relative_error(later, exact) for later in solve(u))
    assert last < 1e-10, last
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 4, atol=0.5)
    assert np.max(np.abs(np.diff(exact))) > 1.5 * np.max(np.abs(np.diff(u)))  # a front has formed


def test_burgers_keeps_the_mass_and_loses_energy(x64):
    u = np.random.default_rng(0).standard_normal((3, 16))
    later = np.asarray(quick_jit(lambda u: burgers(u, 0.05, 0.1, num_steps=50))(u))
    np.testing.assert_allclose(later.mean(axis=1), u.mean(axis=1), atol=1e-14)
    assert np.all(np.mean(later**2, axis=1) < np.mean(u**2, axis=1))


def test_squares_are_not_taken_for_lower_frequencies(x64):
    """The square of the highest frequency kept has twice that frequency, which the grid does not have."""
    n, f = 32, 10
    u = np.cos(2 * np.pi * f * np.arange(n) / n)
    later = quick_jit(lambda u: burgers(u, 1e-3, 0.05, num_steps=50))(u)
    np.testing.assert_allclose(later, np.exp(-1e-3 * (2 * np.pi * f) ** 2 * 0.05) * u, atol=1e-12)


# The heat equation.


def test_each_cosine_decays_at_its_rate(x64):
    n, m, diffusivity, time = 8, 6, 0.03, 0.2
    x, y = (np.arange(n)[:, None] + 0.5) / n, (np.arange(m)[None] + 0.5) / m
    mode = lambda k, l: np.cos(np.pi * k * x) * np.cos(np.pi * l * y)
    modes = [(0, 0), (1, 0), (0, 2), (3, 2), (7, 5)]
    fields = np.stack([mode(k, l) for k, l in modes])
    later = quick_jit(lambda u: heat(u, diffusivity, time))(fields)
    decay = np.array([np.exp(-diffusivity * time * np.pi**2 * (k**2 + l**2)) for k, l in modes])
    np.testing.assert_allclose(later, decay[:, None, None] * fields, atol=1e-12)


def cells_of_heat(u, diffusivity, time):
    """Cells that exchange heat with their neighbours, and none with the walls."""
    flow = len(u) * np.diff(np.eye(len(u)), axis=0)
    exchange = expm(-diffusivity * time * flow.T @ flow)
    return exchange @ u @ exchange


@pytest.mark.smoke
def test_heat_is_what_finite_differences_come_to(x64):
    """Closer by the square of the spacing."""
    diffusivity, time, errors = 0.05, 0.1, []
    for n in (16, 32):
        at = (np.arange(n) + 0.5) / n
        u = np.exp(-((at[:, None] - 0.2) ** 2) / 0.02) * (1 + np.cos(np.pi * at)[None])
        later = np.asarray(quick_jit(lambda u: heat(u, diffusivity, time))(u))
        errors.append(relative_error(later, cells_of_heat(u, diffusivity, time)))
        assert np.mean(later) == pytest.approx(np.mean(u), abs=1e-14)
        assert relative_error(u, later) > 0.2
    assert errors[1] < 5e-3 and np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


# Random fields.


def test_random_fields_have_their_spectrum(key):
    bases, modes = [nn.Fourier(), nn.Cosine()], (5, 4)
    draw = lambda key: random_coefficients(key, bases, modes, length=0.1, smoothness=1.5)
    c = np.asarray(quick_jit(lambda key: jax.vmap(draw)(jr.split(key, 20_000)))(key))
    f, g = np.array([0, 1, 1, 2, 2]), np.array([0, 0.5, 1, 1.5])
    variance = (1 + 0.04 * np.pi**2 * (f[:, None] ** 2 + g[None] ** 2)) ** -1.5
    np.testing.assert_allclose(c.var(axis=0), variance / variance.sum(), rtol=0.06)
    assert np.mean(np.sum(c**2, axis=(1, 2))) == pytest.approx(1, abs=0.03)


# Examples.

TASKS = {
    "burgers": lambda n: Burgers(resolution=n, num_examples=6, num_test=3),
    "heat": lambda n: Heat(resolution=n, num_examples=6, num_test=3),
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(pde, "CHUNK", 4)


def rows(*numbers):
    return np.array(numbers, np.int32)


@dataclasses.dataclass(frozen=True)
class Noise(AbstractOperatorTask):
    grid = (8,)

    def draw(self, key):
        x = jr.normal(key, (8,), jnp.float32)
        return x, -x


def test_an_example_depends_on_seed_and_number_alone():
    task, larger, other = (Noise(num_examples=6, num_test=n, seed=seed) for n, seed in ((3, 0), (5, 0), (3, 1)))
    together = task.test(rows(0, 1, 2, 3))
    np.testing.assert_array_equal(together.weights, [1, 1, 1, 0])
    np.testing.assert_array_equal(together.inputs[:3], larger.test(rows(0, 1, 2)).inputs)
    np.testing.assert_array_equal(together.targets[:3], larger.test(rows(0, 1, 2)).targets)
    everything = [task.train(np.arange(6 * epoch, 6 * epoch + 6, dtype=np.int32)) for epoch in (0, 1)]
    name = lambda batch: [
        (float(x.ravel()[5]), float(y.ravel()[7])) for x, y in zip(batch.inputs, batch.targets, strict=True)
    ]
    assert name(everything[0]) != name(everything[1])  # in another order
    assert set(name(everything[0])) == set(name(everything[1])) and len(set(name(everything[0]))) == 6
    np.testing.assert_array_equal(task.train(rows(8)).inputs[0], everything[1].inputs[2])
    drawn = set(name(everything[0]) + name(together)[:3])
    assert len(drawn) == 9 and not drawn & set(name(other.test(rows(0, 1, 2))))


@functools.cache
def examples(name, n):
    return TASKS[name](n).test(rows(0, 1, 2))


@pytest.mark.parametrize("name, n", [("burgers", 128), ("heat", 32)])
def test_the_same_fields_on_a_finer_grid(name, n):
    coarse, fine = examples(name, n), examples(name, 2 * n)
    assert coarse.inputs.dtype == coarse.targets.dtype == np.float32
    assert TASKS[name](2 * n).sequence_length == fine.inputs[0].size
    for a, b in ((coarse.inputs, fine.inputs), (coarse.targets, fine.targets)):
        if name == "burgers":
            np.testing.assert_allclose(a, b[:, ::2], atol=1e-6)
            continue
        a, b = (
            np.einsum("kx,ly,axyc->aklc", *[functions("cosine", n, 32) / n] * 2, fields)
            for n, fields in ((32, a), (64, b))
        )
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name, n", [("burgers", 256), ("heat", 32)])
def test_targets_are_the_solution_of_the_inputs(name, n):
    """And double precision does not change the data."""
    batch = examples(name, n)
    assert np.mean(batch.inputs**2) == pytest.approx(1, abs=0.7)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        again = TASKS[name](n).test(rows(0, 1, 2))
        solve = {"burgers": lambda u: burgers(u, 0.01, 0.3, num_steps=600), "heat": lambda u: heat(u, 0.001, 1.0)}[name]
        truth = quick_jit(solve)(batch.inputs[..., 0].astype(np.float64))
    assert again.inputs.dtype == again.targets.dtype == np.float32
    np.testing.assert_allclose(again.inputs, batch.inputs, atol=1e-5)
    np.testing.assert_allclose(batch.targets[..., 0], truth, atol=2e-4)


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: Burgers(resolution=100), "resolution must divide the 256 points of the solver, got 100"),
        (lambda: Burgers(resolution=0), "got 0"),
        (lambda: Burgers(viscosity=0.0), "viscosity must be above 0, got 0.0"),
        (lambda: Heat(resolution=31), "resolution must be at least 32, the cosines drawn, got 31"),
        (lambda: Heat(time=np.nan), "time must be above 0, got nan"),
        (lambda: Heat(seed=-1), "a seed is a number of 32 bits, 0 to 4294967295, got -1"),
        (lambda: Heat(num_test=0), "num_test must be above 0, got 0"),
        (lambda: Burgers(num_examples=-1), "num_examples must be above 0, got -1"),
        (lambda: burgers(np.zeros(8), 0.1, 1.0, num_steps=0), "num_steps must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_is_refused(build, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build()


# The error.


def test_the_error_is_relative_to_each_target(x64):
    """Weighed, with a gradient even where the prediction is exact, and none from what is not asked."""
    rng = np.random.default_rng(5)
    targets = rng.standard_normal((4, 3, 2, 1))
    inputs = 1.5 * targets
    inputs[0] = targets[0]
    targets[2], targets[3] = 0, np.nan
    weights = np.array([1.0, 2.0, 1.0, 0.0])
    batch = FieldBatch(inputs, targets, weights)

    @quick_jit
    def run(a):
        of = lambda a: loss(lambda x, key: a * x, batch)
        return of(a), jax.grad(lambda a: of(a).total)(a)

    found, gradient = jax.device_get(run(np.float64(1.0)))
    zero = np.sqrt(np.sum(inputs[2] ** 2))
    assert found.total == pytest.approx(2 * 0.5 + zero, abs=1e-12) and found.weight == 4
    assert gradient == pytest.approx(2 * 1.5 + zero, abs=1e-12)
    with pytest.raises(ValueError, match=r"of the shape of its targets, \(3, 2, 1\); got \(2, 3, 1\)"):
        jax.eval_shape(lambda: loss(lambda x, key: jnp.swapaxes(x, 0, 1), batch))
