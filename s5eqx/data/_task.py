"""What a task gives to training: batches that are pure functions of numbers."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from s5eqx._typing import Array, Bool, Float, Int


class AbstractBatch(eqx.Module):
    """Examples and what is to be predicted of them. Every array begins with the axis B.

    `weights` says how much a prediction counts: 0 where nothing is asked.
    """

    weights: eqx.AbstractVar[Float[Array, "..."]]


class Batch(AbstractBatch):
    """Token sequences and what is to be predicted at each of their positions.

    `resets` marks, in rows that hold several sequences, where one begins.
    """

    inputs: Int[Array, "B L"]
    targets: Int[Array, "B L"]
    weights: Float[Array, "B L"]
    resets: Bool[Array, "B L"] | None = None


class LabelledBatch(AbstractBatch):
    """Token sequences, padded to one length, and the class of each; `lengths` counts the steps before the padding."""

    inputs: Int[Array, "B L"]
    targets: Int[Array, " B"]
    weights: Float[Array, " B"]
    lengths: Int[Array, " B"]


class SeriesBatch(AbstractBatch):
    """Sequences of vectors, and the vector that is to be predicted at each of their steps.

    `intervals[t]` is the time from step t-1 to step t, for sequences that are not equally spaced.
    """

    inputs: Float[Array, "B L features"]
    targets: Float[Array, "B L outputs"]
    weights: Float[Array, "B L"]
    intervals: Float[Array, "B L"] | None = None


class FieldBatch(AbstractBatch):
    """Fields on a grid, and the fields that an operator makes of them."""

    inputs: Float[Array, "B *grid channels"]
    targets: Float[Array, "B *grid outputs"]
    weights: Float[Array, " B"]


class ImageBatch(AbstractBatch):
    """Images or videos, and the class of each."""

    inputs: Float[Array, "B *grid channels"]
    targets: Int[Array, " B"]
    weights: Float[Array, " B"]


class AbstractTask(abc.ABC):
    """A source of examples in which nothing advances: example i depends on the seed and on i alone.

    A restarted run therefore sees the same data, and a training step can make its own batch on the
    device, inside `jax.jit`. A task is hashable: a frozen dataclass of numbers.
    """

    num_test: int
    sequence_length: int
    """L, the number of inputs of an example."""
    split: ClassVar[str] = "test"
    """What the examples of `test` are called in logs."""

    @abc.abstractmethod
    def train(self, indices: Int[Array, " B"]) -> AbstractBatch:
        """Training examples by their place in the stream, counted from 0."""

    @abc.abstractmethod
    def test(self, indices: Int[Array, " B"]) -> AbstractBatch:
        """Test examples, 0 to `num_test - 1`. Indices beyond have weight 0."""

    def train_batch(self, step: Int[Array, ""] | int, batch_size: int) -> AbstractBatch:
        """The examples of one training step, counted from 0. `step` may be traced."""
        return self.train(step * batch_size + jnp.arange(batch_size, dtype=jnp.int32))


class AbstractCorpus(AbstractTask):
    """A task whose examples lie on the host: `train` and `test` take and give numpy arrays, and are not traced.

    They are functions of their indices all the same. A process of many asks for the examples of its own devices only.
    """
