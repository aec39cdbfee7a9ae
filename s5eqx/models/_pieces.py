"""A batch of sequences through a model, whole or piece after piece with the state carried."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, PyTree
from s5eqx._varying import varying_like

Summary = TypeVar("Summary")


@runtime_checkable
class _Streams(Protocol):
    def init_state(self) -> Any: ...
    def prefill(self, state: Any, x: Array, *, key: PRNGKeyArray | None) -> tuple[Any, Array]: ...


def check_streams(model: Any, why: str, instead: str) -> None:
    """Refuses a model that cannot carry a state."""
    if not isinstance(model, _Streams):
        raise TypeError(
            f"{why} needs a model with init_state and prefill; {type(model).__name__} lacks one: {instead}."
        )


def in_pieces(
    summary: Callable[[Float[Array, "B piece V"], Any], Summary],
    model: Callable[..., Array],
    tokens: Int[Array, "B L"],
    columns: PyTree[Array],
    chunk: int | None,
    *,
    key: PRNGKeyArray | None = None,
    truncate: bool = False,
) -> Summary:
    """`summary(logits, columns)` of every piece, under a new first axis.

    Pieces of `chunk` steps run in one loop, and what remains as a shorter one after it. Each starts from the states
    that the one before left, and draws from a key of its own. A gradient computes the pieces of the loop again; the
    shorter one, where it begins, need not be. Where `chunk` is None there is one piece, `model(tokens)` of whole
    sequences.

    **Arguments:**

    - `columns`: what else the summary needs, (B, L) arrays that are cut as the tokens are.
    - `truncate`: let no gradient pass from a piece to the one before.
    """
    tokens = jnp.asarray(tokens)
    size, length = tokens.shape
    if chunk is None:
        logits = each_row(lambda tokens, key: model(tokens, key=key), tokens, _keys(key, size))
        return jax.tree.map(lambda a: a[None], summary(logits, columns))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 step, or None for whole sequences; got {chunk}.")
    check_streams(model, "chunk", "leave it out")

    full, rest = divmod(length, chunk)
    inside, remains = full * chunk, rest > 0 or not full
    keys = None if key is None else jr.split(key, full + remains)

    def one(states, piece):
        tokens, columns, key = piece
        prefill = lambda state, tokens, key: model.prefill(state, tokens, key=key)
        states, logits = each_row(prefill, states, tokens, _keys(key, size))
        return lax.stop_gradient(states) if truncate else states, summary(logits, columns)

    def cut(a):
        return a[:, :inside].reshape(size, full, chunk).swapaxes(0, 1)

    states = jax.tree.map(lambda a: varying_like(tokens, jnp.broadcast_to(a, (size, *a.shape))), model.init_state())
    summaries = []
    if full:
        pieces = *jax.tree.map(cut, (tokens, columns)), None if keys is None else keys[:full]
        states, stacked = lax.scan(jax.checkpoint(one, prevent_cse=False), states, pieces)
        summaries.append(stacked)
    if remains:
        piece = *jax.tree.map(lambda a: a[:, inside:], (tokens, columns)), None if keys is None else keys[-1]
        summaries.append(jax.tree.map(lambda a: a[None], one(states, piece)[1]))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *summaries)


def _keys(key, size):
    """A key a sequence, or None; a single sequence keeps the key itself."""
    return key if key is None else key[None] if size == 1 else jr.split(key, size)


def each_row(function, *columns):
    """`function` of each row of the columns.

    A single row is not mapped. `vmap` over it gives XLA an axis of length 1 that it handles badly on CPU: some
    gradients take forty times as long.
    """
    if len(jax.tree.leaves(columns)[0]) == 1:
        return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], columns)))
    return jax.vmap(function)(*columns)
