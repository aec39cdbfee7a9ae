"""A long convolution whose Fourier transforms are learned."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from s5eqx import ops
from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractMixer, refuse_reset
from s5eqx.nn.long_conv_init import AbstractKernelInit, RandomKernel


class ButterflyConv(AbstractMixer):
    """A long convolution in which trained matrices have taken the place of the Fourier transform:

        y = iDFT(T u * S kernel) + skip u

    `T` and `S` are products of dense blocks and fixed twiddle factors, as in `ops.butterfly_conv`, over the `2
    max_length` steps or a few more of a padded sequence. They start as the Fourier transform, and `y` as the causal
    convolution with `kernel`. The inverse is not trained.

    It is no causal mixer: once a block has moved, every output hears every input.

    Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646), section
    4.2, the learned butterfly.

    Differs from the reference: half of the frequencies are kept, so that the output is real whatever the blocks are.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("kernel", "skip", "blocks", "kernel_blocks")
    resets: ClassVar[bool] = False

    kernel: Float[Array, "K D"]
    skip: Float[Array, " D"]
    blocks: tuple[Float[Array, "_ _ 2"], ...]
    kernel_blocks: tuple[Float[Array, "_ _ 2"], ...]

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        block_size: int = 16,
        init: AbstractKernelInit = RandomKernel(),
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels, `D`.
        - `max_length`: the longest sequence and the length of the kernel, in steps.
        - `block_size`: rows of the largest block; larger blocks are fewer and have more parameters.
        - `init`: draws the kernel.
        """
        if width < 1 or max_length < 1:
            raise ValueError(f"width and max_length must be positive; got width={width}, max_length={max_length}.")
        if block_size < 2:
            raise ValueError(f"block_size counts the rows of a block and must be at least 2; got {block_size}.")
        dtype = jnp.result_type(float)
        self.kernel = init(1, width, max_length, dtype=dtype, key=key)[0].T
        self.skip = jnp.zeros(width, dtype)
        fourier = ops.dft_blocks(_sizes(2 * max_length, block_size), dtype)
        self.blocks = tuple(jnp.asarray(block) for block in fourier)
        self.kernel_blocks = tuple(jnp.asarray(block) for block in fourier)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        refuse_reset(self, reset)
        if len(x) > len(self.kernel):
            raise ValueError(
                f"A sequence must be no longer than max_length, {len(self.kernel)} steps; got {len(x)}. Build the "
                "layer with a larger max_length."
            )
        u = x.astype(self.skip.dtype)
        y = ops.butterfly_conv(u, self.kernel, self.blocks, self.kernel_blocks)
        return (y + self.skip[None] * u).astype(x.dtype)


def _sizes(period, block_size):
    """As few blocks of at most `block_size` rows as make a transform of `period` steps or more, and as small ones."""
    number = 1
    while block_size**number < period:
        number += 1
    size = int(np.ceil(period ** (1 / number) - 1e-9))
    others = (size,) * (number - 1)
    return -(-period // size ** (number - 1)), *others
