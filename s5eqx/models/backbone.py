"""A stack of blocks under a final norm."""

from typing import ClassVar

import equinox as eqx

from s5eqx._typing import Array, PyTree
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._random import split
from s5eqx.nn.block import Block
from s5eqx.nn.norm import layer_norm


class Backbone(AbstractComposedMixer):
    """`norm(block_n(... block_1(x)))`. The state is a tuple of the blocks' states."""

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    blocks: tuple[Block, ...]
    norm: eqx.nn.LayerNorm

    def __init__(self, width: int, blocks: tuple[Block, ...]):
        """**Arguments:** `blocks` of this `width`, the one that is applied first in front."""
        for i, block in enumerate(blocks):
            given = block.mlp.fc1.weight.shape[1]
            if given != width:
                raise ValueError(f"Every block must have the backbone's width {width}; block {i} has {given}.")
        self.blocks = tuple(blocks)
        self.norm = eqx.nn.LayerNorm(width)

    def init_state(self) -> PyTree[Array]:
        return tuple(block.init_state() for block in self.blocks)

    def forward(self, run, state, x, key):
        new_state = []
        for block, block_state, block_key in zip(self.blocks, state, split(key, len(self.blocks)), strict=True):
            block_state, x = run(block, block_state, x, block_key)
            new_state.append(block_state)
        return tuple(new_state), layer_norm(self.norm, x)
