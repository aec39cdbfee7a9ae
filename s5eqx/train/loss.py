"""How far a model's predictions are from a batch, in sums that add up over batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx._varying import varying_like
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


@runtime_checkable
class _Streams(Protocol):
    def init_state(self) -> Any: ...
    def prefill(self, state: Any, x: Array, *, key: PRNGKeyArray | None) -> tuple[Any, Array]: ...


@checked
def next_token(
    model: Callable[..., Array], batch: Batch, *, key: PRNGKeyArray | None = None, chunk: int | None = None
) -> Score:
    """The score of a language model, `tokens -> logits` of one sequence, on a batch.

    **Arguments:** `chunk`, the steps of a piece, for models with `init_state` and `prefill`. Sequences then pass in
    equal pieces of at most `chunk` steps, each from the state that the last one left, and a gradient computes a piece
    again from there, which takes a third more work. Score and gradient stay exact, with dropout drawn for each piece.
    What is kept is a state a piece: for S5 next to nothing, for attention a whole cache. Where fewer than twice as many
    pieces do not divide the length, the last is filled up, by fewer steps than there are pieces: a `max_length` must
    leave room.
    """
    if chunk is None:
        keys = _keys(key, len(batch.inputs))
        logits = _each(lambda tokens, key: model(tokens, key=key), batch.inputs, keys)
        return score(logits, batch.targets, batch.weights)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 step, or None for whole sequences; got {chunk}.")
    if not isinstance(model, _Streams):
        raise TypeError(
            f"chunk needs a model with init_state and prefill; {type(model).__name__} lacks one: leave it out."
        )
    return _in_pieces(model, batch, key, chunk)


def _in_pieces(model, batch, key, chunk):
    size, length = batch.inputs.shape
    least = max(-(-length // chunk), 1)
    pieces = next((n for n in range(least, 2 * least) if length % n == 0), least)
    steps = -(-length // pieces)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, pieces * steps - length)))
        return a.reshape(size, pieces, steps).swapaxes(0, 1)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(states, piece):
        batch, key = piece
        prefill = lambda state, tokens, key: model.prefill(state, tokens, key=key)
        states, logits = _each(prefill, states, batch.inputs, _keys(key, size))
        return states, score(logits, batch.targets, batch.weights)

    of_each = lambda a: varying_like(batch.inputs, jnp.broadcast_to(a, (size, *a.shape)))
    start = jax.tree.map(of_each, model.init_state())
    keys = None if key is None else jr.split(key, pieces)
    _, scores = lax.scan(one, start, (jax.tree.map(cut, batch), keys), pieces)
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), scores)


def _keys(key, size):
    """A key a sequence, or None; a single sequence keeps the key itself."""
    return key if key is None else key[None] if size == 1 else jr.split(key, size)


def _each(function, *columns):
    """`function` of each row of the columns.

    A single row is not mapped. `vmap` over it gives XLA an axis of length 1 that it handles badly on CPU: some
    gradients take forty times as long.
    """
    if len(jax.tree.leaves(columns)[0]) == 1:
        return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], columns)))
    return jax.vmap(function)(*columns)
