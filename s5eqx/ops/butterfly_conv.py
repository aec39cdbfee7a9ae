"""The discrete Fourier transform as a product of small dense ones, and the long convolution that is made of it.

A matrix product is what an accelerator does best, and it reads its input in the order in which it lies in memory. With
`N = N_1 M`, the index of time `a M + b` and that of frequency `k_1 + N_1 k`,

    g[k_1, b]       = w_N^(k_1 b) sum_a w_(N_1)^(k_1 a) x[a, b],     w_m = exp(-2 pi i / m),
    X[k_1 + N_1 k]  = sum_b w_M^(k b) g[k_1, b],

and for `M = N_2 M_2` the last line is the same again. So a transform of order p is p products with blocks, dense
`N_i x N_i` matrices, and p - 1 multiplications with twiddle factors: a Monarch matrix, or for small blocks a butterfly.
Frequencies come out in another order, the same one for the input and for the kernel.

Of real numbers only the frequencies of `k_1 <= N_1 / 2` are needed: the others are their conjugates. The half of the
rows that is padding is never there.

Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646), section 4;
Dao et al., "Monarch" (arXiv 2204.00595); Fu et al., "FlashFFTConv" (arXiv 2311.05908).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jax import lax
from jax.typing import DTypeLike

from s5eqx._typing import Array, Float, checked
from s5eqx.ops._conv_algorithm import AbstractConvAlgorithm

Blocks = tuple[Float[Array, "_ _ 2"], ...]
"""The matrices of a transform, as pairs (re, im): `N_1 // 2 + 1` rows of the first, the others whole."""


class Monarch(AbstractConvAlgorithm):
    """Transforms as products of `order` dense blocks of about `(N / 4)^(1 / order)` rows, the first one of four times
    as many, which balances their work: O(N^(1 + 1 / order)) operations.

    It needs `highest` precision of a matrix product for results like those of an FFT, and takes another `precision` of
    `jnp.matmul` if asked: tensor cores are faster below.

    Under `jax.vmap` XLA reorders what lies in the right order without: an array with a batch axis is faster.
    """

    order: int
    precision: str

    def __init__(self, order: int = 2, *, precision: str = "highest"):
        if order < 2:
            raise ValueError(f"order counts the factors of the transform and must be at least 2; got {order}.")
        self.order = order
        self.precision = precision

    def __call__(
        self, u: Float[Array, "*batch L D"], k: Float[Array, "K D"], period: int
    ) -> Float[Array, "*batch L D"]:
        blocks = dft_blocks(_factors(period, self.order), u.dtype)
        return butterfly_conv(u, k, blocks, blocks, precision=self.precision)


class ThreePass(AbstractConvAlgorithm):
    """A transform over `rows` rows, convolutions of length `N / rows` by FFT, one after the other, and the transform
    back: three passes over memory for sequences that no cache holds. Take `rows` such that it holds one of the
    convolutions in the middle. A gradient computes them again."""

    rows: int
    precision: str

    def __init__(self, rows: int = 16, *, precision: str = "highest"):
        if rows < 2:
            raise ValueError(f"rows counts the pieces of the transform and must be at least 2; got {rows}.")
        self.rows = rows
        self.precision = precision

    def __call__(
        self, u: Float[Array, "*batch L D"], k: Float[Array, "K D"], period: int
    ) -> Float[Array, "*batch L D"]:
        size = self.rows * int(scipy.fft.next_fast_len(-(-period // self.rows)))  # pyright: ignore[reportArgumentType]
        (block,) = dft_blocks((self.rows,), u.dtype)
        kept = len(block)

        @jax.checkpoint
        def in_the_middle(rows):
            spectrum, kernel = (jnp.fft.fft(lax.complex(a[0], a[1]), axis=0) for a in rows)
            y = spectrum.reshape(len(kernel), -1, k.shape[1]) * kernel[:, None]
            y = jnp.fft.ifft(y.reshape(spectrum.shape), axis=0)
            return jnp.stack([y.real, y.imag])

        into = lambda x: _twiddle(_first(_columns(x), block, size, self.precision), kept, size)
        g = _twiddle(lax.map(in_the_middle, (into(u), into(k))), kept, size, back=True)
        return _rows(_last(g, self.rows, u.shape[-2], self.precision), u.shape)


@checked
def butterfly_conv(
    u: Float[Array, "*batch L D"],
    k: Float[Array, "K D"],
    blocks: Blocks,
    kernel_blocks: Blocks,
    *,
    precision: str = "highest",
) -> Float[Array, "*batch L D"]:
    """The first `L` outputs of the inverse Fourier transform of `transform(u) transform(k)`, where `blocks` take the
    place of the Fourier transform's own in the transform of `u`, and `kernel_blocks` in that of `k`.

    With those of `dft_blocks` it is the circular convolution of period `N`, the product of the sizes of the blocks.
    `L` and `K` are at most `N`, and all arrays of one dtype.
    """
    factors = tuple(block.shape[1] for block in blocks)
    wanted = [(n // 2 + 1 if i == 0 else n, n, 2) for i, n in enumerate(factors or (1,))]
    for name, given in (("blocks", blocks), ("kernel_blocks", kernel_blocks)):
        if (shapes := [block.shape for block in given]) != wanted:
            raise ValueError(f"{name} must have the shapes {wanted}, those of `dft_blocks`; got {shapes}.")
    if max(u.shape[-2], len(k)) > math.prod(factors):
        raise ValueError(
            f"Blocks of sizes {factors} transform sequences of up to {math.prod(factors)} steps; got {u.shape[-2]} "
            f"and a kernel of {len(k)}. Take larger blocks, or more."
        )
    if not u.size or not len(k):
        return jnp.zeros_like(u)
    spectrum = _transform(_columns(u), blocks, precision)
    kernel = _transform(k, kernel_blocks, precision)[:, :, None]
    product = _times(spectrum.reshape(*spectrum.shape[:2], -1, k.shape[1]), kernel[:, 0], kernel[:, 1])
    return _rows(_inverse(product.reshape(spectrum.shape), factors, u.shape[-2], precision), u.shape)


def dft_blocks(factors: tuple[int, ...], dtype: DTypeLike = np.float64) -> tuple[np.ndarray, ...]:
    """The blocks that make it the Fourier transform of size `prod(factors)`, for `butterfly_conv`."""
    if not factors or min(factors) < 1:
        raise ValueError(f"factors must be one or more sizes of at least 1; got {factors}.")
    first, *others = factors
    return tuple(np.asarray(block, dtype) for block in (_dft(first)[: first // 2 + 1], *map(_dft, others)))


def _dft(n):
    angle = -2 * np.pi / n * (np.outer(np.arange(n), np.arange(n)) % n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _factors(period, order):
    """The first counts once for the half of its rows and once for the half of its columns that are not there."""
    other = max(2, round((period / 4) ** (1 / order)))
    first = -(-period // other ** (order - 1))
    return first + first % 2, *[other] * (order - 1)


# Below, sequences are columns, (L, C). On the way they are (G, 2, M, C): G frequencies that are done, pairs (re, im),
# and M steps to do. So each product is one of plain matrices, and its result lies where the next one wants it.


def _columns(u):
    return jnp.moveaxis(u, -2, 0).reshape(u.shape[-2], -1)


def _rows(y, shape):
    *batch, L, D = shape
    return jnp.moveaxis(y.reshape(L, *batch, D), 0, -2)


def _transform(x, blocks, precision):
    size, kept = math.prod(block.shape[1] for block in blocks), len(blocks[0])
    g = _first(x, blocks[0], size, precision)
    for block in blocks[1:]:
        g = _twiddle(g, kept, size)
        size, kept = g.shape[2], len(block)
        parts = g.reshape(len(g), 2, kept, -1, g.shape[3])
        g = jnp.einsum("jqpb,gpbmc->gjqmc", _on_pairs(block), parts, precision=precision)
        g = g.reshape(-1, 2, *g.shape[3:])
    return g[:, :, 0]


def _inverse(g, factors, length, precision):
    g = g[:, :, None]
    kept = factors[0] // 2 + 1, *factors[1:]
    for i in range(len(factors) - 1, 0, -1):
        block = np.asarray(_on_pairs(_dft(factors[i])) / factors[i], g.dtype)
        parts = g.reshape(-1, factors[i], *g.shape[1:])
        g = jnp.einsum("jqpb,gjqmc->gpbmc", block, parts, precision=precision)
        g = g.reshape(len(g), 2, -1, g.shape[4])
        g = _twiddle(g, kept[i - 1], factors[i - 1] * g.shape[2], back=True)
    return _last(g, factors[0], length, precision)


def _first(x, block, size, precision):
    """The real sequence, of which only the rows that are there count, times the block."""
    steps = size // block.shape[1]
    rows = -(-len(x) // steps)
    x = jnp.pad(x, ((0, rows * steps - len(x)), (0, 0))).reshape(rows, steps, -1)
    return jnp.einsum("kap,abc->kpbc", block[:, :rows], x, precision=precision)


def _last(g, factor, length, precision):
    """The real part of the inverse, in which all but two of the kept frequencies stand for their conjugates too."""
    weight = np.where(2 * np.arange(len(g)) % factor == 0, 1, 2)
    rows = -(-length // g.shape[2])
    block = _dft(factor)[: len(g), :rows] * (weight / factor)[:, None, None]
    y = jnp.einsum("kap,kpbc->abc", np.asarray(block, g.dtype), g, precision=precision)
    return y.reshape(-1, g.shape[3])[:length]


def _on_pairs(block):
    """What a complex matrix does to pairs, as (row, re or im, re or im, column). Its transpose is what the conjugate
    transposed does."""
    re, im = block[..., 0], block[..., 1]
    xp = np if isinstance(block, np.ndarray) else jnp
    return xp.stack([xp.stack([re, -im], axis=1), xp.stack([im, re], axis=1)], axis=1)


def _twiddle(g, kept, size, *, back=False):
    """Frequency `k`, of the `kept` ones that were done last, times `w_size^(k b)` at step `b`."""
    angle = -2 * np.pi / size * (np.outer(np.arange(kept), np.arange(g.shape[2])) % size)
    re, im = (np.asarray(part(angle), g.dtype)[None, :, :, None] for part in (np.cos, np.sin))
    return _times(g.reshape(-1, kept, *g.shape[1:]), re, -im if back else im).reshape(g.shape)


def _times(g, re, im):
    """Pairs on the third axis from the end, times `re + i im`."""
    a, b = g[..., 0, :, :], g[..., 1, :, :]
    return jnp.stack([a * re - b * im, a * im + b * re], axis=-3)
