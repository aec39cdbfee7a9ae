"""The long causal convolution."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from s5eqx._typing import Array, Float, checked
from s5eqx.ops._conv_algorithm import FFT, AbstractConvAlgorithm

_algorithm: contextvars.ContextVar[AbstractConvAlgorithm | None] = contextvars.ContextVar("s5eqx_conv", default=None)


@checked
def causal_convolution(
    u: Float[Array, "*batch L D"],
    k: Float[Array, "K D"],
    past: Float[Array, "*batch M D"] | None = None,
    *,
    algorithm: AbstractConvAlgorithm | None = None,
) -> Float[Array, "*batch L D"]:
    """`y[t] = sum_j k[j] u[t-j]` for each channel, in O(L log L) by an FFT.

    **Arguments:**

    - `past`: what came before `u`, the latest last, and before that zeros; only zeros if not given.
    - `algorithm`: how it is computed; that of `use_convolution` if not given, and without one `FFT()`.

    It is computed in the dtype of `k`, float32 at least, and comes back in that of `u`. A rounding error is relative
    to the largest entry of the channel, and may come from later steps: what a transform computes is causal up to
    rounding, and an input that is not finite spoils all outputs of its channel.
    """
    u, k = jnp.asarray(u), jnp.asarray(k)
    if not u.size or not len(k):
        return jnp.zeros_like(u)
    dtype = np.promote_types(k.dtype, np.float32)
    before = 0 if past is None else past.shape[-2]
    inputs = u if past is None else jnp.concatenate([jnp.asarray(past).astype(u.dtype), u], axis=-2)
    length = inputs.shape[-2]
    k = k[:length]
    # What wraps round falls on the first len(k) - 1 outputs: those of the past, which nobody reads, or of a padding.
    period = max(length + max(len(k) - 1 - before, 0), 1)
    algorithm = algorithm or _algorithm.get() or FFT()
    y = algorithm(inputs.astype(dtype), k.astype(dtype), period)
    return y[..., before:, :].astype(u.dtype)


@contextlib.contextmanager
@checked
def use_convolution(algorithm: AbstractConvAlgorithm) -> Iterator[None]:
    """Computes every `causal_convolution` traced inside the `with` block, those in layers too, by `algorithm`.

    A jitted function called under another algorithm is compiled anew, never served from the cache.
    """
    token = _algorithm.set(algorithm)
    try:
        with set_xla_metadata(s5eqx_convolution=repr(algorithm)):  # what makes the choice part of jit's cache key
            yield
    finally:
        _algorithm.reset(token)
