"""The body of classifiers and regressors: a sequence in, a vector at every step out, or one for all."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx._varying import error_if
from s5eqx.models._parts import count_layers, token_rows
from s5eqx.models.init import AbstractInit, DefaultInit
from s5eqx.models.pool import AbstractPool, MeanPool
from s5eqx.nn._mixer import AbstractMixer
from s5eqx.nn._random import split
from s5eqx.nn._select import before_padding
from s5eqx.nn.linear import linear
from s5eqx.nn.mlp import MLP
from s5eqx.nn.norm import layer_norm
from s5eqx.nn.residual import Residual


class SequenceEncoder(eqx.Module):
    """A sequence in, one vector out: `pool(norm(residual_n(... residual_1(encoder(x)))))`; `features` is all but the
    pool, a vector at every step.

    A layer is a residual branch of its mixer, and one of an MLP where `mlp_width` is given. Mixers may look ahead.

    `length` says how many steps of `x` are the sequence. What the padding behind it holds has no effect, not even NaN,
    and has gradient zero. The vector is that of `x[:length]`, for the mixers that `Residual` names.

    `intervals` are the times between samples that are not equally spaced, as `S5` takes them. Every mixer must take
    them, as `S5` and `BidirectionalS5` do.

    Source: the classifiers of the S4 and S5 papers (arXiv 2111.00396, 2208.04933).
    """

    encoder: eqx.nn.Linear | eqx.nn.Embedding
    residuals: tuple[Residual, ...]
    norm: eqx.nn.LayerNorm | None
    pool: AbstractPool
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        encoder: eqx.nn.Linear | eqx.nn.Embedding,
        mixer: Callable[[PRNGKeyArray], AbstractMixer] | tuple[AbstractMixer, ...],
        *,
        num_layers: int | None = None,
        mlp_width: int | None = None,
        pool: AbstractPool = MeanPool(),
        dropout: float = 0.0,
        tie_dropout: bool = False,
        prenorm: bool = True,
        remat: bool = False,
        init: AbstractInit = DefaultInit(),
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `encoder`: `eqx.nn.Linear(features, width)` for features, `eqx.nn.Embedding(vocab_size, width)` for tokens.
            A token outside is treated as in `LanguageModel`.
        - `mixer`: a factory `key -> mixer`, called once for each layer; or a tuple of built mixers.
        - `num_layers`: number of layers; may be left out for a tuple.
        - `mlp_width`: hidden channels of each layer's MLP; None goes without.
        - `pool`: `MeanPool()` or `LastPool()`.
        - `dropout`: the probability to drop an entry of a branch.
        - `tie_dropout`: drop a channel at all steps or at none.
        - `prenorm`: normalise what enters a branch, and once at the end; otherwise each sum.
        - `remat`: compute the inside of a branch again in the backward pass instead of keeping it.
        - `init`: draws the embedding and redraws the dense layers.
        """
        if not isinstance(encoder, eqx.nn.Linear | eqx.nn.Embedding):
            raise ValueError(
                f"encoder must be an `eqx.nn.Linear` or an `eqx.nn.Embedding`; got a {type(encoder).__name__}."
            )
        num_layers = count_layers(mixer, num_layers)
        encoder_key, mixer_key, mlp_key, init_key = jr.split(key, 4)
        mixers = mixer if isinstance(mixer, tuple) else tuple(map(mixer, jr.split(mixer_key, num_layers)))
        if isinstance(encoder, eqx.nn.Embedding):
            width = encoder.embedding_size
            self.encoder = eqx.tree_at(lambda e: e.weight, encoder, init.table(encoder_key, encoder.weight))
        else:
            width = encoder.weight.shape[0]
            self.encoder = init.block(encoder_key, encoder, 1)
        branches: list[AbstractMixer] = []
        for layer, layer_key in zip(mixers, jr.split(mlp_key, num_layers), strict=True):
            branches += [layer] if mlp_width is None else [layer, MLP(width, mlp_width, key=layer_key)]
        options = {"dropout": dropout, "tie_dropout": tie_dropout, "prenorm": prenorm}
        self.residuals = tuple(
            init.block(branch_key, Residual(width, branch, **options), len(branches))
            for branch, branch_key in zip(branches, jr.split(init_key, len(branches)), strict=True)
        )
        self.norm = eqx.nn.LayerNorm(width) if prenorm else None
        self.pool = pool
        self.remat = remat

    @property
    def width(self) -> int:
        return self.residuals[0].norm.shape[0]

    @checked
    def __call__(
        self,
        x: Float[Array, "L features"] | Int[Array, " L"],
        *,
        length: Int[Array, ""] | None = None,
        intervals: Float[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " D"]:
        return self.pool(self.features(x, length=length, intervals=intervals, key=key), length)

    @checked
    def features(
        self,
        x: Float[Array, "L features"] | Int[Array, " L"],
        *,
        length: Int[Array, ""] | None = None,
        intervals: Float[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        """What is pooled. At the first `length` steps it is that of `x[:length]`; in the padding it means nothing."""
        if not len(x):
            raise ValueError("A sequence must have at least one step; got none.")
        if length is not None:
            length = _inside(length, len(x))
            inside = before_padding(length, len(x))
            x = jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
        h = self._encode(x)
        apply = lambda residual, h, key: residual(h, length=length, intervals=intervals, key=key)
        for residual, residual_key in zip(self.residuals, split(key, len(self.residuals)), strict=True):
            h = (eqx.filter_checkpoint(apply) if self.remat else apply)(residual, h, residual_key)
        return h if self.norm is None else layer_norm(self.norm, h)

    def _encode(self, x):
        if isinstance(self.encoder, eqx.nn.Embedding):
            return token_rows(self.encoder.weight, x)
        return linear(self.encoder, x.astype(self.encoder.weight.dtype))


def _inside(length: Int[Array, ""], steps: int) -> Int[Array, ""]:
    length = length.astype(jnp.int32)
    return error_if(
        length,
        (length < 1) | (length > steps),
        f"length counts the steps before the padding and must lie in [1, {steps}]. Drop empty sequences, and pad to "
        "the longest.",
    )
