"""Majority: give the token that fills more than half of a sequence."""

import dataclasses
import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractTokenTask, below, some_places


@dataclasses.dataclass(frozen=True)
class Majority(AbstractTokenTask):
    """Sequences such as `0 6 6 6 4 5 6`, to be continued by `6`.

    One token stands in `length // 2 + 1` places, drawn among all; the others are uniform among the other tokens. The
    answer alone counts, in training too. To repeat the last token is right a little more than half of the time.

    Source: the Hyena paper (arXiv 2302.10866), section 4.1, which gives one example and no code: how the sequences are
    drawn is this library's choice.

    **Arguments:** those of every synthetic task, and

    - `vocab_size`: V, at least 2.
    - `length`: tokens shown, at least 3.
    """

    vocab_size: int = 10
    length: int = 20

    answer_length = 1

    def __post_init__(self):
        if self.vocab_size < 2:
            raise ValueError(
                f"a majority is one of several tokens: vocab_size must be at least 2, got {self.vocab_size}"
            )
        if self.length < 3:
            raise ValueError(f"a majority needs a minority: length must be at least 3 tokens, got {self.length}")
        self.check_sizes()

    @property
    def sequence_length(self) -> int:
        return self.length

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.vocab_size)))

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        bits = jr.bits(key, (2 * self.length + 1,), dtype=jnp.uint32)
        answer = below(self.vocab_size, bits[-1])
        others = (answer + 1 + below(self.vocab_size - 1, bits[: self.length])) % self.vocab_size
        inputs = jnp.where(some_places(self.length // 2 + 1, bits[self.length : -1]), answer, others)
        return {"inputs": inputs, "targets": jnp.concatenate([inputs[1:], answer[None]])}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return self.asked()

    def num_distinct(self) -> int:
        V, L = self.vocab_size, self.length
        return V * math.comb(L, L // 2 + 1) * (V - 1) ** (L - L // 2 - 1)
