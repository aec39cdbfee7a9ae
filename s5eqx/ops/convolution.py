"""The long causal convolution, by FFT."""

import jax.numpy as jnp
import numpy as np
import scipy.fft

from s5eqx._typing import Array, Float, checked


@checked
def causal_convolution(u: Float[Array, "*batch L D"], k: Float[Array, "K D"]) -> Float[Array, "*batch L D"]:
    """`y[t] = sum_j k[j] u[t-j]` for each channel, in O(L log L), with zeros before the start.

    It is computed in the dtype of `k`, float32 at least, and comes back in that of `u`. A rounding error is relative
    to the largest entry of the channel, and may come from later steps: what an FFT computes is causal up to rounding.
    """
    u, k = jnp.asarray(u), jnp.asarray(k)
    dtype = np.promote_types(k.dtype, np.float32)
    length = u.shape[-2]
    k = k[:length]
    size = int(scipy.fft.next_fast_len(max(length + len(k) - 1, 1), real=True))  # pyright: ignore[reportArgumentType]
    transform = lambda a: jnp.fft.rfft(a.astype(dtype), n=size, axis=-2)
    spectrum = transform(u)
    y = jnp.fft.irfft(spectrum * jnp.broadcast_to(transform(k), spectrum.shape), n=size, axis=-2)
    return y[..., :length, :].astype(u.dtype)
