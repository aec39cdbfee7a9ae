"""Addition: the sum of two numbers, digit by digit."""

import dataclasses

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractTokenTask, below


@dataclasses.dataclass(frozen=True)
class Addition(AbstractTokenTask):
    """Sequences such as `1 2 3  9 5 4`, to be continued by `1 0 7 7`: two numbers of `digits` digits and their sum,
    which has one digit more, the most significant digit first.

    The digits of the sum alone count, in training too; the model sees those that come before the one it is to give.

    Source: the Hyena paper (arXiv 2302.10866), section 4.1 and appendix A.1, whose first `2 digits - 1` targets are
    masked likewise.

    **Arguments:** those of every synthetic task, and

    - `digits`: of each number, between 1 and 9. There are 100 sums of one digit: `num_test` must then be smaller.
    """

    digits: int = 3

    vocab_size = 10

    def __post_init__(self):
        if not 1 <= self.digits <= 9:
            raise ValueError(f"digits must lie between 1 and 9, got {self.digits}")
        self.check_sizes()

    @property
    def answer_length(self) -> int:
        return self.digits + 1

    @property
    def sequence_length(self) -> int:
        """L, the number of inputs: both numbers, and the sum without its last digit."""
        return 3 * self.digits

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        D = self.digits
        addends = below(10, jr.bits(key, (2 * D,), dtype=jnp.uint32))
        powers = 10 ** np.arange(D + 1, dtype=np.int32)[::-1]
        total = jnp.sum(addends.reshape(2, D) * powers[None, 1:], dtype=jnp.int32)
        row = jnp.concatenate([addends, total // powers % 10])
        return {"inputs": row[:-1], "targets": row[1:]}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return self.asked()

    def num_distinct(self) -> int:
        return 10 ** (2 * self.digits)
