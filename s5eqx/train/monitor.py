"""Numbers that tell how a model is doing, computed when they are logged."""

import equinox as eqx
import jax
import jax.numpy as jnp

from s5eqx._typing import Array, Float
from s5eqx.nn import S5


def spectral_radius(model: eqx.Module) -> Float[Array, ""] | None:
    """The largest |Lambda_bar| over the model's S5 layers; `None` without any. Above 1 a state grows."""

    def is_s5(node):
        return isinstance(node, S5)

    layers = [node for node in jax.tree.leaves(model, is_leaf=is_s5) if is_s5(node)]
    if not layers:
        return None
    return jnp.max(jnp.stack([jnp.max(jnp.abs(layer.discretised()[0])) for layer in layers]))
