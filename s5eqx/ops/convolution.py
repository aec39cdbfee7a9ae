"""The long causal convolution, by FFT."""

import jax.numpy as jnp
import numpy as np
import scipy.fft

from s5eqx._typing import Array, Float, checked


@checked
def causal_convolution(
    u: Float[Array, "*batch L D"], k: Float[Array, "K D"], past: Float[Array, "*batch M D"] | None = None
) -> Float[Array, "*batch L D"]:
    """`y[t] = sum_j k[j] u[t-j]` for each channel, in O(L log L).

    **Arguments:** `past`, what came before `u`, the latest last, and before that zeros; only zeros if not given.

    It is computed in the dtype of `k`, float32 at least, and comes back in that of `u`. A rounding error is relative
    to the largest entry of the channel, and may come from later steps: what an FFT computes is causal up to rounding,
    and an input that is not finite spoils all outputs of its channel.
    """
    u, k = jnp.asarray(u), jnp.asarray(k)
    dtype = np.promote_types(k.dtype, np.float32)
    before = 0 if past is None else past.shape[-2]
    inputs = u if past is None else jnp.concatenate([jnp.asarray(past).astype(u.dtype), u], axis=-2)
    length = inputs.shape[-2]
    k = k[:length]
    # What wraps round falls on the first len(k) - 1 outputs: those of the past, which nobody reads, or of a padding.
    shortest = max(length + max(len(k) - 1 - before, 0), 1)
    size = int(scipy.fft.next_fast_len(shortest, real=True))  # pyright: ignore[reportArgumentType]
    transform = lambda a: jnp.fft.rfft(a.astype(dtype), n=size, axis=-2)
    spectrum = transform(inputs)
    y = jnp.fft.irfft(spectrum * jnp.broadcast_to(transform(k), spectrum.shape), n=size, axis=-2)
    return y[..., before:length, :].astype(u.dtype)
