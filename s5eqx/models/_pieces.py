"""A batch of sequences through a model, whole or piece after piece: the model's state carried, or the logits alone."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Key

from s5eqx._typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
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
    resets: Bool[Array, "B L"] | None = None,
    key: PRNGKeyArray | Key[Array, " B"] | None = None,
    truncate: bool = False,
) -> Summary:
    """`summary(logits, columns)` of every piece, under a new first axis.

    Pieces of `chunk` steps run in one loop, and what remains as a shorter one after it. Each starts from the states
    that the one before left, and draws from a key of its own. A gradient computes the pieces of the loop again; the
    shorter one, where it begins, need not be. Where `chunk` is None there is one piece, `model(tokens)` of whole
    sequences.

    **Arguments:**

    - `columns`: what else the summary needs, (B, L) arrays that are cut as the tokens are.
    - `key`: one for all, or one a sequence.
    - `truncate`: let no gradient pass from a piece to the one before.
    """
    tokens = jnp.asarray(tokens)
    size, length = tokens.shape
    if chunk is None:
        run = lambda tokens, reset, key: model(tokens, **_reset(reset), key=key)
        logits = each_row(run, tokens, resets, row_keys(key, size))
        return jax.tree.map(lambda a: a[None], summary(logits, columns))
    _check_chunk(chunk, "chunk")
    check_streams(model, "chunk", "leave it out, or give logits_chunk")

    def one(states, piece, key):
        tokens, resets, columns = piece
        prefill = lambda state, tokens, reset, key: model.prefill(state, tokens, **_reset(reset), key=key)
        states, logits = each_row(prefill, states, tokens, resets, row_keys(key, size))
        return lax.stop_gradient(states) if truncate else states, summary(logits, columns)

    states = jax.tree.map(lambda a: varying_like(tokens, jnp.broadcast_to(a, (size, *a.shape))), model.init_state())
    keys = _piece_keys(key, max(1, -(-length // chunk)))
    return _loop(one, states, (tokens, resets, columns), keys, chunk)


def head_in_pieces(
    summary: Callable[[Float[Array, "B piece V"], Any], Summary],
    model: Any,
    tokens: Int[Array, "B L"],
    columns: PyTree[Array],
    chunk: int,
    *,
    resets: Bool[Array, "B L"] | None = None,
    key: PRNGKeyArray | Key[Array, " B"] | None = None,
) -> Summary:
    """As `in_pieces`, with the backbone on whole sequences and the logits of `chunk` steps at once.

    `model` has `hidden` and `unembed`. A gradient computes the logits again, and sums up that of the embedding in
    float32 or wider whatever the compute dtype.
    """
    _check_chunk(chunk, "logits_chunk")
    if not (hasattr(model, "hidden") and hasattr(model, "unembed")):
        raise TypeError(
            f"logits_chunk needs a model with hidden and unembed; {type(model).__name__} lacks one: leave it out."
        )
    tokens = jnp.asarray(tokens)
    run = lambda tokens, reset, key: model.hidden(tokens, **_reset(reset), key=key)
    h = each_row(run, tokens, resets, row_keys(key, len(tokens)))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    wide = jax.tree.map(lambda a: a.astype(np.promote_types(a.dtype, np.float32)), arrays)

    def one(carry, piece, key):
        h, columns = piece
        narrow = jax.tree.map(lambda a, like: a.astype(like.dtype), wide, arrays)
        return carry, summary(eqx.combine(narrow, rest).unembed(h), columns)

    return _loop(one, (), (h, columns), None, chunk)


def _loop(one, carry, rows, keys, chunk):
    """`carry, summary = one(carry, piece, key)` for the pieces of `rows`, arrays (B, L, ...)."""
    size, length = jax.tree.leaves(rows)[0].shape[:2]
    full, rest = divmod(length, chunk)
    inside, summaries = full * chunk, []
    cut = lambda a: a[:, :inside].reshape(size, full, chunk, *a.shape[2:]).swapaxes(0, 1)
    if full:
        pieces = jax.tree.map(cut, rows), None if keys is None else keys[:full]
        body = jax.checkpoint(lambda carry, piece: one(carry, *piece), prevent_cse=False)
        carry, stacked = lax.scan(body, carry, pieces)
        summaries.append(stacked)
    if rest or not full:
        piece = jax.tree.map(lambda a: a[:, inside:], rows)
        last = one(carry, piece, None if keys is None else keys[-1])[1]
        summaries.append(jax.tree.map(lambda a: a[None], last))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *summaries)


def row_keys(key, size):
    """A key a sequence, or None. A single sequence keeps the key itself, and keys a sequence stay as they are."""
    if key is None or jnp.ndim(key) == 1:
        return key
    return key[None] if size == 1 else jr.split(key, size)


def _piece_keys(key, pieces):
    """The key of each piece, or the keys of its sequences."""
    if key is None or jnp.ndim(key) == 0:
        return key if key is None else jr.split(key, pieces)
    return jax.vmap(lambda key: jr.split(key, pieces), out_axes=1)(key)


def _reset(reset):
    """Models that know no resets are not asked for any."""
    return {} if reset is None else {"reset": reset}


def _check_chunk(chunk, name):
    if chunk < 1:
        raise ValueError(f"{name} must be at least 1 step, or None for whole sequences; got {chunk}.")


def each_row(function, *columns):
    """`function` of each row of the columns.

    A single row is not mapped. `vmap` over it gives XLA an axis of length 1 that it handles badly on CPU: some
    gradients take forty times as long.
    """
    if len(jax.tree.leaves(columns)[0]) == 1:
        return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], columns)))
    return jax.vmap(function)(*columns)
