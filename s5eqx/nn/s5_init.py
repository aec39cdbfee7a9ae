"""How the matrices of S5 are drawn."""

import abc
import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike

from s5eqx._typing import Array, Complex, Float, PRNGKeyArray, checked
from s5eqx.nn._random import truncated_normal


class AbstractCInit(eqx.Module):
    """Draws the output matrix `C` of S5."""

    @abc.abstractmethod
    def __call__(
        self, V: Complex[np.ndarray, "N P"], width: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> Float[Array, "D P 2"]:
        """`C` in the basis of the eigenvectors `V`, as pairs (re, im). `N` real states; `P` kept."""


class TruncatedNormal(AbstractCInit):
    """A complex matrix `(D, N)` of truncated normals with variance `1 / N` a part, times `V`."""

    @checked
    def __call__(
        self, V: Complex[np.ndarray, "N P"], width: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> Float[Array, "D P 2"]:
        return _in_eigenbasis(key, V, width, 1 / len(V), dtype)


class LecunNormal(AbstractCInit):
    """A complex matrix `(D, N)` of truncated normals with variance `1 / (N D)` a part, times `V`."""

    @checked
    def __call__(
        self, V: Complex[np.ndarray, "N P"], width: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> Float[Array, "D P 2"]:
        return _in_eigenbasis(key, V, width, 1 / (len(V) * width), dtype)


class ComplexNormal(AbstractCInit):
    """A complex matrix `(D, P)` of normals with variance 1/2 a part, used as it is.

    Differs from the reference: the reference stores this one as pairs of *complex* numbers, whose two updates
    cancel, so that its `C` never learns.
    """

    @checked
    def __call__(
        self, V: Complex[np.ndarray, "N P"], width: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> Float[Array, "D P 2"]:
        return math.sqrt(0.5) * jr.normal(key, (width, V.shape[1], 2), dtype)


def init_B(
    Vinv: Complex[np.ndarray, "P N"], width: int, *, dtype: DTypeLike, key: PRNGKeyArray
) -> Float[Array, "P D 2"]:
    """A real matrix `(N, D)` of truncated normals with variance `1 / N`, in the basis of the eigenvectors."""
    B = truncated_normal(key, (Vinv.shape[1], width), 1 / Vinv.shape[1], dtype)
    return jnp.stack([np.real(Vinv).astype(dtype) @ B, np.imag(Vinv).astype(dtype) @ B], axis=-1)


def _in_eigenbasis(key, V, width, variance, dtype):
    re, im = truncated_normal(key, (2, width, len(V)), variance, dtype)
    V_re, V_im = np.real(V).astype(dtype), np.imag(V).astype(dtype)
    return jnp.stack([re @ V_re - im @ V_im, re @ V_im + im @ V_re], axis=-1)
