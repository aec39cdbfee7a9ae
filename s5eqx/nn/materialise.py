"""Banks of filters replaced by what they compute."""

import equinox as eqx
import jax

from s5eqx._typing import PyTree
from s5eqx.nn.bank import AbstractFilterBank, MixerBank
from s5eqx.nn.stack import Stack


def materialise(model: PyTree) -> PyTree:
    """The same model with every bank's operators as they are now: implicit filters become explicit kernels.

    A step of an implicit filter evaluates its network at every tap, to use each once. Materialise a trained model
    before it generates or steps; gradients no longer reach the network.
    """
    is_node = lambda node: isinstance(node, AbstractFilterBank | Stack)
    return jax.tree.map(_explicit, model, is_leaf=is_node)


def _explicit(node):
    if isinstance(node, Stack):
        return eqx.tree_at(lambda stack: stack.layer, node, eqx.filter_vmap(materialise)(node.layer))
    if isinstance(node, AbstractFilterBank) and not isinstance(node, MixerBank):
        return MixerBank(_operators(node))
    return node


@eqx.filter_jit
def _operators(bank):
    return bank.operators()
