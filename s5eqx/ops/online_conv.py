"""The causal convolution of a sequence that is not known in advance: outputs step by step, in O(L log^2 L) in all.

`y[t] = sum_j k[j] u[t-j]` is due before `u[t+1]` is known, as when a model reads its own output. Time is an array of
slots. The slot of a step that is to come holds what has been added to its `y` so far, the slot of a step that is done
its `u`. After step `i`, counted from 1, a square tile takes the last `U` inputs, `U` the largest power of two that
divides `i`, to the next `U` slots. Each pair of an input and a later output lies in one tile, and a slot is complete,
but for `k[0] u[t]`, when its step comes.

There are two levels. Within a block of `BLOCK` steps, tiles are smaller than a block and are computed as sums of
products. That level runs inside one compiled loop, on the block's slots alone: a branch on `i` copies what it may write
to. Tiles of whole blocks are computed by FFT, between two such loops.

Source: Oncescu et al., "Flash Inference: Near Linear Time Inference for Long Convolution Sequence Models and Beyond"
(arXiv 2410.12982).
"""

import jax.numpy as jnp
from jax import lax

from s5eqx._typing import Array, Complex, Float, Int, checked

BLOCK = 64
"""Slots of a block: the size from which on an FFT is the faster tile, on CPU with 64 to 1,024 channels. The command
`python experiments/bench_generate.py` measures it."""


@checked
def tile_in_block(
    slots: Float[Array, "*batch K C"], kernel: Float[Array, "K C"], step: Int[Array, ""]
) -> Float[Array, "*batch K C"]:
    """The slots of a block after its step `step`, from 0, whose slot holds the input already.

    `K` is a power of two. The last step of a block leaves all as it is: then a tile of whole blocks is due. `step` is
    one for all sequences, and must not be mapped by `jax.vmap`, which would run the tiles of all sizes.
    """
    num_slots = slots.shape[-2]
    if num_slots & (num_slots - 1) or not num_slots:
        raise ValueError(f"The slots of a block must be a power of two; got {num_slots}.")
    done = step.astype(jnp.int32) + 1
    tiles = [_direct_tile(1 << q) for q in range(num_slots.bit_length() - 1)]
    exponent = lax.population_count((done & -done) - 1)
    return lax.switch(exponent, [*tiles, lambda slots, *_: slots], slots, kernel.astype(slots.dtype), done)


def _direct_tile(size):
    def tile(slots, kernel, done):
        inputs = lax.dynamic_slice_in_dim(slots, done - size, size, axis=-2)
        later = lax.dynamic_slice_in_dim(slots, done, size, axis=-2)
        for j in range(size):
            taps = jnp.broadcast_to(kernel[size - j : 2 * size - j], later.shape)
            later = later + taps * inputs[..., j : j + 1, :]
        return lax.dynamic_update_slice_in_dim(slots, later, done, axis=-2)

    return tile


@checked
def tile_spectrum(kernel: Float[Array, "C T"], size: int) -> Complex[Array, "C half"]:
    """What `tile_of_blocks` takes for tiles of `size` slots: `size + 1` frequencies of the first `2 size` taps."""
    if kernel.shape[-1] < 2 * size:
        raise ValueError(f"A tile of {size} slots takes {2 * size} taps; the kernel has {kernel.shape[-1]}.")
    return jnp.fft.rfft(kernel[:, : 2 * size])


@checked
def tile_of_blocks(
    slots: Float[Array, "*batch C T"], spectrum: Complex[Array, "C half"], done: Int[Array, ""]
) -> Float[Array, "*batch C T"]:
    """The slots after `done` steps, for `size` the largest power of two that divides `done`, with time on the last axis
    where an FFT wants it. At least `size` slots are left.

    A transform of `2 size` points is enough: what wraps round falls on outputs that nobody reads.
    """
    size = spectrum.shape[-1] - 1
    inputs = lax.dynamic_slice_in_dim(slots, done - size, size, axis=-1)
    product = jnp.fft.rfft(inputs, n=2 * size)
    product = product * jnp.broadcast_to(spectrum, product.shape)
    later = lax.dynamic_slice_in_dim(slots, done, size, axis=-1)
    later = later + jnp.fft.irfft(product, n=2 * size)[..., size:].astype(slots.dtype)
    return lax.dynamic_update_slice_in_dim(slots, later, done, axis=-1)
