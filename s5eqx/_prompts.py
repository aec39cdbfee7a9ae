"""What `generate` is asked: prompts and stop tokens as NumPy arrays, and what a model cannot take."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from s5eqx._typing import Array, Integer, PyTree
from s5eqx.models import LanguageModel
from s5eqx.nn import AbstractCausalMixer, Attention
from s5eqx.nn.convolution import AbstractConvolution

Prompt = Integer[Array, " L"] | Integer[Array, "B L"] | Sequence[Any]


def refuse_tracers(tree: PyTree) -> None:
    """Refuses values that `jax.jit` or `jax.vmap` has not computed yet."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise ValueError("generate and stream run their loop on the host: call them outside jax.jit and jax.vmap.")


def is_batch(prompt: Prompt) -> bool:
    """Whether there are several prompts."""
    return (isinstance(prompt, list | tuple) and any(np.ndim(row) for row in prompt)) or np.ndim(prompt) > 1


def read_prompts(prompt: Prompt) -> list[Integer[np.ndarray, " _"]]:
    """Each prompt, of at least one token."""
    refuse_tracers(prompt)
    rows = [np.asarray(row) for row in (prompt if is_batch(prompt) else [prompt])]
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        raise ValueError(
            "Every prompt must be a sequence of at least one token; got shapes "
            f"{[row.shape for row in rows]}. To start from nothing, give the token that starts a text."
        )
    return [_integers(row, "prompt") for row in rows]


def read_stop(stop: int | Sequence[Any] | None) -> Integer[np.ndarray, " n"]:
    """The stop tokens, if any."""
    return _integers(np.atleast_1d(() if stop is None else stop), "stop")


def _integers(tokens, name):
    if not tokens.size:
        return tokens.astype(int)
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"Every token of {name} must be an integer; got {tokens.dtype}.")
    return tokens


def check_request(
    model: AbstractCausalMixer,
    vocab_size: int,
    rows: list[Integer[np.ndarray, " _"]],
    num_tokens: int,
    stop: Integer[np.ndarray, " n"],
) -> None:
    """Refuses what the model cannot take: tokens outside its vocabulary, sequences longer than its longest."""
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1; got {num_tokens}.")
    for name, tokens in [("prompt", row) for row in rows] + [("stop", stop)]:
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise ValueError(f"Every token of {name} must lie in [0, {vocab_size}); got {outside[0]}.")
    bounded = lambda node: isinstance(node, AbstractConvolution | Attention)
    limits = [node.max_length for node in jax.tree.leaves(model, is_leaf=bounded) if bounded(node)]
    if isinstance(model, LanguageModel) and model.positions is not None:
        limits.append(len(model.positions))
    limit = min((n for n in limits if n is not None), default=None)
    longest = max(map(len, rows))
    if limit is not None and longest + num_tokens > limit:
        raise ValueError(
            f"The model takes sequences of at most {limit} tokens; got a prompt of {longest} and num_tokens="
            f"{num_tokens}. Ask for fewer, shorten the prompt, or build the model with a larger max_length."
        )
