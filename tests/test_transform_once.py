"""Transform Once: equal to its matrices with all gradients, on any grid; its start keeps the mean square of a field."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, slow
from scipy.special import erf
from test_spectrum import functions

from s5eqx import nn
from s5eqx.interop import load, save
from s5eqx.nn.transform_once import GELU_ENERGY

BASES = {"fourier": nn.Fourier(), "cosine": nn.Cosine()}
CASES = {
    "line": ((9,), (5,), ("fourier",), 2),
    "square": ((6, 8), (3, 8), ("cosine", "fourier"), 4),
    "cube": ((4, 3, 5), (2, 3, 2), ("fourier", "cosine", "cosine"), 3),
}


def layer(name, key, **options):
    grid, modes, names, num_layers = CASES[name]
    bases = tuple(BASES[name] for name in names)
    return nn.TransformOnce(2, 3, grid, modes, bases, hidden=7, num_layers=num_layers, **options, key=key)


def along(matrices, x):
    """Each matrix along its axis."""
    for axis, matrix in enumerate(matrices):
        x = jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x


def dense(weights, x, name):
    """The layer as it is written, with matrices for its bases."""
    _, modes, names, _ = CASES[name]
    matrices = [functions(name, n, m) for name, n, m in zip(names, x.shape, modes, strict=False)]
    gelu = lambda h: h * jax.scipy.stats.norm.cdf(h)
    V, ((first, b), *middle, (last, b_last)) = weights
    band = along([matrix / matrix.shape[1] for matrix in matrices], x).reshape(-1)
    h = first @ band + b
    for W, c in middle:
        h = (h + W @ gelu(h) + c) / np.sqrt(2)
    y = (last @ gelu(h) + b_last + V @ band).reshape(*modes, 3)
    return along([matrix.T for matrix in matrices], y)


@pytest.mark.parametrize("name", [slow("line"), "square", slow("cube")])
def test_equal_to_the_matrices(name, key, x64):
    """Output and all gradients, on the grid that it was built for and on a finer one."""
    model = drawn(lambda key: layer(name, key), key)
    rng = np.random.default_rng(0)
    grids = [tuple(n + finer for n in CASES[name][0]) for finer in (0, 3)]
    fields = [[rng.standard_normal((*grid, c)) for c in (2, 3)] for grid in grids]
    weights = model.V, [(layer.weight, layer.bias) for layer in model.layers]

    def run(function):
        def of(weights, x, back):
            y, pull = jax.vjp(function, weights, x)
            return y, pull(back)

        return quick_jit(lambda weights, fields: [of(weights, *pair) for pair in fields])(weights, fields)

    leaves = lambda m: [m.V, *jax.tree.leaves(m.layers)]
    given = run(lambda weights, x: eqx.tree_at(leaves, model, jax.tree.leaves(weights))(x))
    expected = run(lambda weights, x: dense(weights, x, name))
    for got, right in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-10)


@pytest.mark.smoke
def test_the_same_function_on_a_finer_grid(key, x64):
    """A field of the band, sampled more finely, gives the same field."""
    model = drawn(lambda key: layer("line", key), key)
    c = np.random.default_rng(1).standard_normal((5, 2))
    of = lambda n: nn.Fourier().analyse(model(nn.Fourier().synthesise(c, n, axis=0)), 5, axis=0)
    coarse, fine = quick_jit(lambda: (of(9), of(40)))()
    np.testing.assert_allclose(coarse, fine, atol=1e-12)


# The start.


@pytest.mark.parametrize("smooth, num_layers", [(False, 4), slow(True, 2)])
def test_the_start_keeps_the_mean_square(smooth, num_layers, key):
    """Of white noise, of which a quarter is in the band, and of smooth fields, which are in the band as a whole."""
    n, modes, fields, models = 64, 16, 20, 50
    options = {"hidden": 128, "num_layers": num_layers, "kept_energy": 1.0 if smooth else None}

    def ratios(key):
        model_key, x_key = jr.split(key)
        model = nn.TransformOnce(2, 2, (n,), (modes,), (nn.Fourier(),), **options, key=model_key)
        x = jr.normal(x_key, (fields, n, 2))
        if smooth:
            c = jr.normal(x_key, (fields, 9, 2)) / jnp.arange(1.0, 10.0)[None, :, None]
            x = nn.Fourier().synthesise(c, n, axis=1)
        x = x / jnp.sqrt(jnp.mean(x**2, axis=(1, 2), keepdims=True))
        return jnp.mean(jax.vmap(model)(x) ** 2, axis=(1, 2))

    found = quick_jit(lambda key: jax.vmap(ratios)(jr.split(key, models)))(key)
    assert np.asarray(found).mean() == pytest.approx(1, abs=0.1)  # four standard errors


def test_the_mean_square_of_the_gelu():
    z, weights = np.polynomial.hermite_e.hermegauss(80)
    gelu = z * (1 + erf(z / np.sqrt(2))) / 2
    assert np.sum(weights * gelu**2) / np.sqrt(2 * np.pi) == pytest.approx(GELU_ENERGY, rel=1e-6)


# Dtypes, files, bad input.


def test_precision_and_batches(key, tmp_path):
    model = drawn(lambda key: layer("square", key), key)
    x = on_device(np.random.default_rng(0).standard_normal((2, 6, 8, 2)))

    @quick_jit
    def run(model, x):
        narrow = nn.cast(model, jnp.bfloat16)
        return jax.vmap(model)(x), model(x[1]), jax.vmap(narrow)(x.astype(jnp.bfloat16))

    y, alone, narrow = jax.device_get(run(model, x))
    np.testing.assert_allclose(y[1], alone, atol=1e-5)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, y, atol=0.1)
    save(tmp_path / "model", model)
    assert eqx.tree_equal(*jax.device_get((load(tmp_path / "model"), model)))


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"modes": (4, 9)},
            "between 1 and what the grid has along each axis, (6, 8) for grid=(6, 8); got modes=(4, 9)",
        ),
        ({"modes": (0, 2)}, "got modes=(0, 2)"),
        ({"modes": (4,)}, "modes one number for each; got grid=(6, 8), modes=(4,)"),
        ({"grid": (2,) * 4, "modes": (1,) * 4}, "A field has 1 to 3 axes"),
        ({"bases": (nn.Cosine(),)}, "bases must be one for each axis of grid=(6, 8); got 1"),
        ({"hidden": 0}, "hidden must be at least 1; got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1; got 0"),
        ({"num_layers": 1}, "num_layers must be at least 2, one into the hidden units and one out; got 1"),
        ({"kept_energy": 0.0}, "kept_energy is a share above 0 and at most 1; got 0.0"),
        ({"kept_energy": 1.1}, "got 1.1"),
    ],
)
def test_sizes_that_do_not_fit(changes, said, key):
    sizes = {
        "in_channels": 2,
        "out_channels": 2,
        "grid": (6, 8),
        "modes": (4, 8),
        "bases": (nn.Cosine(),) * 2,
        "hidden": 5,
    }
    with pytest.raises(ValueError, match=re.escape(said)):
        nn.TransformOnce(**sizes | changes, key=key)


def test_fields_that_do_not_fit(key):
    model = drawn(lambda key: layer("square", key), key)
    for shape, said in (
        ((6, 8), "2 here, and an axis of 2 channels after them; got shape (6, 8)"),
        ((6, 8, 3), "got shape (6, 8, 3)"),
        ((6, 7, 2), "(6, 7) for grid=(6, 7); got modes=(3, 8)"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            model(np.zeros(shape, np.float32))
