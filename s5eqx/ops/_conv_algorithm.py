"""How a long convolution is computed: one algorithm, one object."""

import abc

import equinox as eqx
import jax.numpy as jnp
import scipy.fft
from jax import lax

from s5eqx._typing import Array, Float, checked


class AbstractConvAlgorithm(eqx.Module):
    """A circular convolution of each channel, of a period that the algorithm may choose. It holds numbers, no arrays,
    and is hashable."""

    @abc.abstractmethod
    def __call__(
        self, u: Float[Array, "*batch L D"], k: Float[Array, "K D"], period: int
    ) -> Float[Array, "*batch L D"]:
        """The first `L` outputs, of a circular convolution whose period is `period` or more. `L` and `K` are at most
        `period`, and `u` and `k` of one dtype, which is that of the result."""


class FFT(AbstractConvAlgorithm):
    """`irfft(rfft(u) rfft(k))`, over the next period that an FFT likes."""

    def __call__(
        self, u: Float[Array, "*batch L D"], k: Float[Array, "K D"], period: int
    ) -> Float[Array, "*batch L D"]:
        size = int(scipy.fft.next_fast_len(period, real=True))  # pyright: ignore[reportArgumentType]
        spectrum = jnp.fft.rfft(u, n=size, axis=-2)
        kernel = jnp.broadcast_to(jnp.fft.rfft(k, n=size, axis=-2), spectrum.shape)
        return jnp.fft.irfft(spectrum * kernel, n=size, axis=-2)[..., : u.shape[-2], :]


class Chunked(AbstractConvAlgorithm):
    """Another algorithm on so many channels at a time, one group after the other. What it needs is bounded, but for
    inputs and outputs and one copy of each. A gradient computes each group again.

    Channels do not hear each other, so that groups of them cost no more work, which pieces of the length would.
    """

    algorithm: AbstractConvAlgorithm
    channels: int

    @checked
    def __init__(self, algorithm: AbstractConvAlgorithm, channels: int):
        if channels < 1:
            raise ValueError(f"channels counts those of a group and must be at least 1; got {channels}.")
        self.algorithm = algorithm
        self.channels = channels

    def __call__(
        self, u: Float[Array, "*batch L D"], k: Float[Array, "K D"], period: int
    ) -> Float[Array, "*batch L D"]:
        done = u.shape[-1] // self.channels * self.channels
        y = []
        one = eqx.filter_checkpoint(lambda u, k: self.algorithm(u, k, period))
        if done:
            groups = lambda a: jnp.moveaxis(a[..., :done].reshape(*a.shape[:-1], -1, self.channels), -2, 0)
            each = lax.map(lambda group: one(*group), (groups(u), groups(k)))
            y.append(jnp.moveaxis(each, 0, -2).reshape(*u.shape[:-1], done))
        if done < u.shape[-1]:
            y.append(one(u[..., done:], k[..., done:]))
        return y[0] if len(y) == 1 else jnp.concatenate(y, axis=-1)
