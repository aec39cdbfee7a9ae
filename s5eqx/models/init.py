"""Initial weights that depend on the whole model, above all on its depth.

An initialiser redraws the dense layers, the short convolutions and the embeddings. What a layer knows by
itself (eigenvalues, time steps, `B`, `C`, `D`, the norms) stays as the layer drew it.
"""

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from s5eqx._typing import Array, PRNGKeyArray, PyTree
from s5eqx.nn._random import truncated_normal
from s5eqx.nn.short_conv import ShortConv


class AbstractInit(eqx.Module):
    """Redraws the weights of a model that has `embedding`, `positions` and `backbone.blocks`."""

    @abc.abstractmethod
    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        """The same model with new weights."""


class DefaultInit(AbstractInit):
    """Dense layers and embeddings `N(0, std^2)`, biases zero; the last dense layer of each residual branch
    (`out_proj` and `fc2`) `N(0, std^2 / (2 num_layers))`.

    Source: GPT-2, as used for the published Hyena models.
    """

    std: float = 0.02

    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        normal = lambda std: lambda key, like: std * jr.normal(key, like.shape, like.dtype)
        return _redraw(
            model,
            key,
            embedding=normal(self.std),
            dense=normal(self.std),
            branch_end=normal(self.std / math.sqrt(2 * len(model.backbone.blocks))),
            taps=lambda key, like: like,
        )
