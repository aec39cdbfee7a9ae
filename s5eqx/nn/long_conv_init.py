"""How the kernels of a long convolution are drawn, and how they are smoothed.

Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646), and its code.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from s5eqx._typing import Array, Float, PRNGKeyArray, checked


class AbstractKernelInit(eqx.Module):
    """Draws the kernels of a long convolution."""

    @abc.abstractmethod
    def __call__(
        self, channels: int, width: int, max_length: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> Float[Array, "c D K"]:
        """`channels` kernels of `max_length` taps for each of `width` channels."""


class RandomKernel(AbstractKernelInit):
    """Normals of standard deviation 0.002."""

    @checked
    def __call__(
        self, channels: int, width: int, max_length: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> Float[Array, "c D K"]:
        return 0.002 * jr.normal(key, (channels, width, max_length), dtype)


class GeometricDecay(AbstractKernelInit):
    """Normals of standard deviation `0.02 exp(-(j / K) floor(D/2)^(h/D))` at tap `j` of channel `h`: the later the
    channel, the shorter its memory."""

    @checked
    def __call__(
        self, channels: int, width: int, max_length: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> Float[Array, "c D K"]:
        rate = float(width // 2) ** (np.arange(width) / width)
        envelope = 0.02 * np.exp(-rate[:, None] * np.arange(max_length) / max_length)
        return jnp.asarray(envelope, dtype)[None] * jr.normal(key, (channels, width, max_length), dtype)


class AbstractSmooth(eqx.Module):
    """Smooths kernels along their taps."""

    window: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, kernel: Float[Array, "c D K"]) -> Float[Array, "c D K"]:
        """The smooth kernels."""


class SmoothTime(AbstractSmooth):
    """The mean of the `window` taps around each; zeros beyond the ends count, so the ends shrink."""

    window: int = eqx.field(static=True)

    def __init__(self, window: int):
        """**Arguments:** `window`, in taps, odd."""
        self.window = _check_odd(window)

    @checked
    def __call__(self, kernel: Float[Array, "c D K"]) -> Float[Array, "c D K"]:
        return _correlate(kernel, np.full(self.window, 1 / self.window))


class SmoothFrequency(AbstractSmooth):
    """Convolves the kernels' half spectrum, zero beyond its ends, with `exp(-i^2/2)` at `|i| <= window // 2`. That sums
    to more than one: the kernels grow."""

    window: int = eqx.field(static=True)

    def __init__(self, window: int):
        """**Arguments:** `window`, in frequencies, odd."""
        self.window = _check_odd(window)

    @checked
    def __call__(self, kernel: Float[Array, "c D K"]) -> Float[Array, "c D K"]:
        taps = np.exp(-0.5 * (np.arange(self.window) - self.window // 2) ** 2)
        spectrum = jnp.fft.rfft(kernel)
        spectrum = lax.complex(_correlate(spectrum.real, taps), _correlate(spectrum.imag, taps))
        return jnp.fft.irfft(spectrum, n=kernel.shape[-1])


def _check_odd(window):
    if window < 1 or window % 2 == 0:
        raise ValueError(f"A smoothing window is centred on a tap and must be odd and positive; got {window}.")
    return window


def _correlate(a, taps):
    padded = jnp.pad(a, ((0, 0), (0, 0), (len(taps) // 2,) * 2))
    total = jnp.zeros_like(a)
    for i, tap in enumerate(taps):
        total += float(tap) * padded[..., i : i + a.shape[-1]]
    return total
