"""How far a model's predictions are from a batch, in sums that add up over batches."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Key

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx.data import Batch, FieldBatch, ImageBatch, LabelledBatch, SeriesBatch
from s5eqx.models._pieces import each_row, head_in_pieces, in_pieces, row_keys


class Score(eqx.Module):
    """Sums over weighted predictions. Scores of parts of a batch add up to the score of the whole.

    `total` is the sum of the losses, `correct` that of the right answers; None where no answer is simply right.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""] | None = None

    def __add__(self, other: "Score") -> "Score":
        return jax.tree.map(jnp.add, self, other)

    @property
    def loss(self) -> Float[Array, ""]:
        """The mean a prediction: of the cross-entropy in nats, or of the squared error; 0 where nothing is asked."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)

    @property
    def accuracy(self) -> Float[Array, ""] | None:
        """The part of the predictions whose likeliest token or class is the target."""
        return None if self.correct is None else self.correct / jnp.where(self.weight > 0, self.weight, 1)

    @property
    def means(self) -> dict[str, Float[Array, ""]]:
        """`loss` and, where there is one, `accuracy`."""
        return {"loss": self.loss} | ({} if self.accuracy is None else {"accuracy": self.accuracy})


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
    return Score(jnp.sum(nll * weights), jnp.sum(weights), jnp.sum(correct * weights))


@checked
def label(
    model: Callable[..., Array],
    batch: LabelledBatch | ImageBatch,
    *,
    key: PRNGKeyArray | Key[Array, " B"] | None = None,
) -> Score:
    """The score of a classifier, `(tokens, length) -> logits` of one sequence or `image -> logits`, on a batch.

    `key` is for dropout; one for all, or one a sequence or image. None for no dropout.
    """
    named = lambda length: {} if length is None else {"length": length}
    one = lambda x, length, key: model(x, **named(length), key=key)
    lengths = batch.lengths if isinstance(batch, LabelledBatch) else None
    logits = each_row(one, jnp.asarray(batch.inputs), lengths, row_keys(key, len(batch.inputs)))
    return score(logits, batch.targets, batch.weights)


@checked
def squared_error(
    model: Callable[..., Array], batch: SeriesBatch, *, key: PRNGKeyArray | Key[Array, " B"] | None = None
) -> Score:
    """The score of a regressor, `series -> predictions` of one sequence, on a batch: its squared errors, each the mean
    over the outputs. Where the weight is 0 the prediction may be anything.

    `key` is as for `label`. Where the batch has intervals, the model is called with them.
    """
    named = lambda intervals: {} if intervals is None else {"intervals": intervals}
    one = lambda x, intervals, key: model(x, **named(intervals), key=key)
    found = each_row(one, jnp.asarray(batch.inputs), batch.intervals, row_keys(key, len(batch.inputs)))
    weights = batch.weights.astype(found.dtype)
    miss = jnp.where((weights > 0)[..., None], found - batch.targets.astype(found.dtype), 0)
    return Score(jnp.sum(jnp.mean(miss**2, axis=-1) * weights), jnp.sum(weights))


@checked
def relative_error(
    model: Callable[..., Array], batch: FieldBatch, *, key: PRNGKeyArray | Key[Array, " B"] | None = None
) -> Score:
    """The score of an operator, `field -> field` of one example, on a batch: `|y - t| / |t|`, in the L2 norm. Where the
    weight is 0 the prediction may be anything, and where the target is 0 the error is `|y|`.

    `key` is as for `label`.
    """
    found = each_row(lambda x, key: model(x, key=key), jnp.asarray(batch.inputs), row_keys(key, len(batch.inputs)))
    if found.shape != batch.targets.shape:
        raise ValueError(
            f"An operator must give fields of the shape of its targets, {batch.targets.shape[1:]}; got "
            f"{found.shape[1:]}. Build it for as many channels, and run it on the grid of the targets."
        )
    found = found.astype(np.promote_types(found.dtype, np.float32)).reshape(len(found), -1)
    weights, targets = (jnp.asarray(a, found.dtype) for a in (batch.weights, batch.targets))
    targets = targets.reshape(found.shape)
    miss = jnp.where((weights > 0)[:, None], found - targets, 0)
    # The plain norm has no gradient at 0.
    norm = optax.safe_norm(miss, 0.0, axis=1)
    size = jnp.linalg.norm(targets, axis=1)
    return Score(jnp.sum(norm / jnp.where(size > 0, size, 1) * weights), jnp.sum(weights))


@checked
def next_token(
    model: Callable[..., Array],
    batch: Batch,
    *,
    key: PRNGKeyArray | Key[Array, " B"] | None = None,
    chunk: int | None = None,
    truncate: bool = False,
    logits_chunk: int | None = None,
) -> Score:
    """The score of a language model, `tokens -> logits` of one sequence, on a batch.

    **Arguments:**

    - `key`: for dropout; one for all, or one a sequence. None for no dropout.

    - `chunk`: the steps of a piece, for models with `init_state` and `prefill`. Sequences then pass in pieces of
      `chunk` steps and a shorter last one, each from the state that the last one left, and a gradient computes a piece
      again from there, which takes a third more work. Score and gradient stay exact, with dropout drawn for each piece.
      What is kept is a state a piece: for S5 next to nothing, for attention a whole cache.
    - `truncate`: let no gradient pass from a piece to the one before. The score stays exact; its gradient is then that
      of truncated back-propagation through time, where a state that enters a piece counts as given.
    - `logits_chunk`: the steps whose logits are formed at once, for models with `hidden` and `unembed`. A gradient
      forms them again. With a vocabulary of tens of thousands the logits of whole sequences are what takes most memory.
    """
    if truncate and chunk is None:
        raise ValueError("truncate cuts the gradient between pieces and needs a chunk, in steps; got chunk=None.")
    if chunk is not None and logits_chunk is not None:
        raise ValueError(
            f"A piece of chunk={chunk} steps makes its own logits; got logits_chunk={logits_chunk} as well. Give one."
        )
    summary = lambda logits, asked: score(logits, *asked)
    asked = batch.targets, batch.weights
    if logits_chunk is None:
        options = {"resets": batch.resets, "key": key, "truncate": truncate}
        scores = in_pieces(summary, model, batch.inputs, asked, chunk, **options)
    else:
        options = {"resets": batch.resets, "key": key}
        scores = head_in_pieces(summary, model, batch.inputs, asked, logits_chunk, **options)
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), scores)


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
