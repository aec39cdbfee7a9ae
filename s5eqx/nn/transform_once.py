"""Transform Once: a field to its spectrum, all that is learned within a band of it, and back."""

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.nn._grid import check_band, check_field, check_sizes
from s5eqx.nn._mixer import AbstractLayer
from s5eqx.nn._random import truncated_normal
from s5eqx.nn.activations import Gelu
from s5eqx.nn.linear import linear, times_transposed
from s5eqx.nn.spectrum import AbstractBasis
from s5eqx.nn.tree import cast

GELU_ENERGY = 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))
"""The mean of `gelu(z)^2` for a standard normal z."""


class TransformOnce(AbstractLayer):
    """An operator from fields to fields that acts on the coefficients of a few modes. With T the first `modes` rows of
    a basis, along every axis of the grid, and all kept coefficients of all channels as one vector,

        h_0 = W_0 T u + b_0
        h_i = (h_{i-1} + W_i gelu(h_{i-1}) + b_i) / sqrt2        for each of num_layers - 2
        y   = T' (W gelu(h) + b + V T u)

    `V`, the linear part of the operator, starts at 0. The layer runs on any grid that has these modes. The output has
    the dtype of the parameters, float32 at least.

    The weights start such that the output field has the mean square of the input field, about 1, though only a band of
    it is seen. The coefficients of the band have `kept_energy` of the square of the field, and the output has all of
    its own within the band, so that with weights of variance

        W_0  1 / (kept_energy channels)        W_i  1 / (g hidden)        W  1 / (g hidden prod(modes))

    and g the mean of `gelu(z)^2`, every entry of every h has variance 1, whatever the grid and the band.

    Source: Poli, Massaroli et al., "Transform Once: Efficient Operator Learning in Frequency Domain" (arXiv
    2211.14453).

    Differs from the reference: the network between the transforms is dense in the modes, with residual layers and a
    linear part beside them; the band is that of the lowest frequencies; the basis is given for each axis, where the
    paper has the DCT for all.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = False

    layers: tuple[eqx.nn.Linear, ...]
    V: Float[Array, "out_band in_band"]
    bases: tuple[AbstractBasis, ...]
    modes: tuple[int, ...] = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, ...],
        modes: tuple[int, ...],
        bases: tuple[AbstractBasis, ...],
        *,
        hidden: int,
        num_layers: int = 4,
        kept_energy: float | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`, `out_channels`: numbers at a point of the input and of the output field.
        - `grid`: samples along each of 1 to 3 axes of the fields to be trained on; others may come later.
        - `modes`: coefficients kept along each axis.
        - `bases`: of each axis, `Fourier()` where the field is periodic and `Cosine()` between walls.
        - `hidden`: units of each layer but the last.
        - `num_layers`: dense layers, at least 2.
        - `kept_energy`: the share of the mean square of an input field that lies in the band, above 0 and at most 1.
          None for that of white noise, `prod(modes) / prod(grid)`, as in the paper; for smooth fields it is nearly 1.
        """
        check_sizes(in_channels=in_channels, out_channels=out_channels, hidden=hidden)
        check_band(modes, grid, room=grid)
        if len(bases) != len(grid):
            raise ValueError(f"bases must be one for each axis of grid={grid}; got {len(bases)}.")
        if num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, one into the hidden units and one out; got {num_layers}.")
        band = math.prod(modes)
        kept_energy = band / math.prod(grid) if kept_energy is None else kept_energy
        if not 0 < kept_energy <= 1:
            raise ValueError(f"kept_energy is a share above 0 and at most 1; got {kept_energy}.")
        first_key, last_key, *keys = jr.split(key, num_layers)
        fan_in = GELU_ENERGY * hidden
        self.layers = (
            _dense(in_channels * band, hidden, 1 / (kept_energy * in_channels), first_key),
            *(_dense(hidden, hidden, 1 / fan_in, key) for key in keys),
            _dense(hidden, out_channels * band, 1 / (fan_in * band), last_key),
        )
        self.V = jnp.zeros((out_channels * band, in_channels * band), self.layers[0].weight.dtype)
        self.bases, self.modes = tuple(bases), tuple(modes)
        self.in_channels, self.out_channels = in_channels, out_channels

    @checked
    def __call__(self, x: Float[Array, "*grid D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*grid D_out"]:
        grid = check_field(x, len(self.modes), self.in_channels)
        check_band(self.modes, grid, room=grid)
        for axis, (basis, modes) in enumerate(zip(self.bases, self.modes, strict=True)):
            x = basis.analyse(x, modes, axis=axis)
        y = self._learned(x.reshape(-1)).reshape(*self.modes, self.out_channels)
        for axis, (basis, length) in enumerate(zip(self.bases, grid, strict=True)):
            y = basis.synthesise(y, length, axis=axis)
        return y

    def _learned(self, band):
        """In the precision of the parameters, or in float32 where that is lower."""
        dtype = np.promote_types(self.V.dtype, np.float32)
        first, *middle, last = cast(self.layers, dtype)
        gelu = Gelu()
        band = band.astype(dtype)
        h = linear(first, band)
        for layer in middle:
            h = (h + linear(layer, gelu(h))) / math.sqrt(2)
        return linear(last, gelu(h)) + times_transposed(band, self.V.astype(dtype))


def _dense(num_in, num_out, variance, key):
    """A dense layer with weights of that variance and no bias yet."""
    layer = eqx.nn.Linear(num_in, num_out, key=key)
    weight = truncated_normal(key, layer.weight.shape, variance, layer.weight.dtype)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, jnp.zeros_like(weight[:, 0])))
