"""The Fourier neural operator: equal to sums over its frequencies with all gradients, on any grid."""

import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import but_slow, drawn, on_device, quick_jit

from s5eqx import nn
from s5eqx.interop import load, save
from s5eqx.models import FNO

D = 2
CASES = {
    "line": ((8,), (3,)),
    "line to its last frequency": ((8,), (5,)),
    "odd line": ((7,), (4,)),
    "square": ((6, 5), (2, 3)),
    "square to its last frequencies": ((4, 6), (2, 4)),
    "cube": ((4, 5, 4), (1, 2, 2)),
}


def filtered(R, x, modes):
    """The learned filter with matrices for the transforms. A frequency along the last axis stands for its negative too,
    which it is itself if it is 0 or the last one of an even grid."""
    grid = x.shape[:-1]
    places = np.stack(np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij"), axis=-1).reshape(-1, len(grid))
    signed = [[*range(m), *range(-m, 0)] for m in modes[:-1]] + [[*range(modes[-1])]]
    k = np.array([*itertools.product(*signed)])
    waves = np.exp(2j * np.pi * k @ places.T)
    stands_for = np.where((k[:, -1] == 0) | (2 * k[:, -1] == grid[-1]), 1, 2)
    flat = R.reshape(len(k), D, D, 2)
    found = jnp.einsum("kx,xi->ki", waves.conj() / len(places), x.reshape(len(places), D).astype(complex))
    found = jnp.einsum("ki,kio->ko", found, jax.lax.complex(flat[..., 0], flat[..., 1]))
    return jnp.einsum("kx,ko->xo", stands_for[:, None] * waves, found).real.reshape(x.shape)


def gelu(h):
    return h * (1 + jax.scipy.special.erf(h / np.sqrt(2))) / 2


def apply(layer, h):
    return jnp.einsum("oi,...i->...o", layer.weight, h) + layer.bias[(None,) * (h.ndim - 1)]


@pytest.mark.parametrize("name", but_slow(CASES, "line", "square"))
def test_equal_to_the_sum(name, key, x64):
    """Output and all gradients, on the grid that it was built for and on a finer one."""
    grid, modes = CASES[name]
    block = drawn(lambda key: nn.FNOBlock(D, grid, modes, key=key), key)
    rng = np.random.default_rng(0)
    shapes = [(*(n + finer for n in grid), D) for finer in (0, 3)]
    fields = [[rng.standard_normal(shape) for _ in range(2)] for shape in shapes]

    def run(function):
        def of(block, x, back):
            y, pull = eqx.filter_vjp(function, block, x)
            return y, pull(back)

        return quick_jit(lambda block, fields: [of(block, *pair) for pair in fields])(block, fields)

    given = run(lambda block, x: block(x))
    expected = run(lambda block, x: gelu(apply(block.W, x) + filtered(block.R, x, modes)))
    for got, right in zip(
        *(jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (given, expected)), strict=True
    ):
        np.testing.assert_allclose(got, right, atol=1e-10)


@pytest.mark.smoke
def test_the_start_is_the_published_one(key):
    block = quick_jit(lambda key: nn.FNOBlock(8, (16, 16), (4, 5), key=key))(key)
    assert block.R.shape == (8, 5, 8, 8, 2)
    R = np.asarray(block.R) * 64
    assert 0 <= R.min() < 0.01 and 0.99 < R.max() < 1
    assert R.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * R.size))


def model(key, grid=(6, 5), modes=(2, 3), **options):
    return FNO(1, 3, grid, modes, **{"width": D, "num_layers": 3, "hidden": 5} | options, key=key)


@pytest.mark.smoke
def test_parts_of_the_model(key, x64):
    """By hand: coordinates, lift, blocks of which the last is linear, two dense layers."""
    fno = drawn(lambda key: model(key, offset=0.5), key)
    x = np.random.default_rng(1).standard_normal((6, 5, 1))
    rows, columns = np.broadcast_arrays((np.arange(6)[:, None] + 0.5) / 6, (np.arange(5)[None] + 0.5) / 5)

    @quick_jit
    def by_hand(fno, x):
        h = apply(fno.lift, jnp.concatenate([x, rows[..., None], columns[..., None]], axis=-1))
        for number, block in enumerate(fno.blocks):
            h = apply(block.W, h) + filtered(block.R, h, block.modes)
            h = h if number == 2 else gelu(h)
        return apply(fno.project2, gelu(apply(fno.project1, h)))

    np.testing.assert_allclose(quick_jit(lambda fno, x: fno(x))(fno, x), by_hand(fno, x), atol=1e-10)


def test_precision_batches_and_files(key, tmp_path):
    fno = drawn(model, key)
    x = on_device(0.3 * np.random.default_rng(0).standard_normal((2, 6, 5, 1)))

    @quick_jit
    def run(fno, x):
        narrow = nn.cast(fno, jnp.bfloat16)
        return jax.vmap(fno)(x), fno(x[1]), jax.vmap(narrow)(x.astype(jnp.bfloat16))

    y, alone, narrow = jax.device_get(run(fno, x))
    np.testing.assert_allclose(y[1], alone, atol=1e-5)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, y, atol=0.1)
    save(tmp_path / "model", fno)
    assert eqx.tree_equal(*jax.device_get((load(tmp_path / "model"), fno)))


@pytest.mark.parametrize(
    "build, said",
    [
        (
            lambda key: nn.FNOBlock(4, (8,), (6,), key=key),
            "what the grid has along each axis, (5,) for grid=(8,); got modes=(6,)",
        ),
        (lambda key: nn.FNOBlock(4, (7, 8), (4, 5), key=key), "(3, 5) for grid=(7, 8); got modes=(4, 5)"),
        (lambda key: nn.FNOBlock(4, (8, 8), (4,), key=key), "modes one number for each; got grid=(8, 8), modes=(4,)"),
        (lambda key: nn.FNOBlock(0, (8,), (4,), key=key), "width must be at least 1; got 0"),
        (lambda key: model(key, num_layers=0), "num_layers must be at least 1; got 0"),
        (lambda key: model(key, hidden=0), "hidden must be at least 1; got 0"),
        (lambda key: model(key, modes=(2, 4)), "got modes=(2, 4)"),
    ],
)
def test_sizes_that_do_not_fit(build, said, key):
    with pytest.raises(ValueError, match=re.escape(said)):
        eqx.filter_eval_shape(build, key)


def test_fields_that_do_not_fit(key):
    fno = drawn(model, key)
    for layer, channels in ((fno, 1), (fno.blocks[0], D)):
        for shape, said in (
            ((6, 5), f"an axis of {channels} channels after them; got shape (6, 5)"),
            ((6, 5, 4), "got shape (6, 5, 4)"),
            ((6, 5, 5, channels), "got shape (6, 5, 5"),
            ((3, 5, channels), "(1, 3) for grid=(3, 5); got modes=(2, 3)"),
        ):
            with pytest.raises(ValueError, match=re.escape(said)):
                eqx.filter_eval_shape(layer, np.zeros(shape, np.float32))
