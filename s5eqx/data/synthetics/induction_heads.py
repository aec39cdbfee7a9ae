"""Induction heads: a trigger comes again, and what followed it the first time is to follow."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractTokenTask, below, with_specials


@dataclasses.dataclass(frozen=True)
class InductionHeads(AbstractTokenTask):
    """Sequences such as `3 1 => 5 2 0 6 4 =>`, to be continued by `5`.

    `length` random tokens, in one place of which stands the trigger `=>` in place of a token; then the trigger, then a
    copy of the `copy_length` tokens that followed it. With several triggers, half of the sequences are drawn with one
    all the same; in the others each trigger is followed by the same copy, but a place too close behind another is left
    out.

    Training asks for the next token everywhere, the test for the copy. Chance is one over `vocab_size - 2`.

    Source: the H3 paper (arXiv 2212.14052) and the data of HazyResearch/safari; several triggers and longer copies as
    in lindermanlab/S5. Tokens and their ids are those of `AssocRecall`.

    Differs from the reference: example i is a function of (seed, i), in place of a list drawn by one generator.

    **Arguments:** those of every synthetic task, and

    - `vocab_size`: V, at least 4 (two plain tokens, `.`, which does not occur, and `=>`).
    - `length`: tokens before the last trigger, at least `copy_length + 2`.
    - `copy_length`: tokens that follow a trigger.
    - `num_triggers`: places that are drawn for triggers.
    - `answer_only`: ask for the copy alone in training too. All the rest is random, so that this learns much faster.
    """

    vocab_size: int = 20
    length: int = 30
    copy_length: int = 1
    num_triggers: int = 1
    answer_only: bool = False

    def __post_init__(self):
        if self.vocab_size < 4:
            raise ValueError(
                f"induction needs two plain tokens, '.' and '=>': vocab_size must be at least 4, got {self.vocab_size}"
            )
        if self.copy_length < 1 or self.num_triggers < 1:
            raise ValueError(
                f"copy_length and num_triggers must be at least 1, got {self.copy_length} and {self.num_triggers}"
            )
        if self.length < self.copy_length + 2:
            raise ValueError(
                f"a trigger and its copy must fit before the last token: length must be at least "
                f"{self.copy_length + 2} tokens, got {self.length}"
            )
        self.check_sizes()

    @property
    def answer_length(self) -> int:
        return self.copy_length

    @property
    def sequence_length(self) -> int:
        """L, the number of input tokens: all but the last token of the copy."""
        return self.length + self.copy_length

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return with_specials(self.vocab_size)

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        T, m, n = self.length, self.copy_length, self.num_triggers
        bits = jr.bits(key, (T + n + 1,), dtype=jnp.uint32)
        tokens = 1 + below(self.vocab_size - 2, bits[:T])
        places = jnp.sort(below(T - 1 - m, bits[T:-1]))
        is_single = bits[-1] < jnp.uint32(2**31)
        places = jnp.where(is_single, below(T - 1 - m, bits[T]), places)

        def keep(last, place):
            kept = place > last + m
            return jnp.where(kept, place, last), kept

        _, kept = jax.lax.scan(keep, jnp.int32(-m - 1), places)
        copy = jax.lax.dynamic_slice(tokens, (places[0] + 1,), (m,))
        trigger = jnp.concatenate([jnp.array([self.vocab_size - 1], jnp.int32), copy])
        where = jnp.where(kept[:, None], places[:, None] + jnp.arange(m + 1, dtype=jnp.int32)[None], T)
        written = jnp.broadcast_to(trigger[None], where.shape)
        row = jnp.concatenate([jnp.asarray(tokens).at[where].set(written, mode="drop"), trigger])
        return {"inputs": row[:-1], "targets": row[1:]}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return self.asked() if self.answer_only else np.ones(self.sequence_length, bool)

    def num_distinct(self) -> int:
        """Those of one trigger; several come on top."""
        return (self.length - 1 - self.copy_length) * (self.vocab_size - 2) ** (self.length - 1)
