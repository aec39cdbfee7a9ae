"""Real orthonormal bases of fields on the unit interval: from samples to coefficients and back, along one axis.

With n samples at the points x_j and the basis functions phi_k,

    c_k = 1/n sum_j phi_k(x_j) u(x_j)        u(x_j) = sum_k c_k phi_k(x_j)

so that the squares of all n coefficients add up to the mean square of the samples (Parseval), and a function of few
modes has the same coefficients on every grid that is fine enough for them.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from s5eqx._typing import Array, Float, checked


class AbstractBasis(eqx.Module):
    """Functions phi_0, phi_1, ... in the order of their frequencies, orthonormal on every grid of equal spacing."""

    @abc.abstractmethod
    def analyse(self, x: Float[Array, "..."], modes: int, *, axis: int = -1) -> Float[Array, "..."]:
        """The first `modes` coefficients of the samples along `axis`, at least float32."""

    @abc.abstractmethod
    def synthesise(self, coefficients: Float[Array, "..."], length: int, *, axis: int = -1) -> Float[Array, "..."]:
        """`length` samples of the function that has these coefficients along `axis`."""

    @abc.abstractmethod
    def frequencies(self, modes: int) -> Float[np.ndarray, " modes"]:
        """How often each function goes up and down over the interval."""


class Fourier(AbstractBasis):
    """Periodic fields, sampled at `x_j = j / n`.

    `1, sqrt2 cos(2 pi x), sqrt2 sin(2 pi x), sqrt2 cos(4 pi x), ...`

    Of an even number of samples the last function is `cos(pi n x)`, 1 and -1 in turn, without the `sqrt2` that it has
    on finer grids: there alone a coefficient depends on the grid.
    """

    @checked
    def analyse(self, x: Float[Array, "..."], modes: int, *, axis: int = -1) -> Float[Array, "..."]:
        length = x.shape[axis]
        _check(modes, length)
        spectrum = jnp.fft.rfft(jnp.moveaxis(_wide(x), axis, -1), norm="forward")[..., : modes // 2 + 1]
        pairs = jnp.stack([spectrum.real, -spectrum.imag], axis=-1).reshape(*spectrum.shape[:-1], -1)
        kept = jnp.concatenate([pairs[..., :1], pairs[..., 2 : modes + 1]], axis=-1)  # no sine of frequency 0
        return jnp.moveaxis(_times(kept, self._scale(modes, length)), -1, axis)

    @checked
    def synthesise(self, coefficients: Float[Array, "..."], length: int, *, axis: int = -1) -> Float[Array, "..."]:
        modes = coefficients.shape[axis]
        _check(modes, length)
        c = _times(jnp.moveaxis(_wide(coefficients), axis, -1), 1 / self._scale(modes, length))
        nothing = jnp.zeros_like(c[..., :1])
        pairs = jnp.concatenate([c[..., :1], nothing, c[..., 1:], *([nothing] * (1 - modes % 2))], axis=-1)
        pairs = pairs.reshape(*c.shape[:-1], -1, 2)
        spectrum = lax.complex(pairs[..., 0], -pairs[..., 1])
        return jnp.moveaxis(jnp.fft.irfft(spectrum, length, norm="forward"), -1, axis)

    def frequencies(self, modes: int) -> Float[np.ndarray, " modes"]:
        return ((np.arange(modes) + 1) // 2).astype(float)

    def _scale(self, modes, length):
        """From the real and imaginary parts of the transform to coefficients."""
        scale = np.full(modes, math.sqrt(2))
        scale[0] = 1
        if modes == length and length % 2 == 0:
            scale[-1] = 1
        return scale


class Cosine(AbstractBasis):
    """Fields between walls that nothing passes, sampled in the middle of cells, at `x_j = (j + 1/2) / n`.

    `1, sqrt2 cos(pi x), sqrt2 cos(2 pi x), ...`, the basis of the DCT-II.
    """

    @checked
    def analyse(self, x: Float[Array, "..."], modes: int, *, axis: int = -1) -> Float[Array, "..."]:
        length = x.shape[axis]
        _check(modes, length)
        coefficients = jax.scipy.fft.dct(_wide(x), axis=axis, norm="ortho")
        return lax.slice_in_dim(coefficients, 0, modes, axis=axis) / math.sqrt(length)

    @checked
    def synthesise(self, coefficients: Float[Array, "..."], length: int, *, axis: int = -1) -> Float[Array, "..."]:
        modes = coefficients.shape[axis]
        _check(modes, length)
        widths = np.zeros((coefficients.ndim, 2), int)
        widths[axis, 1] = length - modes
        return jax.scipy.fft.idct(jnp.pad(_wide(coefficients), widths), axis=axis, norm="ortho") * math.sqrt(length)

    def frequencies(self, modes: int) -> Float[np.ndarray, " modes"]:
        return np.arange(modes) / 2


def _check(modes, length):
    if not 1 <= modes <= length:
        raise ValueError(
            f"modes must lie between 1 and the number of samples along the axis, {length}; got {modes}. Keep fewer, or "
            "take a finer grid."
        )


def _wide(x):
    x = jnp.asarray(x)
    return x.astype(np.promote_types(x.dtype, np.float32))


def _times(x, scale):
    return x * jnp.broadcast_to(jnp.asarray(scale, x.dtype), x.shape)
