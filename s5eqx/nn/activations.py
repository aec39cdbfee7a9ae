"""What follows the state-space layer: a GELU, or a GELU with a gate. They act on the last axis.

Source: Smith et al., "S5" (arXiv 2208.04933), appendix; names as in its code. With `g = gelu(y)`, exact,

    Gelu       g
    HalfGLU1   g * sigmoid(W2 g + b2)
    HalfGLU2   y * sigmoid(W2 g + b2)
    FullGLU    (W1 g + b1) * sigmoid(W2 g + b2)

`GLU` is the gate alone, without a GELU, as the S4D layers have it.

Differs from the reference: the weights start as Equinox draws them, until a model's `init` redraws them.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.nn.linear import linear


class Gelu(eqx.Module):
    """The exact GELU, `y Phi(y)` with the normal distribution function `Phi`."""

    @checked
    def __call__(self, y: Float[Array, "*rows D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*rows D"]:
        return _gelu(y)


class HalfGLU1(eqx.Module):
    """`g * sigmoid(W2 g + b2)` with `g = gelu(y)`."""

    out2: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.out2 = eqx.nn.Linear(width, width, key=key)

    @checked
    def __call__(self, y: Float[Array, "*rows D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*rows D"]:
        g = _gelu(y)
        return g * jax.nn.sigmoid(linear(self.out2, g))


class HalfGLU2(eqx.Module):
    """`y * sigmoid(W2 g + b2)` with `g = gelu(y)`: the GELU acts inside the gate only."""

    out2: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.out2 = eqx.nn.Linear(width, width, key=key)

    @checked
    def __call__(self, y: Float[Array, "*rows D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*rows D"]:
        return y * jax.nn.sigmoid(linear(self.out2, _gelu(y)))


class FullGLU(eqx.Module):
    """`(W1 g + b1) * sigmoid(W2 g + b2)` with `g = gelu(y)`."""

    out1: eqx.nn.Linear
    out2: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        self.out1 = eqx.nn.Linear(width, width, key=key1)
        self.out2 = eqx.nn.Linear(width, width, key=key2)

    @checked
    def __call__(self, y: Float[Array, "*rows D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*rows D"]:
        g = _gelu(y)
        return linear(self.out1, g) * jax.nn.sigmoid(linear(self.out2, g))


class GLU(eqx.Module):
    """`a * sigmoid(b)` with `[a, b] = W y + c`, from `in_width` to `out_width` channels."""

    linear: eqx.nn.Linear

    def __init__(self, in_width: int, out_width: int, *, key: PRNGKeyArray):
        self.linear = eqx.nn.Linear(in_width, 2 * out_width, key=key)

    @checked
    def __call__(self, y: Float[Array, "*rows D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*rows D_out"]:
        return jax.nn.glu(linear(self.linear, y))


def _gelu(y):
    return y * _Phi(y)


@jax.custom_jvp
def _Phi(y):
    """The normal distribution function. With its derivative: jax 0.12 has none for `erfc` inside `jax.shard_map`."""
    return 0.5 * jax.lax.erfc(-math.sqrt(0.5) * y)


_Phi.defjvps(lambda dy, Phi, y: dy * (jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)))
