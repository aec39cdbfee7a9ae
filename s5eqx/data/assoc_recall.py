"""Associative recall: after a list of key-value pairs, give the value of one of the keys."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import UInt32

from s5eqx._typing import Array, Bool, Int, PRNGKeyArray, checked
from s5eqx.data._task import AbstractTask, Batch
from s5eqx.data.hashing import HashSet, hash_tokens
from s5eqx.data.permutation import permuted

TRAIN, TEST, SHUFFLE = range(3)
"""The streams of random numbers that a seed holds."""


@dataclasses.dataclass(frozen=True)
class AssocRecall(AbstractTask):
    """Sequences such as `1 5  0 4  1 5  2 7  =>  0`, to be continued by `4`.

    An example has its own random map from keys to values (values may repeat). It shows floor(length / 2)
    pairs whose keys are drawn uniformly with replacement, then `=>`, then a query drawn uniformly among
    the keys that occurred, then its value. The tokens are the strings `0` to `V-3`, `.` and `=>`; their
    ids are their ranks in ASCII order (`.` is 0; the numbers sort as `0, 1, 10, 11, ..., 2, ...`;
    `=>` is V-1). The first half of the sorted numbers are keys, the rest are values.

    Training asks for the next token everywhere, the test for the last one, the value. Chance is one over
    the number of values. A training example that equals a test example has weight 0.

    Source: the H3 paper (arXiv 2212.14052) and the data of HazyResearch/safari, without its `.` answers.

    Differs from the reference: example i is a function of (seed, i), made on the device when it is asked
    for, in place of a list drawn by one generator. The stream of training examples has no end unless
    `num_examples` is given, and it may repeat itself. Test examples are distinct, as there.

    **Arguments:**

    - `vocab_size`: V, the number of tokens, at least 4 (one key, one value, `.` and `=>`).
    - `length`: length of the list of pairs in tokens, at least 2. A sequence has `sequence_length` inputs.
    - `seed`: chooses all of the data.
    - `num_examples`: size of the training set; each epoch goes through it in a fresh order.
      `None`: every training example is new.
    - `num_test`: size of the test set.
    """

    vocab_size: int = 10
    length: int = 20
    seed: int = 0
    num_examples: int | None = None
    num_test: int = 4000

    def __post_init__(self):
        if self.vocab_size < 4:
            raise ValueError(
                f"associative recall needs a key, a value, '.' and '=>': vocab_size must be at least 4, "
                f"got {self.vocab_size}"
            )
        if self.length < 2:
            raise ValueError(
                f"a list of pairs needs at least one pair: length must be at least 2 tokens, got {self.length}"
            )
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, or None for endless data, got {self.num_examples}")
        if self.num_test < 1:
            raise ValueError(f"num_test must be at least 1, got {self.num_test}")
        if not self._distinct_rows_exceed(self.num_test):
            raise ValueError(
                f"num_test must leave something to train on: there are no more than {self.num_test} "
                f"different sequences of vocab_size={self.vocab_size}, length={self.length}; ask for fewer "
                f"or for longer sequences"
            )

    @property
    def num_keys(self) -> int:
        return (self.vocab_size - 2) // 2

    @property
    def num_values(self) -> int:
        return self.vocab_size - 2 - self.num_keys

    @property
    def sequence_length(self) -> int:
        """L, the number of input tokens: the pairs, `=>` and the query."""
        return 2 * (self.length // 2) + 2

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens in the order of their ids."""
        return tuple(sorted([*map(str, range(self.vocab_size - 2)), ".", "=>"]))

    def decode(self, ids: Int[Array | np.ndarray, " L"] | Sequence[int]) -> list[str]:
        """Ids to tokens, for reading."""
        vocabulary = self.vocabulary
        return [vocabulary[int(i)] for i in ids]

    @functools.partial(jax.jit, static_argnums=0)
    @checked
    def train(self, indices: Int[Array, " B"]) -> Batch:
        rows, fresh = jax.vmap(self._train_row)(indices)
        weights = jnp.broadcast_to(fresh[:, None], rows[:, 1:].shape)
        return Batch(rows[:, :-1], rows[:, 1:], weights.astype(jnp.float32))

    @functools.partial(jax.jit, static_argnums=0)
    @checked
    def test(self, indices: Int[Array, " B"]) -> Batch:
        numbers = jnp.asarray(self._test_set[0])[indices]
        rows = jax.vmap(lambda i: self._row(self._key(TEST, i)))(numbers)
        last = jnp.arange(rows.shape[1] - 1) == rows.shape[1] - 2
        weights = last[None, :] & (indices < self.num_test)[:, None]
        return Batch(rows[:, :-1], rows[:, 1:], weights.astype(jnp.float32))

    def _train_row(self, i: Int[Array, ""]) -> tuple[Int[Array, " L"], Bool[Array, ""]]:
        """A training sequence with its answer, and whether the test set does without it."""
        if self.num_examples is not None:
            epoch, place = i // self.num_examples, i % self.num_examples
            i = permuted(place, self.num_examples, key=self._key(SHUFFLE, epoch))
        row = self._row(self._key(TRAIN, i))
        return row, ~self._test_set[1].contains(hash_tokens(row))

    def _key(self, stream: int, i: Int[Array, ""]) -> PRNGKeyArray:
        # The generator is named, so that JAX's settings do not change the data.
        return jr.fold_in(jr.fold_in(jr.key(self.seed, impl="threefry2x32"), stream), i)

    def _row(self, key: PRNGKeyArray) -> Int[Array, " L"]:
        """A sequence with its answer: one token more than there are inputs."""
        K, V = self.num_keys, self.vocab_size
        # One draw for the row: a remainder of 32 bits is uniform but for one part in 2^32 / V.
        bits = jr.bits(key, (K + self.length // 2 + 1,), dtype=jnp.uint32)
        value_of = 1 + K + _below(self.num_values, bits[:K])
        keys = _below(K, bits[K:-1])
        every_key = jnp.arange(K, dtype=jnp.int32)
        seen = jnp.cumsum(jnp.any(keys[:, None] == every_key[None, :], axis=0), dtype=jnp.int32)
        query = jnp.argmax(seen > _below(seen[-1], bits[-1]))
        pairs = jnp.stack([1 + keys, value_of[keys]], axis=1).reshape(-1)
        end = jnp.stack([jnp.int32(V - 1), 1 + query.astype(jnp.int32), value_of[query]])
        return jnp.concatenate([pairs, end])

    @functools.cached_property
    def _test_set(self) -> tuple[Int[np.ndarray, " N"], HashSet]:
        """The numbers in the test stream of its first `num_test` different sequences, and their hashes."""
        chunk = max(1, min(4096, 2**22 // self.sequence_length))
        hashes = np.zeros((0,), np.uint64)
        first = np.zeros((0,), np.int64)
        with jax.ensure_compile_time_eval():
            hash_row = jax.vmap(lambda i: hash_tokens(self._row(self._key(TEST, i))))
            hash_chunk = jax.jit(lambda start: hash_row(start + jnp.arange(chunk, dtype=jnp.int32)))
            while len(first) < self.num_test:
                words = np.asarray(hash_chunk(len(hashes))).astype(np.uint64)
                hashes = np.concatenate([hashes, (words[:, 0] << np.uint64(32)) | words[:, 1]])
                _, first = np.unique(hashes, return_index=True)
        numbers = np.sort(first)[: self.num_test]
        kept = hashes[numbers]
        pairs = np.stack([kept >> np.uint64(32), kept & np.uint64(0xFFFFFFFF)], axis=1)
        return numbers.astype(np.int32), HashSet(pairs.astype(np.uint32))

    def _distinct_rows_exceed(self, bound: int) -> bool:
        """Whether more than `bound` different sequences exist."""
        K, values = self.num_keys, self.num_values
        lists = {0: 1}  # number of different keys shown -> number of lists of pairs
        for _ in range(self.length // 2):
            longer = dict.fromkeys(range(1, K + 1), 0)
            for shown, count in lists.items():
                if shown > 0:
                    longer[shown] += count * shown
                if shown < K:
                    longer[shown + 1] += count * (K - shown) * values
            lists = longer
            if sum(shown * count for shown, count in lists.items()) > bound:
                return True
        return False


def _below(bound: int | Int[Array, ""], bits: UInt32[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Random bits to random integers in `range(bound)`."""
    return (bits % jnp.asarray(bound, jnp.uint32)).astype(jnp.int32)
