"""In-context learning of linear functions: infer a function from examples of it, and apply it."""

import dataclasses
import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractSeriesTask


@dataclasses.dataclass(frozen=True)
class LinearFunctions(AbstractSeriesTask):
    """Sequences `x_0, f(x_0), x_1, f(x_1), ..., x_n`, to be continued by `f(x_n)`, where `f(x) = w x / sqrt(d)`.

    The vectors `x_i` and `w` in R^d have independent standard normal entries, so that `f(x)` has variance 1: the
    squared error of an answer is the share of the variance that is not explained, 1 for who always says 0. A step holds
    `(x, 0)` or `(0, f(x))`. Training asks for `f(x_i)` at every `x_i`, the test at the last one, when `num_pairs`
    examples have been seen.

    Source: Garg et al., "What Can Transformers Learn In-Context?" (arXiv 2208.01066), and the Hyena paper
    (arXiv 2302.10866), section 4.1.

    Differs from the reference: f(x) has a channel of its own, and is scaled. Example i is a function of (seed, i), up
    to the rounding of f(x), which may differ with the size of a batch.

    **Arguments:** those of every synthetic task, and

    - `dimension`: d, at least 1.
    - `num_pairs`: examples of f before the question, at least 1; from `dimension` on there is one answer.
    """

    dimension: int = 5
    num_pairs: int = 20

    num_outputs = 1

    def __post_init__(self):
        if self.dimension < 1 or self.num_pairs < 1:
            raise ValueError(f"dimension and num_pairs must be at least 1, got {self.dimension} and {self.num_pairs}")
        self.check_sizes()

    @property
    def sequence_length(self) -> int:
        return 2 * self.num_pairs + 1

    @property
    def num_features(self) -> int:
        return self.dimension + 1

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        normal = jr.normal(key, (self.num_pairs + 2, self.dimension), jnp.float32)
        w, x = normal[0], normal[1:]
        f = jnp.sum(x * w[None], axis=1, keepdims=True) / math.sqrt(self.dimension)
        questions = jnp.concatenate([x, jnp.zeros_like(f)], axis=1)
        answers = jnp.concatenate([jnp.zeros_like(x), f], axis=1)
        inputs = jnp.stack([questions, answers], axis=1).reshape(-1, self.dimension + 1)[:-1]
        return {"inputs": inputs, "targets": jnp.repeat(f, 2, axis=0)[:-1]}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return np.arange(self.sequence_length) % 2 == 0

    def asked(self) -> Bool[np.ndarray, " L"]:
        return np.arange(self.sequence_length) == self.sequence_length - 1

    def num_distinct(self) -> float:
        return math.inf
