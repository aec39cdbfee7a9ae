"""What the generated tasks share: streams of examples, a test set without repetition, and training without the test."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import UInt32

from s5eqx._typing import Array, Bool, Int, PRNGKeyArray, checked
from s5eqx.data._task import AbstractBatch, AbstractTask, Batch, LabelledBatch, SeriesBatch
from s5eqx.data.hashing import HashSet, hash_tokens
from s5eqx.data.permutation import permuted

TRAIN, TEST, SHUFFLE = range(3)
"""The streams of random numbers that a seed holds."""

PATIENCE = 1000
"""How many draws a test example may take before the search for different ones is given up."""


def below(bound: int | Int[Array, ""], bits: UInt32[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Random bits to random integers in `range(bound)`: uniform but for one part in 2^32 / bound."""
    return (bits % jnp.asarray(bound, jnp.uint32)).astype(jnp.int32)


def some_places(count: int, bits: UInt32[Array, " L"]) -> Bool[Array, " L"]:
    """True at `count` places, all sets of which are as likely."""
    order = jnp.argsort(bits)
    return jnp.zeros(bits.shape, bool).at[order[:count]].set(True)


def plain_tokens(vocab_size: int) -> tuple[str, ...]:
    """The numbers `0` to `V-3` as strings in ASCII order, that of the published generators: 0, 1, 10, 11, ..., 2."""
    return tuple(sorted(map(str, range(vocab_size - 2))))


def with_specials(vocab_size: int) -> tuple[str, ...]:
    """The published vocabulary in the order of its ids: `.`, the plain tokens, `=>`."""
    return (".", *plain_tokens(vocab_size), "=>")


@dataclasses.dataclass(frozen=True)
class AbstractSynthetic(AbstractTask):
    """A task whose example i is drawn from (seed, i) alone, on the device, when it is asked for.

    Test examples are distinct. A training example that equals one of them has weight 0.

    **Arguments:**

    - `seed`: chooses all of the data.
    - `num_examples`: size of the training set, which may hold an example twice; each epoch goes through it in a fresh
      order. `None`: every training example is drawn anew.
    - `num_test`: size of the test set.
    """

    seed: int = dataclasses.field(default=0, kw_only=True)
    num_examples: int | None = dataclasses.field(default=None, kw_only=True)
    num_test: int = dataclasses.field(default=4000, kw_only=True)

    batch: ClassVar[type[AbstractBatch]]
    """What the examples are made into."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        """One example: the fields of its batch, without the axis B and without weights. The inputs decide the rest."""

    @abc.abstractmethod
    def trained(self) -> Bool[np.ndarray, "*L"]:
        """Which of its predictions count in training."""

    @abc.abstractmethod
    def asked(self) -> Bool[np.ndarray, "*L"]:
        """Which of its predictions count in the test."""

    @abc.abstractmethod
    def num_distinct(self) -> int | float:
        """How many different examples there are, or at the least; infinite where they are of real numbers."""

    def check_sizes(self):
        """Refuses a seed, a training set or a test set that cannot be."""
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"a seed is a number of 32 bits, 0 to {2**32 - 1}, got {self.seed}")
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, or None for endless data, got {self.num_examples}")
        if self.num_test < 1:
            raise ValueError(f"num_test must be at least 1, got {self.num_test}")
        distinct = self.num_distinct()
        if distinct <= self.num_test:
            raise ValueError(
                f"num_test must leave some for training, but only {distinct} different examples of {self} are known; "
                f"ask for fewer, or for longer sequences"
            )
        if self.num_examples is not None and distinct < self.num_test + self.num_examples:
            raise ValueError(
                f"num_examples={self.num_examples} and num_test={self.num_test} ask for more different examples than "
                f"the {distinct} that are known of {self}; ask for fewer, or for longer sequences"
            )

    @functools.partial(jax.jit, static_argnums=0)
    @checked
    def train(self, indices: Int[Array, " B"]) -> AbstractBatch:
        fields, fresh = jax.vmap(self._train_example)(indices)
        return self._batch(fields, fresh, self.trained())

    @functools.partial(jax.jit, static_argnums=0)
    @checked
    def test(self, indices: Int[Array, " B"]) -> AbstractBatch:
        numbers = jnp.asarray(self._test_set[0])[indices] if self._is_discrete else indices
        fields = jax.vmap(lambda i: self.draw(self._key(TEST, i)))(numbers)
        return self._batch(fields, indices < self.num_test, self.asked())

    def _batch(self, fields, counts, where):
        weights = counts.reshape(-1, *(1,) * where.ndim) & jnp.asarray(where)[None]
        return self.batch(**fields, weights=weights.astype(jnp.float32))

    def _train_example(self, i: Int[Array, ""]) -> tuple[dict[str, Array], Bool[Array, ""]]:
        """A training example, and whether the test set does without it."""
        if self.num_examples is not None:
            epoch, place = i // self.num_examples, i % self.num_examples
            i = permuted(place, self.num_examples, key=self._key(SHUFFLE, epoch))
        fields = self.draw(self._key(TRAIN, i))
        fresh = ~self._test_set[1].contains(hash_tokens(fields["inputs"])) if self._is_discrete else jnp.bool_(True)
        return fields, fresh

    def _key(self, stream: int, i: Int[Array, ""]) -> PRNGKeyArray:
        # The generator is named, so that JAX's settings do not change the data.
        return jr.fold_in(jr.fold_in(jr.key(self.seed, impl="threefry2x32"), stream), i)

    @property
    def _is_discrete(self) -> bool:
        return self.num_distinct() != math.inf

    @functools.cached_property
    def _test_set(self) -> tuple[Int[np.ndarray, " N"], HashSet]:
        """The numbers in the test stream of its first `num_test` different examples, and their hashes."""
        chunk = max(1, min(4096, 2 * self.num_test, 2**22 // self.sequence_length))
        hashes = np.zeros((0,), np.uint64)
        first = np.zeros((0,), np.int64)
        hash_inputs = jax.vmap(lambda i: hash_tokens(self.draw(self._key(TEST, i))["inputs"]))
        hash_chunk = jax.jit(lambda start: hash_inputs(start + jnp.arange(chunk, dtype=jnp.int32)))
        hash_chunk = hash_chunk.lower(jax.ShapeDtypeStruct((), jnp.int32)).compile()  # runs while another is traced
        while len(first) < self.num_test:
            if len(hashes) > chunk + PATIENCE * self.num_test:
                raise ValueError(
                    f"num_test={self.num_test} different examples of {self} were not found: {len(first)} are "
                    f"among {len(hashes)}; ask for fewer, or for longer sequences"
                )
            words = np.asarray(hash_chunk(np.int32(len(hashes)))).astype(np.uint64)
            hashes = np.concatenate([hashes, (words[:, 0] << np.uint64(32)) | words[:, 1]])
            _, first = np.unique(hashes, return_index=True)
        numbers = np.sort(first)[: self.num_test]
        kept = hashes[numbers]
        pairs = np.stack([kept >> np.uint64(32), kept & np.uint64(0xFFFFFFFF)], axis=1)
        return numbers.astype(np.int32), HashSet(pairs.astype(np.uint32))


class AbstractWords(AbstractSynthetic):
    """A generated task whose inputs are tokens that can be read."""

    vocab_size: int
    """V, the number of tokens."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens in the order of their ids."""

    def decode(self, ids: Int[Array | np.ndarray, " L"] | Sequence[int]) -> list[str]:
        """Ids to tokens, for reading."""
        vocabulary = self.vocabulary
        return [vocabulary[int(i)] for i in ids]


class AbstractTokenTask(AbstractWords):
    """A generated task whose examples are sequences of tokens that end in an answer, the last targets."""

    batch: ClassVar[type[AbstractBatch]] = Batch

    answer_length: int
    """How many targets, the last ones, are the answer."""

    def asked(self) -> Bool[np.ndarray, " L"]:
        return np.arange(self.sequence_length) >= self.sequence_length - self.answer_length


class AbstractLabelTask(AbstractWords):
    """A generated task whose examples are sequences of tokens, padded to one length, and their classes."""

    batch: ClassVar[type[AbstractBatch]] = LabelledBatch

    num_classes: int


class AbstractSeriesTask(AbstractSynthetic):
    """A generated task whose examples are sequences of vectors and what is to be predicted at their steps."""

    batch: ClassVar[type[AbstractBatch]] = SeriesBatch

    num_features: int
    """Entries of the vector at a step."""
    num_outputs: int
    """Numbers that are to be predicted at a step."""
