"""Rotary positions."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from s5eqx._typing import Array, Float, Int, checked


class Rotary(eqx.Module):
    """Turns the pairs `i = 0 ... dim/2 - 1` of the first `dim` entries of each head by `position base^(-2i/dim)`.

    The product of two turned vectors depends on the difference of their positions alone.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864).
    """

    dim: int = eqx.field(static=True)
    base: float = eqx.field(static=True)
    interleaved: bool = eqx.field(static=True)

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False):
        """**Arguments:**

        - `dim`: how many entries of a head turn, an even number.
        - `base`: the wavelengths range up to `2 pi base` tokens.
        - `interleaved`: pair neighbours, as in the paper; else entry `i` with entry `i + dim/2`, as in GPT-NeoX.
        """
        if dim < 2 or dim % 2:
            raise ValueError(f"Rotary positions turn pairs: dim must be even and at least 2; got {dim}.")
        if not base > 0:
            raise ValueError(f"base must be positive; got {base}.")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved

    @checked
    def __call__(self, x: Float[Array, "*L H head_dim"], positions: Int[Array, "*L"]) -> Float[Array, "*L H head_dim"]:
        dtype = np.promote_types(x.dtype, np.float32)
        frequencies = jnp.asarray(self.base ** (-np.arange(0, self.dim, 2) / self.dim), dtype)
        frequencies = jnp.broadcast_to(frequencies, (*positions.shape, 1, self.dim // 2))
        angles = jnp.expand_dims(positions.astype(dtype), (-2, -1)) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        pairs, axis = ((self.dim // 2, 2), -1) if self.interleaved else ((2, self.dim // 2), -2)
        a, b = jnp.moveaxis(x[..., : self.dim].astype(dtype).reshape(*x.shape[:-1], *pairs), axis, 0)
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis).reshape(*x.shape[:-1], self.dim)
        return jnp.concatenate([turned.astype(x.dtype), x[..., self.dim :]], axis=-1)
