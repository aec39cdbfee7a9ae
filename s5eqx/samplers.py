"""How the next token is drawn from logits. Filters combine in the order in which a chain names them:

    sampler = Chain(Temperature(0.8), TopK(40), TopP(0.95))
    token = sampler(logits, key, t)

A logit of -inf is a token that is never drawn; one logit at least must be finite.
"""

import abc
import math
import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked


class AbstractSampler(eqx.Module):
    """Draws one token from logits."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, " V"], key: PRNGKeyArray, t: Int[Array, ""]) -> Int[Array, ""]:
        """The next token, an int32. `t` counts the tokens generated before it."""


class Greedy(AbstractSampler):
    """The most probable token; of equal ones the first."""

    @checked
    def __call__(self, logits: Float[Array, " V"], key: PRNGKeyArray, t: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.argmax(logits).astype(jnp.int32)


class AbstractFilter(AbstractSampler):
    """Changes the distribution and draws from it. Numbers in a filter are arrays: another value is no other program."""

    @abc.abstractmethod
    def filter(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        """New logits, at least float32. What is dropped becomes -inf; one token at least is kept."""

    @checked
    def __call__(self, logits: Float[Array, " V"], key: PRNGKeyArray, t: Int[Array, ""]) -> Int[Array, ""]:
        return jr.categorical(key, self.filter(logits)).astype(jnp.int32)


class Temperature(AbstractFilter):
    """Divides the logits by `temperature` after it has subtracted the largest. At 0 the first largest alone is kept."""

    temperature: Float[Array, ""]

    def __init__(self, temperature: float):
        """`temperature` is finite and at least 0: below 1 the draws keep closer to the most probable token."""
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, where 0 is greedy; got {temperature}.")
        self.temperature = _number(temperature)

    @checked
    def filter(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        logits = _below_largest(logits)
        temperature = jnp.asarray(self.temperature, logits.dtype)
        coldest = jnp.where(jnp.arange(len(logits)) == jnp.argmax(logits), logits, -jnp.inf)
        # A number out of this range, or its inverse, is 0 on the device, and then 0 / 0 or -inf * 0 is NaN.
        tiny = jnp.finfo(logits.dtype).tiny
        return jnp.where(temperature > 0, logits / jnp.clip(temperature, tiny, 1 / tiny), coldest)


class TopK(AbstractFilter):
    """Keeps the `k` most probable tokens, all where `k` is not less than V. Of equal ones the first are kept.

    Source: Fan et al. (arXiv 1805.04833).
    """

    k: int = eqx.field(static=True)

    def __init__(self, k: int):
        """`k` is the number of tokens to keep, at least 1. Each `k` is a program of its own."""
        if k < 1:
            raise ValueError(f"k must be at least 1, the number of tokens to keep; got {k}.")
        self.k = operator.index(k)

    @checked
    def filter(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        logits = _wide(logits)
        largest, tokens = jax.lax.top_k(logits, min(self.k, len(logits)))
        return jnp.full_like(logits, -jnp.inf).at[tokens].set(largest, unique_indices=True)


class TopP(AbstractFilter):
    """Keeps the nucleus: the smallest set of most probable tokens whose probabilities sum to at least `p`.

    The token that reaches `p` belongs to it. Of equal ones the first are kept. `p = 1` keeps all.

    Source: Holtzman et al. (arXiv 1904.09751).
    """

    p: Float[Array, ""]

    def __init__(self, p: float):
        """`p` is a probability above 0."""
        if not 0 < p <= 1:
            raise ValueError(f"p must lie in (0, 1], the probability of the tokens to keep together; got {p}.")
        self.p = _number(p)

    @checked
    def filter(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        logits, V = _wide(logits), len(logits)
        probs = jax.nn.softmax(logits)
        p = jnp.asarray(self.p, logits.dtype)
        spare = jnp.where(p < 1, 1 - p, -1)  # a probability that underflows to 0 does not fit in a spare 0
        # The sum of what is dropped, and not of what is kept, since rounding would lose a tail of small numbers.
        enough = lambda kept: jnp.sum(jnp.where(kept, 0, probs)) <= spare
        # Two searches in place of a sort and a running sum, which take several times as long where V is large. First
        # for the least probability kept: the bits of numbers that are not negative are ordered as the numbers.
        bits = jax.lax.bitcast_convert_type(probs, np.dtype(f"int{8 * logits.dtype.itemsize}"))
        least = _largest(lambda bound: enough(bits >= bound), bits.dtype, 8 * bits.dtype.itemsize - 1)
        # Then for how many can be cut from the end among its equals.
        token = jnp.arange(V)
        without = lambda cut: (bits > least) | ((bits == least) & (token < V - cut))
        cut = _largest(lambda cut: enough(without(cut)), token.dtype, V.bit_length())
        # For a p that 1 - p rounds away nothing would be left.
        return jnp.where(without(cut) | (token == jnp.argmax(logits)), logits, -jnp.inf)


class MinP(AbstractFilter):
    """Keeps the tokens whose probability is at least `min_p` times the largest. Equal ones share their fate.

    Source: Nguyen et al. (arXiv 2407.01082).
    """

    min_p: Float[Array, ""]

    def __init__(self, min_p: float):
        """`min_p` is a fraction: 0 keeps all tokens, 1 the most probable ones."""
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], a fraction of the largest probability; got {min_p}.")
        self.min_p = _number(min_p)

    @checked
    def filter(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        logits = _wide(logits)
        bound = jnp.log(jnp.asarray(self.min_p, logits.dtype))
        return jnp.where(_below_largest(logits) >= bound, logits, -jnp.inf)


class Chain(AbstractFilter):
    """One filter after the other: each sees what the one before it leaves. `Chain()` changes nothing."""

    filters: tuple[AbstractFilter, ...]

    def __init__(self, *filters: AbstractFilter):
        for item in filters:
            if not isinstance(item, AbstractFilter):
                raise ValueError(
                    f"Chain combines filters, such as `TopK(40)`; got {item!r}. `Temperature(0)` is the filter that "
                    "draws as `Greedy` does."
                )
        self.filters = filters

    @checked
    def filter(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        logits = _wide(logits)
        for item in self.filters:
            logits = item.filter(logits)
        return logits


def _number(value):
    # An array, so that jit traces it, of numpy, so that it keeps all digits until the precision of the logits is known.
    return np.asarray(value, np.float64)


def _wide(logits):
    return jnp.asarray(logits, np.promote_types(logits.dtype, np.float32))


def _below_largest(logits):
    logits = _wide(logits)
    return logits - jnp.max(logits)


def _largest(holds, dtype, bits):
    """The largest integer n of so many bits with `holds(n)`, or 0; where it holds for n, it must for all below."""

    def add(n, power):
        return jnp.where(holds(n + power), n + power, n), None

    powers = 2 ** np.arange(bits, dtype=dtype)[::-1]
    return jax.lax.scan(add, jnp.zeros((), dtype), powers)[0]
