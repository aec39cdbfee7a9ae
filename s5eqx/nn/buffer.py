"""Arrays that a model needs and does not train."""

import equinox as eqx
from jax import lax

from s5eqx._typing import Array, Float


class Buffer(eqx.Module):
    """An array that no gradient reaches, that no optimiser moves or decays, and that `cast` leaves alone.

    Call it for the array.
    """

    array: Float[Array, "..."]

    def __call__(self) -> Float[Array, "..."]:
        return lax.stop_gradient(self.array)
