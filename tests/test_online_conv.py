"""The online convolution: inputs come one by one, and outputs are those of the whole sequence."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit
from jax import lax

from s5eqx import ops

BATCH, C, BLOCK = 3, 2, 8


@quick_jit
def one_block(slots, kernel, block):
    """Steps whose input is known only from the output before it."""

    def step(i, carry):
        slots, u, outputs = carry
        y = slots[:, i] + kernel[:1] * u
        slots = ops.tile_in_block(slots.at[:, i].set(u), kernel, i)
        return slots, jnp.cos(3 * y) + block[:, i], outputs.at[:, i].set(y)

    return lax.fori_loop(0, BLOCK, step, (slots, block[:, 0], jnp.zeros_like(slots)))


@quick_jit
def tile(slots, kernel, size, done):
    return ops.tile_of_blocks(slots, ops.tile_spectrum(kernel.T, size), done)


def test_outputs_are_those_of_the_whole(x64):
    """Every size of tile, against a loop over all pairs of steps."""
    rng, steps = np.random.default_rng(8), 8 * BLOCK
    kernel, noise = rng.standard_normal((steps, C)) / 4, rng.standard_normal((BATCH, steps, C))
    slots, ys, us = np.zeros((BATCH, C, steps)), [], []
    for done in range(0, steps, BLOCK):
        if done:
            slots = np.array(tile(slots, kernel, done & -done, np.asarray(done)))
        block = slots[..., done : done + BLOCK].swapaxes(1, 2)
        noise_here = noise[:, done : done + BLOCK]
        block, _, y = one_block(block, kernel[:BLOCK], noise_here)
        slots[..., done : done + BLOCK] = np.asarray(block).swapaxes(1, 2)
        us.append(block), ys.append(y)
    u, y = np.concatenate(us, axis=1), np.concatenate(ys, axis=1)
    expected = np.zeros_like(y)
    for t in range(steps):
        for j in range(t + 1):
            expected[:, t] += kernel[j] * u[:, t - j]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.smoke
def test_the_end_of_a_block_changes_nothing_in_it():
    slots = on_device(np.arange(BLOCK * C).reshape(BLOCK, C), np.float32)
    np.testing.assert_array_equal(quick_jit(ops.tile_in_block)(slots, slots, np.asarray(BLOCK - 1)), slots)


def test_bad_sizes():
    with pytest.raises(ValueError, match="power of two; got 6"):
        ops.tile_in_block(jnp.zeros((6, C)), jnp.zeros((6, C)), jnp.asarray(0))
    with pytest.raises(ValueError, match="takes 16 taps; the kernel has 8"):
        ops.tile_spectrum(jnp.zeros((C, 8)), 8)
