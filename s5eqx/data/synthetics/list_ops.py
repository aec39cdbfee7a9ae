"""ListOps: the value of a nested expression of list operators."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, Int, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractLabelTask, below

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
DIGIT, OPERATOR, CLOSE = 1, 11, 15
"""The ids of 0, of the first operator, and of `]`."""


def value_of(operator: Int[Array, ""], at_most: Int[Array, " 10"]) -> Int[Array, ""]:
    """The value of an expression whose operator has this place in `OPERATORS`, and which has `at_most[v]` arguments
    that are v or less."""
    n = at_most[-1]
    ranked = lambda rank: jnp.sum(at_most <= rank, dtype=jnp.int32)  # the argument that `rank` others precede
    median = (ranked((n - 1) // 2) + ranked(n // 2)) // 2
    total = jnp.sum(n - at_most, dtype=jnp.int32)  # v is more than v of the digits
    return jnp.stack([ranked(0), ranked(n - 1), median, total % 10])[operator]


@dataclasses.dataclass(frozen=True)
class ListOps(AbstractLabelTask):
    """Expressions such as `[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]`, whose class is their value, here 5.

    `[MIN`, `[MAX`, `[MED` (the median, rounded down) and `[SM` (the sum modulo 10) take two or more arguments, digits
    or expressions. `.`, of id 0, is padding.

    Each example draws its own limit, uniform between half of `max_length` and all of it, and is written from left to
    right. Operators and digits are uniform, and so is the number of arguments, between 2 and `max_args` or what fits.
    An argument is an expression with probability `nesting`, but never where the limit or `max_depth` leaves no room
    for one, and always, if there is room, where a digit would end the whole before half of `max_length`. By default
    nine lengths in ten are thus more than that half; the others end because their last argument lay too deep.

    The answer alone counts. By default 15% have the value 0, as many have 9, and who knows the first token alone can be
    right for a third.

    Source: Nangia and Bowman, "ListOps" (arXiv 1804.06028), in the form of Long Range Arena (arXiv 2011.04006), without
    the round brackets of its files, which add nothing.

    Differs from the reference: an argument is there an expression with probability 1/4 whatever surrounds it, and
    expressions are drawn until their length lies between 500 and 2000 tokens. Here every one is used. Example i is a
    function of (seed, i).

    **Arguments:** those of every synthetic task, and

    - `max_length`: L, in tokens, at least 4 (an operator, two digits, `]`). Shorter expressions are padded.
    - `max_depth`: expressions within each other, at least 1. Long Range Arena has up to 9.
    - `max_args`: arguments of an expression, at least 2.
    """

    max_length: int = 2048
    max_depth: int = 10
    max_args: int = 10

    vocab_size = 16
    num_classes = 10

    def __post_init__(self):
        if self.max_length < 4:
            raise ValueError(
                f"an expression is an operator, two digits and ']' or more: max_length must be at least 4 tokens, "
                f"got {self.max_length}"
            )
        if self.max_depth < 1:
            raise ValueError(f"max_depth must be at least 1, for expressions of digits, got {self.max_depth}")
        if self.max_args < 2:
            raise ValueError(f"operators take two arguments or more: max_args must be at least 2, got {self.max_args}")
        self.check_sizes()

    @property
    def nesting(self) -> float:
        """The probability that an argument is an expression, where either may be: such that one with all `max_depth`
        levels has about `max_length` tokens, but no more than 3/4."""
        args = (2 + self.max_args) / 2
        held = (self.max_length / (2 + args)) ** (1 / self.max_depth)
        return min(held / args, 3 / 4)

    @property
    def sequence_length(self) -> int:
        return self.max_length

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (".", *"0123456789", *OPERATORS, "]")

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        L, D = self.max_length, self.max_depth
        bits = jr.bits(key, (2, L + 1), dtype=jnp.uint32)
        half = max(4, L // 2)
        limit = half + below(L - half + 1, bits[0, -1])
        nests = bits[0, :-1] < jnp.uint32(round(2**32 * self.nesting))
        all_digits = jnp.arange(10, dtype=jnp.int32)

        def write(state, drawn):
            """One token. The innermost open expression is the first row of the stacks; below the outermost lies a list
            that has it for its one argument. `need` counts the tokens without which what is open cannot be closed."""
            depth, need, operators, sizes, at_most = state
            t, nests, bits = drawn
            missing = sizes[0] - at_most[0, -1]
            room = limit - t - need - 1  # for the arguments of an expression here
            ends = (need - depth == 1) & (2 * (t + need) < L)
            opens = (missing > 0) & (depth < D) & (room >= 2) & (nests | ends)
            closes = (missing == 0) & (depth > 0)
            puts = (missing > 0) & ~opens

            digit, operator = below(10, bits), below(4, bits)
            size = 2 + below(jnp.clip(room, 2, self.max_args) - 1, bits // 4)
            value = jnp.where(closes, value_of(operators[0], at_most[0]), digit)
            given = (closes | puts).astype(jnp.int32)

            def moved(stack, new):
                pushed = jnp.concatenate([new[None], stack[:-1]])
                popped = jnp.concatenate([stack[1:], stack[-1:]])
                return jnp.where(opens, pushed, jnp.where(closes, popped, stack))

            at_most = moved(at_most, jnp.zeros_like(all_digits))
            at_most = at_most.at[0].add(jnp.where(all_digits >= value, given, 0))
            depth = depth + opens.astype(jnp.int32) - closes.astype(jnp.int32)
            need = need + jnp.where(opens, size, -given)
            token = jnp.select([opens, closes, puts], [OPERATOR + operator, jnp.int32(CLOSE), DIGIT + digit], 0)
            return (depth, need, moved(operators, operator), moved(sizes, size), at_most), token

        empty = jnp.zeros((D + 1,), jnp.int32)
        start = jnp.int32(0), jnp.int32(1), empty, empty.at[0].set(1), jnp.zeros((D + 1, 10), jnp.int32)
        steps = jnp.arange(L, dtype=jnp.int32), nests, bits[1, :-1]
        (*_, at_most), inputs = jax.lax.scan(write, start, steps)
        value = jnp.sum(at_most[0] == 0, dtype=jnp.int32)  # of the list's one argument
        return {"inputs": inputs, "targets": value, "lengths": jnp.sum(inputs > 0, dtype=jnp.int32)}

    def trained(self) -> Bool[np.ndarray, ""]:
        return np.ones((), bool)

    def asked(self) -> Bool[np.ndarray, ""]:
        return np.ones((), bool)

    def num_distinct(self) -> int:
        """No more than there are: expressions of up to 15 digits, or those of two arguments each, the second of which
        is another expression, up to 9 within each other. Of a flat one that would end too soon there is, in its place,
        one whose last argument is an expression that begins with its last digit."""
        most_args = min(self.max_args, self.max_length - 2, 15)
        most_levels = min(self.max_depth, (self.max_length - 1) // 3, 9)
        return max(sum(4 * 10**size for size in range(2, most_args + 1)), 10 * 40**most_levels)
