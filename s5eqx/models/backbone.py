"""A stack of blocks under a final norm."""

from typing import Any, ClassVar

import equinox as eqx

from s5eqx._typing import Array, PyTree
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._random import split
from s5eqx.nn.block import Block
from s5eqx.nn.norm import layer_norm
from s5eqx.nn.stack import Stack


class Backbone(AbstractComposedMixer):
    """`norm(block_n(... block_1(x)))`. The state is a tuple of the blocks' states, or that of their `Stack`."""

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    blocks: tuple[Block, ...] | Stack
    norm: eqx.nn.LayerNorm
    remat: bool = eqx.field(static=True)

    def __init__(self, width: int, blocks: tuple[Block, ...] | Stack, *, remat: bool = False):
        """**Arguments:**

        - `width`: channels of every block, `D`.
        - `blocks`: the one that is applied first in front; a tuple of any, or a `Stack` of equal ones.
        - `remat`: keep what enters a block for the backward pass, and compute what is inside again.
        """
        different: tuple[Any, ...] = (blocks.layer,) if isinstance(blocks, Stack) else blocks
        for i, block in enumerate(different):
            given = block.mlp.fc1.in_features
            if given != width:
                raise ValueError(f"Every block must have the backbone's width {width}; block {i} has {given}.")
        self.blocks = blocks if isinstance(blocks, Stack) else tuple(blocks)
        self.norm = eqx.nn.LayerNorm(width)
        self.remat = remat

    def init_state(self) -> PyTree[Array]:
        if isinstance(self.blocks, Stack):
            return self.blocks.init_state()
        return tuple(block.init_state() for block in self.blocks)

    def forward(self, run, state, x, key):
        run = eqx.filter_checkpoint(run) if self.remat else run
        if isinstance(self.blocks, Stack):
            state, x = self.blocks.forward(run, state, x, key)
            return state, layer_norm(self.norm, x)
        new_state = []
        for block, block_state, block_key in zip(self.blocks, state, split(key, len(self.blocks)), strict=True):
            block_state, x = run(block, block_state, x, block_key)
            new_state.append(block_state)
        return tuple(new_state), layer_norm(self.norm, x)
