"""How far a model's predictions are from a batch, in sums that add up over batches."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx.data import Batch


class Score(eqx.Module):
    """Sums over weighted positions. Scores of parts of a batch add up to the score of the whole."""

    nll: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: "Score") -> "Score":
        return jax.tree.map(jnp.add, self, other)

    @property
    def loss(self) -> Float[Array, ""]:
        """Mean cross-entropy a position, in nats; 0 where nothing is asked."""
        return self.nll / jnp.where(self.weight > 0, self.weight, 1)

    @property
    def accuracy(self) -> Float[Array, ""]:
        """The part of the positions whose likeliest token is the target."""
        return self.correct / jnp.where(self.weight > 0, self.weight, 1)


@checked
def score(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], weights: Float[Array, "*batch"]) -> Score:
    """Cross-entropy and right answers, summed with weights, in float32 or the logits' wider type.

    Where the weight is 0 the target may be any number and the logits may be anything.
    """
    dtype = jnp.float32 if jnp.finfo(logits.dtype).bits < 32 else logits.dtype
    asked, weights = weights > 0, weights.astype(dtype)
    logits = jnp.where(asked[..., None], logits.astype(dtype), 0)
    targets = jnp.where(asked, targets, 0)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = (jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets).astype(dtype)
    return Score(jnp.sum(nll * weights), jnp.sum(correct * weights), jnp.sum(weights))


@checked
def next_token(model: Callable[..., Array], batch: Batch, *, key: PRNGKeyArray | None = None) -> Score:
    """The score of a language model, `tokens -> logits` of one sequence, on a batch.

    A batch of one calls the model on the sequence itself. `vmap` over a single sequence gives XLA an axis
    of length 1 that it handles badly on CPU: some gradients take forty times as long.
    """
    size = batch.inputs.shape[0]
    if size == 1:
        logits = model(batch.inputs[0], key=key)[None]
    else:
        keys = None if key is None else jr.split(key, size)
        logits = jax.vmap(lambda tokens, key: model(tokens, key=key))(batch.inputs, keys)
    return score(logits, batch.targets, batch.weights)
