"""Hashes of token sequences, and a set of them to look up on the device.

A hash has 64 bits, kept as two `uint32` because JAX has no 64-bit integers by default.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from s5eqx._typing import Array, Bool, Int, checked


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Scrambles 32 bits one to one. Every bit of `x` reaches every bit of the result.

    Source: the finaliser "lowbias32" of Chris Wellons' hash-prospector.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@checked
def hash_tokens(tokens: Int[Array, " L"]) -> UInt32[Array, " 2"]:
    """A 64-bit hash of a sequence: two sums over t of scrambled (t, token) pairs, with two salts.

    A sum, unlike a chain, has no order of evaluation: long sequences hash in parallel.
    """
    place = mix(jnp.arange(tokens.shape[0], dtype=jnp.uint32))
    salts = jnp.array([[0x9E3779B9], [0x7F4A7C15]], dtype=jnp.uint32)
    words = mix((tokens.astype(jnp.uint32) ^ place)[None, :] + salts)
    return mix(jnp.sum(words * (2 * place + 1)[None, :], axis=1, dtype=jnp.uint32))


class HashSet(eqx.Module):
    """A fixed set of 64-bit hashes, sorted, searched by bisection."""

    table: UInt32[np.ndarray, "N 2"]

    def __init__(self, hashes: UInt32[np.ndarray, "N 2"]):
        self.table = np.asarray(hashes)[np.lexsort((hashes[:, 1], hashes[:, 0]))]

    @checked
    def contains(self, hash: UInt32[Array, " 2"]) -> Bool[Array, ""]:
        """Whether `hash` is in the set."""
        table, size = jnp.asarray(self.table), self.table.shape[0]

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) // 2
            major, minor = table[middle]
            below = (major < hash[0]) | ((major == hash[0]) & (minor < hash[1]))
            return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

        ends = jnp.int32(0), jnp.int32(size - 1)
        place, _ = jax.lax.fori_loop(0, size.bit_length(), halve, ends)
        return jnp.all(table[place] == hash)
