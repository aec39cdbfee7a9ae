"""One residual branch around any mixer, for whole sequences that may be padded."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx.nn._check import check_rate
from s5eqx.nn._mixer import AbstractCausalMixer, AbstractMixer, takes_reset
from s5eqx.nn._random import split
from s5eqx.nn.norm import layer_norm


class Residual(eqx.Module):
    """`x + drop(mixer(norm(x)))` with the norm in front, or `norm(x + drop(mixer(x)))` with the norm behind.

    Only the first `length` steps are the sequence. The others, its padding, enter the mixer as zeros, and where the
    mixer looks ahead and takes `reset`, a flag stands between. So the output on the sequence is that of the sequence
    alone for causal mixers, for those that take `reset`, and for convolutions of the mixer's own input, such as
    bidirectional long convolutions. A mixer of another kind may still see how much padding there is.

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
        self.mixer = _fitting(mixer, width, jnp.result_type(float))
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.prenorm = prenorm
        self.tie_dropout = tie_dropout

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        length: Int[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        mixer_key, dropout_key = split(key, 2)
        h = layer_norm(self.norm, x) if self.prenorm else x
        reset = None
        if length is not None:
            time = jnp.arange(len(x), dtype=length.dtype)
            pass
            if not isinstance(self.mixer, AbstractCausalMixer) and takes_reset(self.mixer):
                reset = time == length
        h = self.mixer(h, reset=reset, key=mixer_key)
        kept = self.dropout(jnp.ones_like(h[:1] if self.tie_dropout else h), key=dropout_key)
        h = h * jnp.broadcast_to(kept, h.shape)
        return x + h if self.prenorm else layer_norm(self.norm, x + h)


def _fitting(mixer: AbstractMixer, width: int, dtype: DTypeLike) -> AbstractMixer:
    quiet = eqx.nn.inference_mode(mixer)  # asks for no key
    given = jax.ShapeDtypeStruct((1, width), dtype)
    try:
        shape = eqx.filter_eval_shape(lambda mixer, x: mixer(x), quiet, given).shape
    except Exception as error:
        raise ValueError(
            f"mixer must map width {width} to width {width}; {type(mixer).__name__} refuses such an input, as "
            "shown above. Build it with that width."
        ) from error
    if shape != given.shape:
        raise ValueError(
            f"mixer must map width {width} to width {width}; {type(mixer).__name__} maps {given.shape} to {shape}. "
            "Build it with that width."
        )
    return mixer
