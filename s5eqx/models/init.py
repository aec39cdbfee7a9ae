"""Initial weights that depend on the whole model, above all on its depth.

An initialiser redraws the embeddings, the dense layers and the short convolutions. What a layer knows by
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

Draw = Callable[[PRNGKeyArray, Array], Array]
"""New values for the array given, in its shape and dtype."""


class AbstractInit(eqx.Module):
    """Redraws the weights of a model that has `embedding`, `positions` and `backbone.blocks`."""

    @abc.abstractmethod
    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        """The same model with new weights."""


class DefaultInit(AbstractInit):
    """Embeddings and dense layers `N(0, std^2)` with zero biases; the dense layer that ends a residual branch
    (`out_proj`, `fc2`) `N(0, std^2 / (2 num_layers))`. Short convolutions stay as drawn.

    Source: GPT-2, as used for the published Hyena models.
    """

    std: float = 0.02

    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        return _redraw(
            model,
            key,
            embedding=_normal(self.std),
            dense=_normal(self.std),
            branch_end=_normal(self.std / math.sqrt(2 * len(model.backbone.blocks))),
            taps=lambda key, weight: weight,
        )


class S5Init(AbstractInit):
    """Embeddings `N(0, 1 / D)`; dense layers and taps truncated normals of variance `1 / fan_in` with zero
    biases; the dense layer that ends a residual branch (`out_proj`, `fc2`) `N(0, 0.02^2 / (2 num_layers))`.

    Source: the `development` branch of the S5 code.
    """

    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        return _redraw(
            model,
            key,
            embedding=_normal(1 / math.sqrt(model.embedding.shape[1])),
            dense=lambda key, weight: truncated_normal(key, weight.shape, 1 / weight.shape[1], weight.dtype),
            branch_end=_normal(0.02 / math.sqrt(2 * len(model.backbone.blocks))),
            taps=lambda key, weight: truncated_normal(key, weight.shape, 1 / weight.shape[0], weight.dtype),
        )


def _normal(std: float) -> Draw:
    return lambda key, weight: std * jr.normal(key, weight.shape, weight.dtype)


def _redraw(model: PyTree, key: PRNGKeyArray, *, embedding: Draw, dense: Draw, branch_end: Draw, taps: Draw) -> PyTree:
    is_part = lambda node: isinstance(node, eqx.nn.Linear | ShortConv)
    parts, structure = jtu.tree_flatten_with_path(model.backbone, is_leaf=is_part)
    embedding_key, positions_key, *keys = jr.split(key, 2 + len(parts))
    new = []
    for (path, part), part_key in zip(parts, keys, strict=True):
        if is_part(part):
            ends_branch = jtu.keystr(path).endswith((".out_proj", ".fc2"))
            draw = taps if isinstance(part, ShortConv) else branch_end if ends_branch else dense
            weights = (draw(part_key, part.weight), jax.tree.map(jnp.zeros_like, part.bias))
            part = eqx.tree_at(lambda p: (p.weight, p.bias), part, weights, is_leaf=lambda leaf: leaf is None)
        new.append(part)
    return eqx.tree_at(
        lambda m: (m.embedding, m.positions, m.backbone),
        model,
        (
            embedding(embedding_key, model.embedding),
            None if model.positions is None else embedding(positions_key, model.positions),
            jtu.tree_unflatten(structure, new),
        ),
        is_leaf=lambda leaf: leaf is None,
    )
