"""From continuous to discrete time: `dx/dt = Lambda x + B u` to `x[t] = Lambda_bar x[t-1] + B_bar u[t]`."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from s5eqx._typing import Array, Complex, Float, checked


class AbstractDiscretisation(eqx.Module):
    """A rule for the step from one sample to the next."""

    @abc.abstractmethod
    def __call__(
        self, Lambda: Complex[Array, " P"], Delta: Float[Array, " P"] | Float[Array, "L P"]
    ) -> tuple[Complex[Array, "*L P"], Complex[Array, "*L P"]]:
        """`Lambda_bar` and `gain`, of the shape of `Delta`; `B_bar` is `gain[:, None] * B`.

        **Arguments:** the eigenvalues in units of 1 / input interval; the time step `Delta` in units of the
        input interval, one for each state, or one for each step and state.
        """


class ZOH(AbstractDiscretisation):
    """Zero-order hold, exact for an input that is constant over a step. With `z = Lambda Delta`,

        Lambda_bar = exp(z),   gain = (exp(z) - 1) / Lambda = Delta (exp(z) - 1) / z.

    Source: Smith et al., "S5" (arXiv 2208.04933), equation 6.

    Differs from the reference: value and gradient are right for `Lambda -> 0` too, where `gain -> Delta`.
    """

    @checked
    def __call__(
        self, Lambda: Complex[Array, " P"], Delta: Float[Array, " P"] | Float[Array, "L P"]
    ) -> tuple[Complex[Array, "*L P"], Complex[Array, "*L P"]]:
        z = _scale(Delta, Lambda)
        return jnp.exp(z), _scale(Delta, _expm1_over(z))


class Bilinear(AbstractDiscretisation):
    """The bilinear (Tustin) rule. With `z = Lambda Delta`,

        Lambda_bar = (1 + z/2) / (1 - z/2),   gain = Delta / (1 - z/2).

    Source: Smith et al., "S5" (arXiv 2208.04933); the `main` branch of its code.
    """

    @checked
    def __call__(
        self, Lambda: Complex[Array, " P"], Delta: Float[Array, " P"] | Float[Array, "L P"]
    ) -> tuple[Complex[Array, "*L P"], Complex[Array, "*L P"]]:
        half = _scale(0.5 * Delta, Lambda)
        return (1 + half) / (1 - half), _scale(Delta, 1 / (1 - half))


def _scale(Delta, z):
    """`Delta * z` by its parts: inside a loop over steps XLA moves this out, but not a cast to complex."""
    z = jnp.broadcast_to(z, Delta.shape)
    return lax.complex(Delta * z.real, Delta * z.imag)


def _expm1_over(z):
    """`(exp(z) - 1) / z`. Near 0 the quotient's gradient cancels, so there it is the Taylor polynomial."""
    near = jnp.abs(z) < 0.1
    small = jnp.where(near, z, 0)
    series = jnp.ones_like(z)
    for k in range(11, 1, -1):  # 1 + z/2 (1 + z/3 (1 + ... z/11)): exact in float64 where |z| < 0.1
        series = 1 + small / k * series
    large = jnp.where(near, 1, z)
    return jnp.where(near, series, jnp.expm1(large) / large)
