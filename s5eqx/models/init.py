"""Initial weights that depend on the whole model, above all on its depth.

An initialiser draws the embeddings and redraws the dense layers. What a layer knows by itself (eigenvalues, time
steps, `B`, `C`, `D`, the taps of convolutions, the norms) stays as the layer drew it.
"""

import abc
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from s5eqx._typing import Array, Float, PRNGKeyArray, PyTree
from s5eqx.nn._random import truncated_normal


class AbstractInit(eqx.Module):
    """Draws weights of whole models. Dense layers whose path ends in one of `branch_ends` end a residual branch."""

    branch_ends: eqx.AbstractClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def table(self, key: PRNGKeyArray, table: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        """New values for embeddings, or for learned positions."""

    @abc.abstractmethod
    def dense(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"]) -> Float[Array, "D_out D"]:
        """New values for the weight of a dense layer."""

    @abc.abstractmethod
    def branch_end(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"], branches: int) -> Float[Array, "D_out D"]:
        """New values for the weight of a dense layer that ends one of so many residual branches."""

    def block(self, key: PRNGKeyArray, block: PyTree, branches: int) -> PyTree:
        """One part of a model with `branches` residual branches: its dense layers redrawn, with zero biases."""
        is_dense = lambda node: isinstance(node, eqx.nn.Linear)
        parts, structure = jtu.tree_flatten_with_path(block, is_leaf=is_dense)
        new = []
        for (path, part), part_key in zip(parts, jr.split(key, len(parts)), strict=True):
            if is_dense(part):
                ends_branch = jtu.keystr(path).endswith(self.branch_ends)
                weight = (
                    self.branch_end(part_key, part.weight, branches)
                    if ends_branch
                    else self.dense(part_key, part.weight)
                )
                bias = jax.tree.map(jnp.zeros_like, part.bias)
                part = eqx.tree_at(
                    lambda p: (p.weight, p.bias), part, (weight, bias), is_leaf=lambda leaf: leaf is None
                )
            new.append(part)
        return jtu.tree_unflatten(structure, new)


class DefaultInit(AbstractInit):
    """Embeddings `N(0, 1 / D)`; dense layers truncated normals of variance `1 / fan_in` with zero biases, and of
    `1 / (branches fan_in)` where they end one of the model's residual branches (two a layer in a `LanguageModel`).

    The scale follows the width, so that small and large models start alike, and the residual stream keeps its
    size however many branches add to it.
    """

    branch_ends: ClassVar[tuple[str, ...]] = (".out_proj", ".fc2", ".output_linear", ".output_linear.linear")

    def table(self, key: PRNGKeyArray, table: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        return _normal(key, table, 1 / math.sqrt(table.shape[1]))

    def dense(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"]) -> Float[Array, "D_out D"]:
        return truncated_normal(key, weight.shape, 1 / weight.shape[1], weight.dtype)

    def branch_end(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"], branches: int) -> Float[Array, "D_out D"]:
        return self.dense(key, weight) / math.sqrt(branches)


class S5Init(AbstractInit):
    """As `DefaultInit`, but the dense layer that ends a residual branch is `N(0, 0.02^2 / branches)`.

    Source: the `development` branch of the S5 code.
    """

    branch_ends: ClassVar[tuple[str, ...]] = (".out_proj", ".fc2")

    def table(self, key: PRNGKeyArray, table: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        return DefaultInit().table(key, table)

    def dense(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"]) -> Float[Array, "D_out D"]:
        return DefaultInit().dense(key, weight)

    def branch_end(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"], branches: int) -> Float[Array, "D_out D"]:
        return _normal(key, weight, 0.02 / math.sqrt(branches))


class GPT2Init(AbstractInit):
    """Embeddings and dense layers `N(0, std^2)` with zero biases, filter networks included; `N(0, std^2 / branches)`
    where they end a residual branch, as the dense layer inside a `GLU` does.

    Source: GPT-2, as in the language models of Hyena and H3 (arXiv 2302.10866, 2212.14052). As there, an
    `output_linear` without a gate, that of H3 and S4D, is not scaled by the depth.
    """

    branch_ends: ClassVar[tuple[str, ...]] = (".out_proj", ".fc2", ".output_linear.linear")

    std: float = 0.02
    """Standard deviation; the largest published H3 model has `sqrt(2 / (5 D))`."""

    def table(self, key: PRNGKeyArray, table: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        return _normal(key, table, self.std)

    def dense(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"]) -> Float[Array, "D_out D"]:
        return _normal(key, weight, self.std)

    def branch_end(self, key: PRNGKeyArray, weight: Float[Array, "D_out D"], branches: int) -> Float[Array, "D_out D"]:
        return _normal(key, weight, self.std / math.sqrt(branches))


def _normal(key, like, std):
    return std * jr.normal(key, like.shape, like.dtype)
