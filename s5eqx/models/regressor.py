"""A prediction at every step of a sequence."""

import equinox as eqx
import jax.random as jr

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx.models._head import dense, wide
from s5eqx.models.init import AbstractInit, DefaultInit
from s5eqx.models.sequence_encoder import SequenceEncoder


class Regressor(eqx.Module):
    """Real numbers at every step, at least float32: `decoder(body.features(x))`.

    Where the mixers are causal, the prediction at t depends on what came up to t alone.

    Source: the pendulum regression of the S5 paper (arXiv 2208.04933).
    """

    body: SequenceEncoder
    decoder: eqx.nn.Linear

    def __init__(
        self, body: SequenceEncoder, num_outputs: int, *, init: AbstractInit = DefaultInit(), key: PRNGKeyArray
    ):
        """**Arguments:** `body`, whose pool is not used; `num_outputs`, the numbers at a step; `init`, which redraws
        the decoder."""
        layer_key, init_key = jr.split(key)
        self.body = body
        self.decoder = init.block(init_key, dense(body.width, num_outputs, "num_outputs", layer_key), 1)

    @checked
    def __call__(
        self,
        x: Float[Array, "L features"] | Int[Array, " L"],
        *,
        length: Int[Array, ""] | None = None,
        intervals: Float[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L outputs"]:
        """What it predicts in the padding means nothing."""
        return wide(self.decoder, self.body.features(x, length=length, intervals=intervals, key=key))
