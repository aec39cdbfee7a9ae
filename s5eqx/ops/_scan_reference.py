"""The scan in plain JAX: a loop, which is the specification of every kernel, and its blocked form for accelerators.

Both take the canonical shapes of `_scan_primitives`: `a` (1 or B, 1 or L, P), `b` (B, L, P), `x0` (B, P) and `reset`
(1 or B, L), or (1, 0) for none. Float pairs carry a last axis of 2.
"""

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 256


def _as_complex(x: jax.Array) -> jax.Array:
    return lax.complex(x[..., 0], x[..., 1])


def _as_pairs(x: jax.Array) -> jax.Array:
    return jnp.stack([x.real, x.imag], axis=-1)


def _flags(reset: jax.Array, b: jax.Array) -> jax.Array:
    if reset.shape[1] != b.shape[1]:
        return jnp.zeros((*b.shape[:2], 1), bool)
    return jnp.broadcast_to(reset, b.shape[:2])[..., None]


def loop(a, b, x0, reset, *, reverse: bool, pairs: bool, backend: str = "jax") -> list[jax.Array]:
    """x[t] = a[t] x[t-1] + b[t], one step after the other; a reset selects b[t]."""
    if pairs:
        (x,) = loop(_as_complex(a), _as_complex(b), _as_complex(x0), reset, reverse=reverse, pairs=False)
        return [_as_pairs(x)]

    def step(x, inputs):
        a_t, b_t, reset_t = inputs
        x = jnp.where(reset_t, b_t, a_t * x + b_t)
        return x, x

    steps = tuple(jnp.swapaxes(z, 0, 1) for z in (jnp.broadcast_to(a, b.shape), b, _flags(reset, b)))
    _, x = lax.scan(step, x0, steps, reverse=reverse)
    return [jnp.swapaxes(x, 0, 1)]


def blocked(a, b, x0, reset, *, reverse: bool, pairs: bool, backend: str = "jax") -> list[jax.Array]:
    """The same, as an associative scan inside blocks and a loop over the blocks: parallel, and bounded in depth."""
    if pairs:
        (x,) = blocked(_as_complex(a), _as_complex(b), _as_complex(x0), reset, reverse=reverse, pairs=False)
        return [_as_pairs(x)]
    batch, length, _ = b.shape
    if b.size == 0:
        return [b]
    a = jnp.broadcast_to(a, b.shape)
    drop = _flags(reset, b)
    if reverse:
        a, b, drop = (jnp.flip(z, 1) for z in (a, b, drop))
    padding = -length % _BLOCK

    def split(z):  # (B, L, .) -> (blocks, B, block, .)
        z = jnp.pad(z, ((0, 0), (0, padding), (0, 0)))
        return jnp.moveaxis(z.reshape(batch, -1, _BLOCK, z.shape[-1]), 1, 0)

    def combine(early, late):
        (a1, b1, r1), (a2, b2, r2) = early, late
        return a1 * a2, jnp.where(r2, b2, a2 * b1 + b2), r1 | r2

    def block(x, inputs):
        products, sums, dropped = lax.associative_scan(combine, inputs, axis=1)
        states = jnp.where(dropped, sums, products * x[:, None] + sums)
        return states[:, -1], states

    _, x = lax.scan(block, x0, tuple(map(split, (a, b, drop))))
    x = jnp.moveaxis(x, 0, 1).reshape(batch, length + padding, -1)[:, :length]
    return [jnp.flip(x, 1) if reverse else x]
