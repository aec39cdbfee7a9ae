"""What a task gives to training: batches that are pure functions of numbers."""

import abc

import equinox as eqx
import jax.numpy as jnp

from s5eqx._typing import Array, Float, Int


class Batch(eqx.Module):
    """Token sequences and what is to be predicted at each of their positions.

    `weights` says how much a position counts: 0 where nothing is asked.
    """

    inputs: Int[Array, "B L"]
    targets: Int[Array, "B L"]
    weights: Float[Array, "B L"]


class AbstractTask(abc.ABC):
    """A source of examples in which nothing advances: example i depends on the seed and on i alone.

    A restarted run therefore sees the same data, and a training step can make its own batch on the
    device, inside `jax.jit`. A task is hashable: a frozen dataclass of numbers.
    """

    num_test: int

    @abc.abstractmethod
    def train(self, indices: Int[Array, " B"]) -> Batch:
        """Training examples by their place in the stream, counted from 0."""

    @abc.abstractmethod
    def test(self, indices: Int[Array, " B"]) -> Batch:
        """Test examples, 0 to `num_test - 1`. Indices beyond have weight 0."""

    def train_batch(self, step: Int[Array, ""] | int, batch_size: int) -> Batch:
        """The examples of one training step, counted from 0. `step` may be traced."""
        return self.train(step * batch_size + jnp.arange(batch_size, dtype=jnp.int32))
