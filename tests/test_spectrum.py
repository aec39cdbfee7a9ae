"""Real bases of fields: equal to their matrices, orthonormal, and the same on every grid."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit

from s5eqx import nn

BASES = {"fourier": nn.Fourier(), "cosine": nn.Cosine()}
SIZES = [(1, 1), (2, 1), (2, 2), (7, 4), (7, 7), (8, 5), (8, 8)]


def functions(name, n, modes):
    """The first functions at the n samples, a row each, straight from their definition."""
    j, k = np.arange(n), np.arange(modes)[:, None]
    if name == "cosine":
        return np.where(k > 0, np.sqrt(2), 1) * np.cos(np.pi * k * (j + 0.5) / n)
    angle = 2 * np.pi * ((k + 1) // 2) * j / n
    rows = np.where(k > 0, np.sqrt(2), 1) * np.where((k % 2 == 1) | (k == 0), np.cos(angle), np.sin(angle))
    if modes == n and n % 2 == 0:
        rows[-1] = (-1.0) ** j
    return rows


@pytest.mark.smoke
@pytest.mark.parametrize("name", BASES)
def test_equal_to_the_matrix(name, x64):
    """Coefficients, samples and the gradients of both, along an axis in the middle."""
    rng, basis = np.random.default_rng(0), BASES[name]
    draw = lambda size: rng.standard_normal((2, size, 3))
    given = [(draw(n), draw(m)) for n, m in SIZES]

    @quick_jit
    def run(given):
        def both(n, m, x, c):
            there, pull = jax.vjp(lambda x: basis.analyse(x, m, axis=1), x)
            back, push = jax.vjp(lambda c: basis.synthesise(c, n, axis=1), c)
            return there, pull(c)[0], back, push(x)[0]

        return [both(*size, *pair) for size, pair in zip(SIZES, given, strict=True)]

    for (n, m), (x, c), found in zip(SIZES, given, run(given), strict=True):
        matrix = functions(name, n, m)
        np.testing.assert_allclose(matrix @ matrix.T / n, np.eye(m), atol=1e-12)
        coefficients, samples = np.einsum("kj,ajb->akb", matrix, x) / n, np.einsum("kj,akb->ajb", matrix, c)
        for got, expected in zip(found, (coefficients, samples / n, samples, n * coefficients), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_a_function_has_the_same_coefficients_on_every_grid(name, x64):
    """And their squares add up to its mean square; only the last function of an even grid has a scale of its own."""
    basis = BASES[name]
    c = np.random.default_rng(3).standard_normal(7)

    @quick_jit
    def run(c):
        grids = {n: basis.synthesise(c, n) for n in (7, 8, 15)}
        last = basis.synthesise(jnp.eye(8)[7], 16)
        return [(x, basis.analyse(x, n)) for n, x in grids.items()], basis.analyse(last, 8)

    found, last = run(c)
    for x, again in jax.tree.map(np.asarray, found):
        np.testing.assert_allclose(again[:7], c, atol=1e-12)
        np.testing.assert_allclose(again[7:], 0, atol=1e-12)
        assert np.mean(x**2) == pytest.approx(np.sum(c**2), abs=1e-12)
    np.testing.assert_allclose(last, np.eye(8)[7], atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_frequencies_count_the_periods(name):
    """The slope of a function has the mean square (2 pi f)^2: by finite differences on a fine grid."""
    n, modes = 2000, 6
    slope = np.diff(functions(name, n, modes), axis=1) * n
    found = np.sqrt(np.mean(slope**2, axis=1)) / (2 * np.pi)
    np.testing.assert_allclose(BASES[name].frequencies(modes), found, rtol=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_low_precision_is_raised(name):
    @quick_jit
    def run(x):
        c = BASES[name].analyse(x, 3)
        return c, BASES[name].synthesise(c.astype(jnp.bfloat16), 4)

    c, x = run(on_device(np.ones(4), jnp.bfloat16))
    assert c.dtype == x.dtype == jnp.float32
    np.testing.assert_allclose(c, [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_more_modes_than_samples(name):
    for modes in (0, 9):
        with pytest.raises(
            ValueError, match=re.escape(f"between 1 and the number of samples along the axis, 8; got {modes}")
        ):
            BASES[name].analyse(np.zeros((8, 2), np.float32), modes, axis=0)
    with pytest.raises(ValueError, match="along the axis, 4; got 5"):
        BASES[name].synthesise(np.zeros(5, np.float32), 4)
