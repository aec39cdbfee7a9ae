"""One residual branch around any mixer, for whole sequences that may be padded."""

import equinox as eqx
import jax.numpy as jnp

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx.nn._check import check_rate, check_width
from s5eqx.nn._mixer import AbstractMixer
from s5eqx.nn._random import split
from s5eqx.nn._select import before_padding, keep_rows
from s5eqx.nn.mlp import MLP
from s5eqx.nn.norm import layer_norm


class Residual(eqx.Module):
    """`x + drop(mixer(norm(x)))` with the norm in front, or `norm(x + drop(mixer(x)))` with the norm behind.

    Only the first `length` steps are the sequence. The others, its padding, enter the mixer as zeros. So the output on
    the sequence is that of the sequence alone, for causal mixers and for those that look ahead but make nothing of
    zeros, as all of this library.

    `intervals`, the times between samples, go to a mixer that takes them. An `MLP` needs none, and any other mixer is
    refused. In the padding they have no effect.

    Source: the residual blocks of the S4 and S5 papers (arXiv 2111.00396, 2208.04933).
    """

    norm: eqx.nn.LayerNorm
    mixer: AbstractMixer
    dropout: eqx.nn.Dropout
    prenorm: bool = eqx.field(static=True)
    tie_dropout: bool = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        mixer: AbstractMixer,
        *,
        dropout: float = 0.0,
        tie_dropout: bool = False,
        prenorm: bool = True,
    ):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `mixer`: causal or not, of this width.
        - `dropout`: the probability to drop an entry of the branch.
        - `tie_dropout`: drop a channel at all steps or at none.
        - `prenorm`: normalise what enters the branch, not the sum.
        """
        self.norm = eqx.nn.LayerNorm(width)
        self.mixer = check_width(mixer, width, jnp.result_type(float), "mixer")
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.prenorm = prenorm
        self.tie_dropout = tie_dropout

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        length: Int[Array, ""] | None = None,
        intervals: Float[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        mixer_key, dropout_key = split(key, 2)
        h = layer_norm(self.norm, x) if self.prenorm else x
        if length is not None:
            inside = before_padding(length, len(x))
            h = keep_rows(inside, h)
            if intervals is not None:  # behind its last sample a sequence has the interval of its first
                intervals = jnp.where(inside, intervals, intervals[:1])
        h = self._mix(h, intervals, mixer_key)
        h = dropped(self.dropout, h, tied=self.tie_dropout, key=dropout_key)
        return x + h if self.prenorm else layer_norm(self.norm, x + h)

    def _mix(self, h, intervals, key):
        if intervals is None or isinstance(self.mixer, MLP):
            return self.mixer(h, key=key)
        if not self.mixer.takes_intervals:
            raise ValueError(
                "`intervals` need mixers that take them, as `S5` and `BidirectionalS5` do; got "
                f"{type(self.mixer).__name__}, to which all steps are alike. Use one that takes them, or leave "
                "`intervals` out."
            )
        return self.mixer(h, intervals=intervals, key=key)  # pyright: ignore[reportCallIssue]


def dropped(
    dropout: eqx.nn.Dropout, h: Float[Array, "*L D"], *, tied: bool, key: PRNGKeyArray | None
) -> Float[Array, "*L D"]:
    """Some entries of a branch at zero; `tied` for a channel at all steps or at none."""
    like = h[(slice(1),) * (h.ndim - 1)] if tied else h
    return h * jnp.broadcast_to(dropout(jnp.ones_like(like), key=key), h.shape)
