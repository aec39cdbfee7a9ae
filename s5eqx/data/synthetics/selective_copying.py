"""Selective copying: repeat, in order, the few tokens that are scattered among noise."""

import dataclasses
import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractTokenTask, below, some_places, with_specials


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(AbstractTokenTask):
    """Sequences such as `. 3 . . 1 . 3 .  => => =>`, at whose last places `3 1 3` is to be said.

    `num_copied` places among `length` hold tokens, the others noise, `.`; then comes `=>`, once for each token. The
    model is not shown what it should have said. The answers alone count, in training too. Chance is one over
    `vocab_size - 2`.

    Source: Jing et al., "Gated Orthogonal Recurrent Units" (arXiv 1706.02761), as in the Mamba paper (arXiv
    2312.00752). The tokens are those of `AssocRecall`.

    **Arguments:** those of every synthetic task, and

    - `vocab_size`: V, at least 4 (two tokens to copy, `.` and `=>`).
    - `length`: tokens before the first `=>`, at least `num_copied`.
    - `num_copied`: tokens that are to be repeated.
    """

    vocab_size: int = 16
    length: int = 64
    num_copied: int = 4

    def __post_init__(self):
        if self.vocab_size < 4:
            raise ValueError(
                f"copying needs two plain tokens, '.' and '=>': vocab_size must be at least 4, got {self.vocab_size}"
            )
        if not 1 <= self.num_copied <= self.length:
            raise ValueError(
                f"num_copied must lie between 1 and length={self.length}, got {self.num_copied}; take longer sequences "
                f"or copy fewer tokens"
            )
        self.check_sizes()

    @property
    def answer_length(self) -> int:
        return self.num_copied

    @property
    def sequence_length(self) -> int:
        return self.length + self.num_copied

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return with_specials(self.vocab_size)

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        n = self.num_copied
        bits = jr.bits(key, (self.length + n,), dtype=jnp.uint32)
        tokens = 1 + below(self.vocab_size - 2, bits[:n])
        chosen = some_places(n, bits[n:])
        which = jnp.cumsum(chosen, dtype=jnp.int32) - 1
        shown = jnp.where(chosen, tokens[which], 0)
        inputs = jnp.concatenate([shown, jnp.full((n,), self.vocab_size - 1, jnp.int32)])
        return {"inputs": inputs, "targets": jnp.concatenate([inputs[1 : self.length + 1], tokens])}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return self.asked()

    def num_distinct(self) -> int:
        return math.comb(self.length, self.num_copied) * (self.vocab_size - 2) ** self.num_copied
