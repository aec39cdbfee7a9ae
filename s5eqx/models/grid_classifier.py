"""A classifier of images and videos, on grids of any resolution."""

from collections.abc import Callable

import equinox as eqx
import jax.random as jr

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.models._head import dense, wide
from s5eqx.models._parts import count_layers
from s5eqx.models.init import AbstractInit, DefaultInit
from s5eqx.models.pool import MeanPool
from s5eqx.nn._grid import check_field
from s5eqx.nn._random import split
from s5eqx.nn.grid_residual import GridResidual
from s5eqx.nn.linear import linear
from s5eqx.nn.mlp import MLP
from s5eqx.nn.norm import layer_norm
from s5eqx.nn.s4nd import S4ND


class GridClassifier(eqx.Module):
    """Logits of one image or video, at least float32:

        decoder(mean(norm(residual_n(... residual_1(encoder(x))))))

    with the mean over all points. A layer is a residual branch of its mixer, and one of an MLP where `mlp_width` is
    given. All parts act at any resolution; at another one than that of training, tell the `rate`.

    Source: the isotropic models of Nguyen et al., "S4ND" (arXiv 2210.06583).
    """

    encoder: eqx.nn.Linear
    residuals: tuple[GridResidual, ...]
    norm: eqx.nn.LayerNorm
    decoder: eqx.nn.Linear

    def __init__(
        self,
        num_features: int,
        width: int,
        num_classes: int,
        mixer: Callable[[PRNGKeyArray], S4ND] | tuple[S4ND, ...],
        *,
        num_layers: int | None = None,
        mlp_width: int | None = None,
        dropout: float = 0.0,
        tie_dropout: bool = False,
        init: AbstractInit = DefaultInit(),
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `num_features`: numbers at a point, such as 3 colours.
        - `width`: channels of the model, `D`.
        - `num_classes`: how many classes there are.
        - `mixer`: a factory `key -> mixer`, called once for each layer; or a tuple of built mixers.
        - `num_layers`: number of layers; may be left out for a tuple.
        - `mlp_width`: hidden channels of each layer's MLP; None goes without.
        - `dropout`: the probability to drop an entry of a branch.
        - `tie_dropout`: drop a channel at all points or at none.
        - `init`: redraws the dense layers.
        """
        if num_features < 1 or width < 1:
            raise ValueError(f"num_features and width must be positive; got {num_features} and {width}.")
        num_layers = count_layers(mixer, num_layers)
        encoder_key, mixer_key, mlp_key, decoder_key, init_key = jr.split(key, 5)
        mixers = mixer if isinstance(mixer, tuple) else tuple(map(mixer, jr.split(mixer_key, num_layers)))
        branches: list[S4ND | MLP] = []
        for layer, layer_key in zip(mixers, jr.split(mlp_key, num_layers), strict=True):
            branches += [layer] if mlp_width is None else [layer, MLP(width, mlp_width, key=layer_key)]
        in_key, out_key, *branch_keys = jr.split(init_key, 2 + len(branches))
        self.encoder = init.block(in_key, eqx.nn.Linear(num_features, width, key=encoder_key), 1)
        self.residuals = tuple(
            init.block(branch_key, GridResidual(width, branch, dropout=dropout, tie_dropout=tie_dropout), len(branches))
            for branch, branch_key in zip(branches, branch_keys, strict=True)
        )
        if len({layer.num_axes for layer in mixers}) > 1:
            raise ValueError(
                "All mixers must act on the same axes; got num_axes of "
                f"{', '.join(str(layer.num_axes) for layer in mixers)}. Build them with the same."
            )
        self.norm = eqx.nn.LayerNorm(width)
        self.decoder = init.block(out_key, dense(width, num_classes, "num_classes", decoder_key), 1)

    @checked
    def __call__(
        self,
        x: Float[Array, "*grid features"],
        *,
        rate: float | int | tuple[float | int, ...] = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " classes"]:
        """**Arguments:** `rate` as for `S4ND`."""
        first = self.residuals[0].layer
        assert isinstance(first, S4ND)
        check_field(x, first.num_axes, self.encoder.weight.shape[1])
        h = linear(self.encoder, x.astype(self.encoder.weight.dtype))
        for residual, residual_key in zip(self.residuals, split(key, len(self.residuals)), strict=True):
            h = residual(h, rate=rate, key=residual_key)
        h = layer_norm(self.norm, h)
        return wide(self.decoder, MeanPool()(h.reshape(-1, h.shape[-1])))
