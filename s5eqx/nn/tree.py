"""Which leaves of a model parametrise a recurrence, and the compute dtype of all others."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike

from s5eqx._typing import PyTree
from s5eqx.nn._mixer import AbstractLayer
from s5eqx.nn.buffer import Buffer


def recurrence_mask(model: PyTree) -> PyTree[bool]:
    """True at the leaves that their own module names in `recurrence`, False at all others."""
    if jtu.all_leaves([model]):
        return False
    children, treedef = jtu.tree_flatten_with_path(model, is_leaf=lambda node: node is not model)
    names = model.recurrence if isinstance(model, AbstractLayer) else ()
    return jtu.tree_unflatten(
        treedef,
        [
            jax.tree.map(lambda _: True, child) if names and path[0].name in names else recurrence_mask(child)
            for path, child in children
        ],
    )


def buffer_mask(model: PyTree) -> PyTree[bool]:
    """True at the leaves that a `Buffer` holds, False at all others."""
    is_buffer = lambda node: isinstance(node, Buffer)
    return jax.tree.map(lambda node: jax.tree.map(lambda _: is_buffer(node), node), model, is_leaf=is_buffer)


def cast(model: PyTree, dtype: DTypeLike) -> PyTree:
    """Floating-point leaves in `dtype`, except those of the recurrences and of buffers, which keep theirs.

    This sets the compute dtype: `cast(model, jnp.bfloat16)` runs the dense maths in bfloat16, and the scans,
    their states, the norms' statistics and the logits in float32.
    """
    return jax.tree.map(
        lambda leaf, recurrent, buffer: leaf.astype(dtype) if _is_float(leaf) and not (recurrent or buffer) else leaf,
        model,
        recurrence_mask(model),
        buffer_mask(model),
    )


def _is_float(leaf):
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
