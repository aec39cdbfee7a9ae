"""A checksum of an array that does not depend on how the array is spread over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from s5eqx._typing import Array
from s5eqx.data.hashing import mix


def checksum(array: jax.Array) -> UInt32[Array, ""]:
    """The sum over i of `mix(bits[i] + i * odd)` modulo 2^32, where `bits` are the array's words in order of rows.

    `mix` is one to one, so that a change in one word is always seen; an exchange of two words escapes once in 2^32.
    Every device sums its own part in whatever order: in integers the result is the same.
    """
    bits = _words(array)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + index * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(mix(bits + place * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _words(array: jax.Array) -> UInt32[Array, "..."]:
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
