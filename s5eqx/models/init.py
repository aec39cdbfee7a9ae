"""Initial weights that depend on the whole model, above all on its depth.

An initialiser redraws the embeddings and the dense layers. What a layer knows by itself (eigenvalues, time
steps, `B`, `C`, `D`, the taps of short convolutions, the norms) stays as the layer drew it.
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

Draw = Callable[[PRNGKeyArray, Array], Array]
"""New values for the array given, in its shape and dtype."""


class AbstractInit(eqx.Module):
    """Redraws the weights of a model that has `embedding`, `positions` and `backbone.blocks`."""

    @abc.abstractmethod
    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        """The same model with new weights."""


class DefaultInit(AbstractInit):
    """Embeddings `N(0, 1 / D)`; dense layers truncated normals of variance `1 / fan_in` with zero biases, and of
    `1 / (2 num_layers fan_in)` where they end a residual branch (`out_proj`, `fc2`).

    The scale follows the width, so that small and large models start alike, and the residual stream keeps its
    size however many branches add to it.
    """

    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        branches = 2 * len(model.backbone.blocks)
        return _redraw(model, key, branch_end=lambda key, weight: _fan_in(key, weight) / math.sqrt(branches))


class S5Init(AbstractInit):
    """As `DefaultInit`, but the dense layer that ends a residual branch is `N(0, 0.02^2 / (2 num_layers))`.

    Source: the `development` branch of the S5 code.
    """

    def __call__(self, model: PyTree, *, key: PRNGKeyArray) -> PyTree:
        return _redraw(model, key, branch_end=_normal(0.02 / math.sqrt(2 * len(model.backbone.blocks))))


def _normal(std: float) -> Draw:
    return lambda key, weight: std * jr.normal(key, weight.shape, weight.dtype)


def _fan_in(key: PRNGKeyArray, weight: Array) -> Array:
    return truncated_normal(key, weight.shape, 1 / weight.shape[1], weight.dtype)


def _redraw(model: PyTree, key: PRNGKeyArray, *, branch_end: Draw) -> PyTree:
    is_dense = lambda node: isinstance(node, eqx.nn.Linear)
    parts, structure = jtu.tree_flatten_with_path(model.backbone, is_leaf=is_dense)
    embedding_key, positions_key, *keys = jr.split(key, 2 + len(parts))
    embedding = _normal(1 / math.sqrt(model.embedding.shape[1]))
    new = []
    for (path, part), part_key in zip(parts, keys, strict=True):
        if is_dense(part):
            ends_branch = jtu.keystr(path).endswith((".out_proj", ".fc2"))
            weight = (branch_end if ends_branch else _fan_in)(part_key, part.weight)
            bias = jax.tree.map(jnp.zeros_like, part.bias)
            part = eqx.tree_at(lambda p: (p.weight, p.bias), part, (weight, bias), is_leaf=lambda leaf: leaf is None)
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
