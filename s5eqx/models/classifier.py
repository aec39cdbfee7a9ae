"""Classifiers of whole sequences, and of pairs of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx.models._head import dense, wide
from s5eqx.models.init import AbstractInit, DefaultInit
from s5eqx.models.sequence_encoder import SequenceEncoder
from s5eqx.nn._random import split


class Classifier(eqx.Module):
    """Logits of one sequence, at least float32: `decoder(body(x))`."""

    body: SequenceEncoder
    decoder: eqx.nn.Linear

    def __init__(
        self, body: SequenceEncoder, num_classes: int, *, init: AbstractInit = DefaultInit(), key: PRNGKeyArray
    ):
        """**Arguments:** `body`; `num_classes`; `init`, which redraws the decoder."""
        layer_key, init_key = jr.split(key)
        self.body = body
        self.decoder = init.block(init_key, dense(body.width, num_classes, "num_classes", layer_key), 1)

    @checked
    def __call__(
        self,
        x: Float[Array, "L features"] | Int[Array, " L"],
        *,
        length: Int[Array, ""] | None = None,
        intervals: Float[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " classes"]:
        return wide(self.decoder, self.body(x, length=length, intervals=intervals, key=key))


class RetrievalClassifier(eqx.Module):
    """Logits of a pair of sequences, such as whether they belong together, at least float32. With `u, v` the vectors
    of one `body`,

        decoder(gelu(hidden([u, v, u * v, u - v])))

    Source: the retrieval head of the S5 code, branch `main`, for the Long Range Arena (arXiv 2011.04006).
    """

    body: SequenceEncoder
    hidden: eqx.nn.Linear
    decoder: eqx.nn.Linear

    def __init__(
        self, body: SequenceEncoder, num_classes: int, *, init: AbstractInit = DefaultInit(), key: PRNGKeyArray
    ):
        """**Arguments:** `body`; `num_classes`; `init`, which redraws the head."""
        hidden_key, decoder_key, *init_keys = jr.split(key, 4)
        self.body = body
        self.hidden = init.block(init_keys[0], eqx.nn.Linear(4 * body.width, body.width, key=hidden_key), 1)
        self.decoder = init.block(init_keys[1], dense(body.width, num_classes, "num_classes", decoder_key), 1)

    @checked
    def __call__(
        self,
        x: Float[Array, "L features"] | Int[Array, " L"],
        other: Float[Array, "M features"] | Int[Array, " M"],
        *,
        length: Int[Array, ""] | None = None,
        other_length: Int[Array, ""] | None = None,
        intervals: Float[Array, " L"] | None = None,
        other_intervals: Float[Array, " M"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " classes"]:
        key, other_key = split(key, 2)
        u = self.body(x, length=length, intervals=intervals, key=key)
        v = self.body(other, length=other_length, intervals=other_intervals, key=other_key)
        hidden = wide(self.hidden, jnp.concatenate([u, v, u * v, u - v]))
        return wide(self.decoder, jax.nn.gelu(hidden))
