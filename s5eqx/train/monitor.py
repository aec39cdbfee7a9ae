"""Numbers that tell how a model is doing, computed when they are logged."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp

from s5eqx._typing import Array, Bool, Float
from s5eqx.nn import S5, Stack
from s5eqx.train._leaves import trainable


def spectral_radius(model: eqx.Module) -> Float[Array, ""] | None:
    """The largest |Lambda_bar| over the model's S5 layers; `None` without any. Above 1 a state grows."""
    is_known = lambda node: isinstance(node, S5 | Stack)
    known = filter(is_known, jax.tree.leaves(model, is_leaf=is_known))
    radii = [
        jnp.abs(node.discretised()[0]) if isinstance(node, S5) else eqx.filter_vmap(spectral_radius)(node.layer)
        for node in known
    ]
    radii = [jnp.max(radius) for radius in radii if radius is not None]
    return jnp.max(jnp.stack(radii)) if radii else None


def all_finite(model: eqx.Module) -> Bool[Array, ""]:
    """Whether every trained weight is a finite number."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(trainable(model))]
    return jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)


def peak_memory() -> int | None:
    """The most bytes that a device of this process has held at once; a CPU holds all that the process does.

    `None` where the system does not say.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [held["peak_bytes_in_use"] for held in stats if "peak_bytes_in_use" in held]
    if peaks:
        return max(peaks)
    if sys.platform == "win32":
        return None
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
