"""How likely a sequence is under a language model."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from s5eqx._typing import Array, Float, Int, checked
from s5eqx.models._pieces import check_streams, in_pieces


@checked
def score(model: Callable[..., Array], tokens: Int[Array, "*B L"], chunk: int | None = None) -> Float[Array, "*B"]:
    """The log-likelihood of each sequence, in nats and at least float32, without dropout:

        sum over t >= 1 of log p(tokens[t] | tokens[:t])

    The first token is given: a sequence of one scores 0. A token outside the vocabulary is an error; where tokens are
    traced, by `jax.jit` or `jax.vmap`, the score of its sequence is NaN.

    **Arguments:**

    - `model`: logits of the next token, of one sequence; causal, with `init_state` and `prefill`.
    - `chunk`: the steps of a piece; None for whole sequences. A piece passes through all layers before the next one
      starts from the state that it left, so activations need memory for a piece, whatever the length. The score is the
      same.
    """
    check_streams(model, "score", "give it both, or take a `LanguageModel`")
    if tokens.shape[-1] == 0:
        raise ValueError(f"A sequence needs at least one token to have a score; got tokens of shape {tokens.shape}.")
    scores, vocab_size = _score(model, tokens, chunk)
    if not isinstance(tokens, Tracer) and getattr(tokens, "is_fully_addressable", True):
        _check_tokens(np.asarray(tokens), vocab_size)
    return scores


def _check_tokens(tokens, vocab_size):
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"Every token must lie in [0, vocab_size={vocab_size}); got {outside[0]}. Check what made the tokens, or "
            "build the model with a larger vocab_size."
        )


@eqx.filter_jit
def _score(model, tokens, chunk):
    model = eqx.nn.inference_mode(model)
    one = jnp.zeros(1, jnp.int32)
    vocab_size = jax.eval_shape(lambda: model.prefill(model.init_state(), one, key=None))[1].shape[-1]
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.promote_types(tokens.dtype, np.int32))
    inside = jnp.all((rows >= 0) & (rows < vocab_size), axis=1)
    following = jnp.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    scores = jnp.sum(in_pieces(_log_likelihood, model, rows, following, chunk), axis=0)
    return jnp.where(inside, scores, jnp.nan).reshape(tokens.shape[:-1]), vocab_size


def _log_likelihood(logits, following):
    """Of what follows each position, summed over positions; nothing follows where it is negative."""
    log_p = jax.nn.log_softmax(logits.astype(np.promote_types(logits.dtype, np.float32)))
    log_p = jnp.take_along_axis(log_p, jnp.maximum(following, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(following >= 0, log_p, 0), axis=-1)
