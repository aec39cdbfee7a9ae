"""What whole models share: how their layers come in, and rows of a table."""

import os
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp

from s5eqx._typing import Array, Float, Int, PRNGKeyArray
from s5eqx._varying import error_if
from s5eqx.nn._mixer import AbstractLayer

Mixer = TypeVar("Mixer", bound=AbstractLayer)


def count_layers(mixer: Callable[[PRNGKeyArray], Mixer] | tuple[Mixer, ...], num_layers: int | None) -> int:
    """The number of layers, of a tuple of mixers or of a factory."""
    if isinstance(mixer, AbstractLayer):
        raise ValueError(
            f"mixer must be a factory `key -> mixer` or a tuple of mixers; got one {type(mixer).__name__}, "
            "whose weights all layers would share. Write `lambda key: ...`."
        )
    if isinstance(mixer, tuple):
        if not mixer:
            raise ValueError("A model needs at least one layer; got an empty tuple of mixers.")
        if num_layers not in (None, len(mixer)):
            raise ValueError(
                f"num_layers={num_layers} must be the number of mixers, or left out; got {len(mixer)} mixers."
            )
        if len({id(layer) for layer in mixer}) < len(mixer):
            raise ValueError("Every layer needs a mixer of its own; got one object twice. Build each from a new key.")
        return len(mixer)
    if not callable(mixer):
        raise ValueError(
            f"mixer must be a factory `key -> mixer` or a tuple of mixers; got a {type(mixer).__name__}. Write "
            "`tuple(mixers)`."
        )
    if num_layers is None or num_layers < 1:
        raise ValueError(f"A factory of mixers needs num_layers of at least 1; got {num_layers}.")
    return num_layers


def token_rows(table: Float[Array, "V D"], tokens: Int[Array, "*L"]) -> Float[Array, "*L D"]:
    """Rows of an embedding. A token outside gives NaN, or an error where S5EQX_DEBUG=1 is set."""
    if os.environ.get("S5EQX_DEBUG") == "1":
        tokens = error_if(
            tokens,
            (tokens < 0) | (tokens >= len(table)),
            f"Every token must lie in [0, vocab_size={len(table)}), and one does not. Check what made the tokens, or "
            "build the model with a larger vocab_size.",
        )
    return rows(table, tokens)


def rows(table: Float[Array, "V D"], index: Int[Array, "*L"]) -> Float[Array, "*L D"]:
    """Rows of a table; NaN where the index is outside."""
    return jnp.asarray(table).at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
