"""The Fourier neural operator: from fields to fields, on any grid."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.models._head import wide
from s5eqx.nn._grid import check_field, check_sizes
from s5eqx.nn.activations import Gelu
from s5eqx.nn.fno import FNOBlock


class FNO(eqx.Module):
    """`project2(gelu(project1(blocks(lift([u, coordinates])))))`, the dense layers at each point on its own.

    The last block has no activation.

    Source: Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations" (arXiv 2010.08895).

    Differs from the reference: fields that are not periodic are not padded; coordinates are those of the samples,
    where the reference has the ends of the interval at the first and the last.
    """

    lift: eqx.nn.Linear
    blocks: tuple[FNOBlock, ...]
    project1: eqx.nn.Linear
    project2: eqx.nn.Linear
    offset: float = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, ...],
        modes: tuple[int, ...],
        *,
        width: int = 32,
        num_layers: int = 4,
        hidden: int = 128,
        offset: float = 0.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:** `grid` and `modes` are those of `FNOBlock`, and

        - `in_channels`, `out_channels`: numbers at a point of the input and of the output field.
        - `width`: D, the channels of the blocks.
        - `num_layers`: blocks.
        - `hidden`: channels between the two dense layers at the end.
        - `offset`: where a sample lies in its cell, as a part of the spacing: 0 at its beginning, 0.5 in its middle.
        """
        check_sizes(in_channels=in_channels, out_channels=out_channels, num_layers=num_layers, hidden=hidden)
        lift_key, key1, key2, *keys = jr.split(key, 3 + num_layers)
        *inner, last = keys
        self.blocks = (
            *(FNOBlock(width, grid, modes, key=key) for key in inner),
            FNOBlock(width, grid, modes, activation=eqx.nn.Identity(), key=last),
        )
        self.lift = eqx.nn.Linear(in_channels + len(grid), width, key=lift_key)
        self.project1 = eqx.nn.Linear(width, hidden, key=key1)
        self.project2 = eqx.nn.Linear(hidden, out_channels, key=key2)
        self.offset = offset

    @checked
    def __call__(self, x: Float[Array, "*grid D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*grid D_out"]:
        dtype = np.promote_types(self.lift.weight.dtype, np.float32)
        num_axes = len(self.blocks[0].modes)
        grid = check_field(x, num_axes, self.lift.weight.shape[1] - num_axes)
        places = jnp.stack(jnp.meshgrid(*((np.arange(n) + self.offset) / n for n in grid), indexing="ij"), axis=-1)
        h = wide(self.lift, jnp.concatenate([x.astype(dtype), places.astype(dtype)], axis=-1))
        for block in self.blocks:
            h = block(h)
        # Recomputed in the backward pass: it is as large as the widest array of the model.
        gelu = jax.checkpoint(Gelu())
        return wide(self.project2, gelu(wide(self.project1, h)))
