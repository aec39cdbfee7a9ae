"""Integer powers that are right to the last bits of their dtype, without double precision."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from s5eqx._varying import varying_like


class _Double(NamedTuple):
    """A number as the unevaluated sum of two floats: twice the digits of its dtype.

    Every product below is of two halves of a number and therefore exact, so that it does not matter whether a compiler
    fuses it with the addition after it.
    """

    high: jax.Array
    low: jax.Array

    def __add__(self, other):
        high, error = _sum(self.high, other.high)
        return _ordered(high, error + (self.low + other.low))

    def __neg__(self):
        return _Double(-self.high, -self.low)

    def __mul__(self, other):
        high, error = _product(self.high, other.high)
        return _ordered(high, error + (self.high * other.low + self.low * other.high))


def _sum(x, y):
    """x + y and its rounding error."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


def _ordered(x, y):
    """The same for |x| > |y|."""
    total = x + y
    return _Double(total, y - (total - x))


def _product(x, y):
    """x y and its rounding error."""
    (x1, x2), (y1, y2) = _halves(x), _halves(y)
    middle, error = _sum(x1 * y2, x2 * y1)
    high, low = _ordered(x1 * y1, middle)
    return high, low + (error + x2 * y2)


def _halves(x):
    kind = jnp.finfo(x.dtype)
    first = lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=(kind.nmant - 1) // 2)
    return first, x - first


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(a: jax.Array, n: int) -> jax.Array:
    """a^n for n ≥ 0, elementwise, real or complex. Squaring in the dtype itself would lose n roundings."""
    if n == 0:
        return jnp.ones_like(a)
    parts = (a.real, a.imag) if jnp.iscomplexobj(a) else (a,)
    base = [_Double(x, varying_like(x, jnp.zeros_like(x))) for x in parts]
    # From the second highest bit of n down: square, and multiply where the bit is set.
    bits = jnp.array([digit == "1" for digit in f"{n:b}"[1:]], bool)

    def step(z, bit):
        squared = _multiply(z, z)
        return jax.tree.map(partial(jnp.where, bit), _multiply(squared, base), squared), None

    parts, _ = lax.scan(step, base, bits)
    parts = [z.high for z in parts]
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _multiply(x, y):
    if len(x) == 1:
        return [x[0] * y[0]]
    return [x[0] * y[0] + -(x[1] * y[1]), x[0] * y[1] + x[1] * y[0]]


@power.defjvp
def _power_jvp(n, primals, tangents):
    (a,), (da,) = primals, tangents
    slope = n * power(a, max(n - 1, 0))
    return power(a, n), slope * da
