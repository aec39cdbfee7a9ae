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
from s5eqx.train.rules import AbstractRule, AdamW
from s5eqx.train.schedule import AbstractSchedule

_FROZEN = "buffers"


class Group(NamedTuple):
    """The settings of one group: peak learning rate a step, weight decay, and what it does with its gradient."""

    lr: float
    weight_decay: float
    rule: AbstractRule = AdamW()


class AbstractGroups(abc.ABC):
    """A policy: named groups, and a label for every trainable leaf of a model."""

    schedule: AbstractSchedule
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
        """The rule of each group, after clipping the norm of the whole gradient if asked.

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
        # Only for groups that have leaves: optimisers of optax that take sums over a group fail without.
        used = set(jax.tree.leaves(labels))
        transforms: dict[Hashable, optax.GradientTransformation] = {
            name: group.rule(self.schedule(group.lr), group.weight_decay)
            for name, group in self.groups.items()
            if name in used
        }
        transforms[_FROZEN] = optax.set_to_zero()
        # As a function: optax would call the tree of labels itself, since a module is callable.
        optimiser = optax.partition(transforms, lambda _: labels)
        if self.clip_norm is not None:
            optimiser = optax.chain(optax.clip_by_global_norm(self.clip_norm), optimiser)
        return optax.GradientTransformation(optimiser.init, _with_standard_promotion(optimiser.update))

    def evaluated(self, params: PyTree, opt_state: PyTree) -> PyTree:
        """The parameters that are evaluated and saved: the average that `ScheduleFree` keeps where a group's rule is
        that, and `params` themselves elsewhere.

        `opt_state` is a state of `optimiser`, whether a wrapper such as `optax.apply_if_finite` holds it or not.
        """
        is_average = lambda node: isinstance(node, optax.contrib.ScheduleFreeState)
        for state in filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)):
            params = _with_standard_promotion(_averaged)(params, state)
        return params

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


def _averaged(params, state):
    """`params`, with the averages of the leaves that the state of one group holds."""
    is_absent = lambda z: z is None or isinstance(z, optax.MaskedNode)
    pick = lambda z, p, q: q if is_absent(z) else p
    held = jax.tree.map(lambda z, p: z if is_absent(z) else p, state.z, params, is_leaf=is_absent)
    averages = optax.contrib.schedule_free_eval_params(state, held)
    return jax.tree.map(pick, state.z, averages, params, is_leaf=is_absent)


@dataclasses.dataclass(frozen=True)
class DefaultGroups(AbstractGroups):
    """The library's groups: weight decay on matrices only, and none on any part of a recurrence.

    `recurrence` holds the leaves that the modules name in their `recurrence`; `vectors` the norms, biases
    and other vectors; `matrices` the rest, embeddings included. With a rule for them, the weights of dense
    layers (`eqx.nn.Linear`) that are no part of a recurrence leave `matrices` for a group `dense`. Only
    `matrices` and `dense` decay.

    **Arguments:**

    - `lr`: peak learning rate.
    - `schedule`: the shape of the learning rate, common to all groups.
    - `recurrence_lr`: peak learning rate of the recurrence; `None` for `lr`.
    - `weight_decay`: what a step takes off a weight, as a fraction of it, is this times the rate.
    - `rule`: what all groups do with their gradients, but `dense` where that has a rule of its own.
    - `clip_norm`: longest gradient that passes unscaled; `None` for no clipping.
    - `dense`: the rule of dense weights, such as `Muon()` or `Soap()`; `None` for no such group.
    - `dense_lr`: peak learning rate of `dense`; `None` for `lr`.
    """

    lr: float
    schedule: AbstractSchedule
    recurrence_lr: float | None = None
    weight_decay: float = 0.1
    rule: AbstractRule = dataclasses.field(default=AdamW())
    clip_norm: float | None = None
    dense: AbstractRule | None = None
    dense_lr: float | None = None

    def __post_init__(self):
        if self.dense is None and self.dense_lr is not None:
            raise ValueError(
                f"dense_lr is the rate of the group of dense weights, which is there with a rule for them alone; got "
                f"dense_lr={self.dense_lr} without `dense`. Give the rule too, such as `dense=AdamW()`."
            )

    @property
    def groups(self) -> dict[str, Group]:
        rate = lambda lr: self.lr if lr is None else lr
        groups = {
            "matrices": Group(self.lr, self.weight_decay, self.rule),
            "vectors": Group(self.lr, 0.0, self.rule),
            "recurrence": Group(rate(self.recurrence_lr), 0.0, self.rule),
        }
        if self.dense is not None:
            groups["dense"] = Group(rate(self.dense_lr), self.weight_decay, self.dense)
        return groups

    def labels(self, model: eqx.Module) -> PyTree[str]:
        def label(recurrent, dense, ndim):
            if recurrent:
                return "recurrence"
            if dense and self.dense is not None:
                return "dense"
            return "matrices" if ndim >= 2 else "vectors"

        params = trainable(model)
        return jax.tree.map(label, recurrence_mask(params), _dense_mask(params), _ndims(params))


def _dense_mask(params):
    """True at the weights of dense layers, False at all other leaves."""
    is_dense = lambda node: isinstance(node, eqx.nn.Linear)

    def mark(node):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_dense(node) and path[0].name == "weight", node)

    return jax.tree.map(mark, params, is_leaf=is_dense)


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
    rule: AbstractRule = dataclasses.field(default=AdamW())
    clip_norm: float | None = None

    @property
    def groups(self) -> dict[str, Group]:
        return {
            "rest": Group(self.lr, self.weight_decay, self.rule),
            "ssm": Group(self.ssm_lr, self.ssm_weight_decay, self.rule),
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
