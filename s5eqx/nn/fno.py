"""A layer of the Fourier neural operator: a learned filter of the low frequencies beside a pointwise layer."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.nn._grid import check_band, check_field, check_sizes
from s5eqx.nn._mixer import AbstractLayer
from s5eqx.nn.activations import Gelu
from s5eqx.nn.linear import linear
from s5eqx.nn.tree import cast


class FNOBlock(AbstractLayer):
    """`activation(W x + b + irfftn(R rfftn(x)))`, with a complex matrix R for each frequency that is kept and 0 for all
    others. It runs on any grid that has these frequencies.

    Along the last axis of the grid frequencies 0 to `modes - 1` are kept. Along the axes before it the negative ones
    count too, from `-modes` to `modes - 1`.

    `R` is stored as (re, im) pairs, uniform in [0, 1 / D^2) at the start. The output has the dtype of the parameters,
    float32 at least.

    Source: Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations" (arXiv 2010.08895).

    Differs from the reference: the matrices of all kept frequencies are one array; the exact GELU stands for the ReLU.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = False

    W: eqx.nn.Linear
    R: Float[Array, "*kept D D 2"]
    activation: Callable
    modes: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        grid: tuple[int, ...],
        modes: tuple[int, ...],
        *,
        activation: Callable = Gelu(),
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: D, the channels in and out.
        - `grid`: samples along each of 1 to 3 axes of the fields to be trained on; others may come later.
        - `modes`: the frequencies kept along each axis, those below this number.
        - `activation`: a module; `eqx.nn.Identity()` for none.
        """
        check_sizes(width=width)
        check_band(modes, grid, room=_room(grid))
        W_key, R_key = jr.split(key)
        self.W = eqx.nn.Linear(width, width, key=W_key)
        kept = (*(2 * m for m in modes[:-1]), modes[-1])
        self.R = jr.uniform(R_key, (*kept, width, width, 2), self.W.weight.dtype) / width**2
        self.activation, self.modes = activation, tuple(modes)

    @checked
    def __call__(self, x: Float[Array, "*grid D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*grid D"]:
        grid = check_field(x, len(self.modes), self.R.shape[-2])
        check_band(self.modes, grid, room=_room(grid))
        dtype = np.promote_types(self.R.dtype, np.float32)
        x, W, R = x.astype(dtype), cast(self.W, dtype), self.R.astype(dtype)
        axes = range(len(grid))
        low = self._keep(jnp.fft.rfftn(x, axes=axes))
        low = jnp.einsum("...i,...io->...o", low, lax.complex(R[..., 0], R[..., 1]))
        y = jnp.fft.irfftn(self._widen(low, grid), grid, axes=axes)
        return self.activation(linear(W, x) + y)

    def _keep(self, spectrum):
        """The kept frequencies; negative ones come last, as in the spectrum."""
        *others, m = self.modes
        spectrum = lax.slice_in_dim(spectrum, 0, m, axis=len(others))
        for axis, m in enumerate(others):
            ends = (0, m), (spectrum.shape[axis] - m, None)
            spectrum = jnp.concatenate([lax.slice_in_dim(spectrum, *end, axis=axis) for end in ends], axis=axis)
        return spectrum

    def _widen(self, low, grid):
        """The inverse, with zeros for the other frequencies."""
        *others, m = self.modes
        full = (*grid[:-1], grid[-1] // 2 + 1)
        pad = lambda a, axis, room: jnp.pad(a, [(0, room if i == axis else 0) for i in range(a.ndim)])
        low = pad(low, len(others), full[-1] - m)
        for axis, m in enumerate(others):
            positive, negative = jnp.split(low, 2, axis=axis)
            low = jnp.concatenate([pad(positive, axis, full[axis] - 2 * m), negative], axis=axis)
        return low


def _room(grid):
    """The most that `modes` can be."""
    return (*(n // 2 for n in grid[:-1]), grid[-1] // 2 + 1)
