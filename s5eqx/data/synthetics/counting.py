"""Counting: how often the last token occurs in a sequence."""

import dataclasses
import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractTokenTask, below


@dataclasses.dataclass(frozen=True)
class Counting(AbstractTokenTask):
    """Sequences such as `a b b b a c b`, to be continued by `4`: the number of times that the last token occurs, itself
    included.

    The count is uniform in 1, ..., `max_count`, and so are the places of the others among those before; all the rest
    are uniform among the other symbols. Half of the tokens are counts (`vocab_size // 2`, but no more than `length`),
    the rest are symbols. The answer alone counts, in training too. Chance is one over `max_count`, but how far back the
    symbol last occurred tells much: at the default sizes it is enough for one half.

    Source: the Hyena paper (arXiv 2302.10866), section 4.1, which gives one example and no code: how the sequences are
    drawn is this library's choice.

    **Arguments:** those of every synthetic task, and

    - `vocab_size`: V, at least 4 (two counts and two symbols).
    - `length`: tokens shown, at least 2.
    """

    vocab_size: int = 10
    length: int = 20

    answer_length = 1

    def __post_init__(self):
        if self.vocab_size < 4:
            raise ValueError(
                f"counting needs two counts and two symbols: vocab_size must be at least 4, got {self.vocab_size}"
            )
        if self.length < 2:
            raise ValueError(f"there must be something to count: length must be at least 2 tokens, got {self.length}")
        self.check_sizes()

    @property
    def max_count(self) -> int:
        return min(self.vocab_size // 2, self.length)

    @property
    def num_symbols(self) -> int:
        return self.vocab_size - self.max_count

    @property
    def sequence_length(self) -> int:
        return self.length

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The counts 1, 2, ..., then the symbols a, b, ..., z, a1, b1, ..."""
        symbols = (chr(ord("a") + i % 26) + (str(i // 26) if i >= 26 else "") for i in range(self.num_symbols))
        return (*map(str, range(1, self.max_count + 1)), *symbols)

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        L, S = self.length, self.num_symbols
        bits = jr.bits(key, (2 * L + 1,), dtype=jnp.uint32)
        symbol, before = below(S, bits[0]), below(self.max_count, bits[1])
        others = (symbol + 1 + below(S - 1, bits[2 : L + 1])) % S
        rank = jnp.argsort(jnp.argsort(bits[L + 2 :])).astype(jnp.int32)
        shown = jnp.concatenate([jnp.where(rank < before, symbol, others), symbol[None]])
        inputs = self.max_count + shown
        return {"inputs": inputs, "targets": jnp.concatenate([inputs[1:], before[None]])}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return self.asked()

    def num_distinct(self) -> int:
        L, S = self.length, self.num_symbols
        return S * sum(math.comb(L - 1, n) * (S - 1) ** (L - 1 - n) for n in range(self.max_count))
