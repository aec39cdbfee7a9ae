"""Parameter groups: which leaves decay, and which learn at a rate of their own.

A policy asks the modules which leaves are which, so that a renamed field or a new layer cannot fall
silently into the wrong group. It builds an ordinary optax transformation for the model's trainable leaves:

    optimiser = policy.optimiser(model)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import equinox as eqx
import jax
import optax

from s5eqx._typing import Array, Float, Int, PyTree
from s5eqx.nn import S5, ImplicitFilter, Stack, buffer_mask, recurrence_mask
from s5eqx.train._leaves import trainable
from s5eqx.train.schedule import AbstractSchedule

_FROZEN = "buffers"


class Group(NamedTuple):
    """The settings of one group: peak learning rate a step, and weight decay."""

    lr: float
    weight_decay: float


class AbstractGroups(abc.ABC):
    """A policy: named groups, and a label for every trainable leaf of a model."""

    schedule: AbstractSchedule
    b1: float
    b2: float
    clip_norm: float | None

    @property
    @abc.abstractmethod
    def groups(self) -> dict[str, Group]:
        """The groups by name."""

    @abc.abstractmethod
    def labels(self, model: eqx.Module) -> PyTree[str]:
        """The name of its group at each trainable leaf of `model`; other leaves are `None`.

        `optimiser` does not ask for the names of buffers: they get a group that never moves.
        """

    def optimiser(self, model: eqx.Module) -> optax.GradientTransformation:
        """AdamW for each group, after clipping the norm of the whole gradient if asked.

        Complex leaves are refused: JAX gives the conjugate of their descent direction and optax does not
        turn it round.
        """
        params = trainable(model)
        labels = jax.tree.map(lambda frozen, name: _FROZEN if frozen else name, buffer_mask(params), self.labels(model))
        for path, leaf in jax.tree.leaves_with_path(params):
            if jax.numpy.iscomplexobj(leaf):
                raise ValueError(
                    f"trainable leaves must be real, but {jax.tree_util.keystr(path)} is {leaf.dtype}: "
                    f"store its real and imaginary parts"
                )
        transforms: dict[Hashable, optax.GradientTransformation] = {
            name: optax.adamw(self.schedule(group.lr), self.b1, self.b2, weight_decay=group.weight_decay)
            for name, group in self.groups.items()
        }
        transforms[_FROZEN] = optax.set_to_zero()
        # As a function: optax would call the tree of labels itself, since a module is callable.
        optimiser = optax.partition(transforms, lambda _: labels)
        if self.clip_norm is not None:
            optimiser = optax.chain(optax.clip_by_global_norm(self.clip_norm), optimiser)
        return optax.GradientTransformation(optimiser.init, _with_standard_promotion(optimiser.update))

    def learning_rates(self, step: Int[Array, ""] | int) -> dict[str, Float[Array, ""] | float]:
        """The rate of each group at a step, counted from 0."""
        rate = _with_standard_promotion(lambda peak: self.schedule(peak)(step))
        return {name: rate(group.lr) for name, group in self.groups.items()}


def _with_standard_promotion(function: Callable) -> Callable:
    """optax multiplies counts by rates, which JAX refuses where it is set to strict promotion."""

    @functools.wraps(function)
    def promoted(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return promoted


@dataclasses.dataclass(frozen=True)
class DefaultGroups(AbstractGroups):
    """The library's groups: weight decay on matrices only, and none on any part of a recurrence.

    `recurrence` holds the leaves that the modules name in their `recurrence`; `vectors` the norms, biases
    and other vectors; `matrices` the rest, embeddings included. Only `matrices` decays.

    **Arguments:**

    - `lr`: peak learning rate.
    - `schedule`: the shape of the learning rate, common to all groups.
    - `recurrence_lr`: peak learning rate of the recurrence; `None` for `lr`.
    - `weight_decay`: what a step takes off a weight, as a fraction of it, is this times the rate.
    - `b1`, `b2`: decay rates of AdamW's moments.
    - `clip_norm`: longest gradient that passes unscaled; `None` for no clipping.
    """

    lr: float
    schedule: AbstractSchedule
    recurrence_lr: float | None = None
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float | None = None

    @property
    def groups(self) -> dict[str, Group]:
        recurrence_lr = self.lr if self.recurrence_lr is None else self.recurrence_lr
        return {
            "matrices": Group(self.lr, self.weight_decay),
            "vectors": Group(self.lr, 0.0),
            "recurrence": Group(recurrence_lr, 0.0),
        }

    def labels(self, model: eqx.Module) -> PyTree[str]:
        def label(recurrent, ndim):
            if recurrent:
                return "recurrence"
            return "matrices" if ndim >= 2 else "vectors"

        params = trainable(model)
        return jax.tree.map(label, recurrence_mask(params), _ndims(params))


def _ndims(params, stacks=0):
    """The number of axes of each leaf, without those of the stacks it is in."""
    is_stack = lambda node: isinstance(node, Stack)

    def ndims(node):
        if is_stack(node):
            return eqx.tree_at(lambda stack: stack.layer, node, _ndims(node.layer, stacks + 1))
        return node.ndim - stacks

    return jax.tree.map(ndims, params, is_leaf=is_stack)


@dataclasses.dataclass(frozen=True)
class PublishedGroups(AbstractGroups):
    """The groups of the S5 branch: `B` and `Lambda` of the S5 layers or the networks of implicit filters, and all the
    rest.

    `ssm` holds exactly `B`, `Lambda_re` and `Lambda_im` of S5, `layers` and `freq` of `ImplicitFilter`. All the rest
    decays: `C`, `D`, `log_Delta`, biases, norms and embeddings too.

    Source: lindermanlab/S5, branch `development`. The arguments are those of `DefaultGroups`.
    """

    lr: float
    ssm_lr: float
    schedule: AbstractSchedule
    weight_decay: float = 0.1
    ssm_weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float | None = None

    @property
    def groups(self) -> dict[str, Group]:
        return {
            "rest": Group(self.lr, self.weight_decay),
            "ssm": Group(self.ssm_lr, self.ssm_weight_decay),
        }

    def labels(self, model: eqx.Module) -> PyTree[str]:
        def is_known(node):
            return isinstance(node, S5 | ImplicitFilter)

        def label(node):
            if not is_known(node):
                return "rest"
            ssm = ("B", "Lambda_re", "Lambda_im") if isinstance(node, S5) else ("layers", "freq")
            return jax.tree_util.tree_map_with_path(lambda path, _: "ssm" if path[0].name in ssm else "rest", node)

        return jax.tree.map(label, trainable(model), is_leaf=is_known)
