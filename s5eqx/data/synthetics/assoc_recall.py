"""Associative recall: after a list of key-value pairs, give the value of one of the keys."""

import dataclasses

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, Int, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractTokenTask, below, with_specials

ENOUGH = 2**53
"""Different examples beyond which nobody counts."""

MOST_KEYS = 8192
"""Different keys: an example holds as many numbers."""


@dataclasses.dataclass(frozen=True)
class AssocRecall(AbstractTokenTask):
    """Sequences such as `1 5  0 4  1 5  2 7  =>  0`, to be continued by `4`.

    An example has its own random map from keys to values (values may repeat). It shows as many pairs as fit into
    `length`, whose keys are drawn uniformly with replacement, then `=>`, then a query drawn uniformly among
    the keys that occurred, then its value. The tokens are the strings `0` to `V-3`, `.` and `=>`; their
    ids are their ranks in ASCII order (`.` is 0; the numbers sort as `0, 1, 10, 11, ..., 2, ...`;
    `=>` is V-1). The first half of the sorted numbers make keys, the rest are values.

    Training asks for the next token everywhere, the test for the last one, the value. Chance is one over
    the number of values.

    Source: the H3 paper (arXiv 2212.14052) and the data of HazyResearch/safari; keys of several tokens and `.` answers
    as in lindermanlab/S5.

    Differs from the reference: example i is a function of (seed, i), in place of a list drawn by one generator. A
    training set may hold an example twice, and one of the test has weight 0 in it.

    **Arguments:** those of every synthetic task, and

    - `vocab_size`: V, at least 4 (one key, one value, `.` and `=>`).
    - `length`: length of the list of pairs in tokens, at least that of a pair, `key_length + 1`. A sequence has
      `sequence_length` inputs.
    - `key_length`: tokens of a key.
    - `allow_dot`: draw the query among all keys, and answer `.` for one that did not occur.
    - `answer_only`: ask for the answer alone in training too.
    """

    vocab_size: int = 10
    length: int = 20
    _: dataclasses.KW_ONLY
    key_length: int = 1
    allow_dot: bool = False
    answer_only: bool = False

    answer_length = 1

    def __post_init__(self):
        if self.vocab_size < 4:
            raise ValueError(
                f"associative recall needs a key, a value, '.' and '=>': vocab_size must be at least 4, "
                f"got {self.vocab_size}"
            )
        if self.key_length < 1:
            raise ValueError(f"key_length must be at least 1 token, got {self.key_length}")
        if self.length < self.key_length + 1:
            raise ValueError(
                f"a list of pairs needs at least one pair: length must be at least {self.key_length + 1} tokens, "
                f"got {self.length}"
            )
        if self.num_maps > MOST_KEYS:
            raise ValueError(
                f"an example draws a value for every key, of which there must be at most {MOST_KEYS}; keys of "
                f"key_length={self.key_length} out of {self.num_keys} tokens are more. Take shorter keys or a smaller "
                f"vocab_size"
            )
        self.check_sizes()

    @property
    def num_keys(self) -> int:
        """How many tokens keys are made of."""
        return (self.vocab_size - 2) // 2

    @property
    def num_values(self) -> int:
        return self.vocab_size - 2 - self.num_keys

    @property
    def num_maps(self) -> int:
        """How many different keys there are."""
        return self.num_keys**self.key_length

    @property
    def num_pairs(self) -> int:
        return self.length // (self.key_length + 1)

    @property
    def sequence_length(self) -> int:
        """L, the number of input tokens: the pairs, `=>` and the query."""
        return self.num_pairs * (self.key_length + 1) + 1 + self.key_length

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return with_specials(self.vocab_size)

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        M, pairs = self.num_maps, self.num_pairs
        bits = jr.bits(key, (M + pairs + 1,), dtype=jnp.uint32)
        value_of = 1 + self.num_keys + below(self.num_values, bits[:M])
        keys = below(M, bits[M:-1])
        seen = jnp.zeros((M,), bool).at[keys].set(True)
        if self.allow_dot:
            query = below(M, bits[-1])
            answer = jnp.where(seen[query], value_of[query], 0)
        else:
            rank = jnp.cumsum(seen, dtype=jnp.int32)
            query = jnp.argmax(rank > below(rank[-1], bits[-1])).astype(jnp.int32)
            answer = value_of[query]
        shown = jnp.concatenate([self._spelled(keys), value_of[keys][:, None]], axis=1).reshape(-1)
        row = jnp.concatenate(
            [shown, jnp.array([self.vocab_size - 1], jnp.int32), self._spelled(query[None])[0], answer[None]]
        )
        return {"inputs": row[:-1], "targets": row[1:]}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return self.asked() if self.answer_only else np.ones(self.sequence_length, bool)

    def num_distinct(self) -> int | float:
        M, values = self.num_maps, self.num_values
        lists = {0: 1}  # number of different keys shown -> number of lists of pairs
        for _ in range(self.num_pairs):
            longer: dict[int, int] = {}
            for shown, count in lists.items():
                if shown > 0:
                    longer[shown] = longer.get(shown, 0) + count * shown
                if shown < M:
                    longer[shown + 1] = longer.get(shown + 1, 0) + count * (M - shown) * values
            lists = longer
            if sum(lists.values()) > ENOUGH:
                return ENOUGH
        return sum((M if self.allow_dot else shown) * count for shown, count in lists.items())

    def _spelled(self, keys: Int[Array, " n"]) -> Int[Array, "n key_length"]:
        """The tokens of keys by their numbers; that of the first token counts most."""
        powers = self.num_keys ** np.arange(self.key_length, dtype=np.int32)[::-1]
        return 1 + keys[:, None] // powers[None] % self.num_keys
