"""One residual branch for images and videos."""

import equinox as eqx
import jax.numpy as jnp

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.nn._check import check_rate, check_width
from s5eqx.nn._random import split
from s5eqx.nn.mlp import MLP
from s5eqx.nn.norm import layer_norm
from s5eqx.nn.residual import dropped
from s5eqx.nn.s4nd import S4ND


class GridResidual(eqx.Module):
    """`x + drop(layer(norm(x)))` on a grid. The norm is over the channels of each point.

    Source: the residual blocks of S4ND (arXiv 2210.06583).
    """

    norm: eqx.nn.LayerNorm
    layer: S4ND | MLP
    dropout: eqx.nn.Dropout
    tie_dropout: bool = eqx.field(static=True)

    @checked
    def __init__(self, width: int, layer: S4ND | MLP, *, dropout: float = 0.0, tie_dropout: bool = False):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `layer`: of this width. An `MLP` acts at each point on its own.
        - `dropout`: the probability to drop an entry of the branch.
        - `tie_dropout`: drop a channel at all points or at none.
        """
        num_axes = 1 if isinstance(layer, MLP) else layer.num_axes
        self.norm = eqx.nn.LayerNorm(width)
        self.layer = check_width(layer, width, jnp.result_type(float), "layer", num_axes=num_axes)
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.tie_dropout = tie_dropout

    @checked
    def __call__(
        self,
        x: Float[Array, "*grid D"],
        *,
        rate: float | int | tuple[float | int, ...] = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*grid D"]:
        """**Arguments:** `rate` as for `S4ND`."""
        layer_key, dropout_key = split(key, 2)
        h = layer_norm(self.norm, x)
        if isinstance(self.layer, MLP):
            h = self.layer(h.reshape(-1, h.shape[-1]), key=layer_key).reshape(h.shape)
        else:
            h = self.layer(h, rate=rate, key=layer_key)
        return x + dropped(self.dropout, h, tied=self.tie_dropout, key=dropout_key)
