"""A random order of n things that is computed for one of them at a time."""

import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Int, PRNGKeyArray, checked
from s5eqx.data.hashing import mix

ROUNDS = 6


@checked
def permuted(index: Int[Array, ""], size: int, *, key: PRNGKeyArray) -> Int[Array, ""]:
    """Where a random permutation of `range(size)`, chosen by `key`, sends `index`.

    A Feistel network permutes the next power of four; indices that leave the range walk on until they
    come back (cycle walking), which keeps the map one to one. No table is made and nothing is sorted, so
    a training step can look up its place in a shuffled epoch.

    Source: J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = jnp.uint32((1 << bits) - 1)
    low, high = jr.key_data(key)[0], jr.key_data(key)[-1]
    salts = mix(low ^ mix(high + jnp.arange(ROUNDS, dtype=jnp.uint32)))

    def network(x):
        left, right = x >> bits, x & mask
        for salt in salts:
            left, right = right, left ^ (mix(right ^ salt) & mask)
        return (left << bits) | right

    inside = jax.lax.while_loop(lambda x: x >= size, network, network(index.astype(jnp.uint32)))
    return inside.astype(jnp.int32)
