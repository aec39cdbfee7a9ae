"""Where the eigenvalues and the input vector of a diagonal state-space model start, and how decay rates are stored.

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893).
With `N` real states, `P = N/2` complex ones and `n = 0 ... P-1`, the real part is -1/2 unless said, and the imaginary

    LinInit     pi n
    InvInit     (N / pi) (N / (2n + 1) - 1)
    Inv2Init    (N / pi) (N / (n + 1) - 1)
    QuadInit    (2n + 1)^2 / pi
    LegSInit    of the eigenvalues of the normal part of HiPPO-LegS, the negative half
    RealInit    0, with the real part -(n + 1)
    RandomInit  drawn from N(0, 1)
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike

from s5eqx._typing import Array, Complex, Float, PRNGKeyArray, checked
from s5eqx.nn.hippo import diagonalise

Eigenvalues = tuple[Float[Array, "S P"], Float[Array, "S P"]]


class AbstractAInit(eqx.Module):
    """Draws the eigenvalues `A` of `num_ssm` systems, `S`, of `state_size` real states each."""

    @abc.abstractmethod
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        """`(-Re A, Im A)`, in units of 1 / `Delta`."""


class LinInit(AbstractAInit):
    """`A_n = -1/2 + i pi n`."""

    @checked
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        return _repeat(num_ssm, math.pi * _n(state_size), dtype)


class InvInit(AbstractAInit):
    """`A_n = -1/2 + i (N / pi) (N / (2n + 1) - 1)`."""

    @checked
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        return _repeat(num_ssm, state_size / math.pi * (state_size / (2 * _n(state_size) + 1) - 1), dtype)


class Inv2Init(AbstractAInit):
    """`A_n = -1/2 + i (N / pi) (N / (n + 1) - 1)`."""

    @checked
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        return _repeat(num_ssm, state_size / math.pi * (state_size / (_n(state_size) + 1) - 1), dtype)


class QuadInit(AbstractAInit):
    """`A_n = -1/2 + i (2n + 1)^2 / pi`."""

    @checked
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        return _repeat(num_ssm, (2 * _n(state_size) + 1) ** 2 / math.pi, dtype)


class LegSInit(AbstractAInit):
    """The eigenvalues of the normal part of HiPPO-LegS with negative imaginary parts, which ascend."""

    @checked
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        Lambda, _, _ = diagonalise(state_size, 1, conj_sym=True)
        return _repeat(num_ssm, np.imag(Lambda), dtype)


class RealInit(AbstractAInit):
    """`A_n = -(n + 1)`."""

    @checked
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        return _repeat(num_ssm, 0 * _n(state_size), dtype, decay=_n(state_size) + 1)


class RandomInit(AbstractAInit):
    """`A_n = -1/2 + i N(0, 1)`, drawn for each system."""

    @checked
    def __call__(self, num_ssm: int, state_size: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> Eigenvalues:
        frequency = jr.normal(key, (num_ssm, state_size // 2), dtype)
        return jnp.full_like(frequency, 0.5), frequency


class AbstractBInit(eqx.Module):
    """Draws the input vectors `B` of the systems with eigenvalues `A`."""

    @abc.abstractmethod
    def __call__(self, A: Complex[Array, "S P"], *, key: PRNGKeyArray) -> Float[Array, "S P 2"]:
        """`B` as pairs (re, im)."""


class OnesBInit(AbstractBInit):
    """`B = 1`."""

    @checked
    def __call__(self, A: Complex[Array, "S P"], *, key: PRNGKeyArray) -> Float[Array, "S P 2"]:
        return jnp.stack([jnp.ones_like(jnp.real(A)), jnp.zeros_like(jnp.imag(A))], axis=-1)


class NormalBInit(AbstractBInit):
    """Complex normals, scaled so that `2 sum_n |B_n / A_n|^2 = 1`: the response to a constant input has unit size.

    Source: the S4D layer of the safari code.
    """

    @checked
    def __call__(self, A: Complex[Array, "S P"], *, key: PRNGKeyArray) -> Float[Array, "S P 2"]:
        B = jr.normal(key, (*A.shape, 2), jnp.real(A).dtype)
        gain = 2 * jnp.sum(jnp.sum(B**2, axis=-1) / jnp.abs(A) ** 2, axis=-1)
        return B / jnp.sqrt(gain)[:, None, None]


class AbstractRealPart(eqx.Module):
    """A positive function, by which the decay rate `-Re A` is stored as a number of either sign."""

    @abc.abstractmethod
    def __call__(self, stored: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The decay rate, positive."""

    @abc.abstractmethod
    def inverse(self, decay: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The number that is stored for it."""


class ExpReal(AbstractRealPart):
    """`-Re A = exp(stored)`."""

    @checked
    def __call__(self, stored: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.exp(stored)

    @checked
    def inverse(self, decay: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.log(decay)


class SoftplusReal(AbstractRealPart):
    """`-Re A = log(1 + exp(stored))`."""

    @checked
    def __call__(self, stored: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jax.nn.softplus(stored)

    @checked
    def inverse(self, decay: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return decay + jnp.log(-jnp.expm1(-decay))


def _n(state_size):
    return np.arange(state_size // 2, dtype=float)


def _repeat(num_ssm, frequency, dtype, decay: float | np.ndarray = 0.5):
    """The same eigenvalues for every system, computed in float64."""
    every = lambda part: jnp.asarray(np.broadcast_to(part, (num_ssm, *frequency.shape)), dtype)
    return every(decay), every(frequency)
