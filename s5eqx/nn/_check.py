"""Checks of layers against each other while a model is built."""

import equinox as eqx
import jax
from jax.typing import DTypeLike

from s5eqx.nn._mixer import AbstractCausalMixer


def check_causal(mixer: object, name: str) -> None:
    """Refuses what cannot stream."""
    if not isinstance(mixer, AbstractCausalMixer):
        raise ValueError(
            f"{name} must be causal, an `AbstractCausalMixer` with `init_state`, `prefill` and `step`; got "
            f"{type(mixer).__name__}. A layer that looks ahead, such as `BidirectionalS5`, cannot stream."
        )


def check_width(mixer: AbstractCausalMixer, width: int, dtype: DTypeLike, name: str) -> None:
    """Refuses a mixer that does not map (width,) to (width,). Shapes only: nothing is computed."""
    mixer = eqx.nn.inference_mode(mixer)
    x_t = jax.ShapeDtypeStruct((width,), dtype)
    try:
        y_t = jax.eval_shape(lambda x_t: mixer.step(mixer.init_state(), x_t)[1], x_t)
    except Exception as error:
        raise ValueError(
            f"{name} must map width {width} to width {width}, but {type(mixer).__name__} refuses such an "
            "input. Build it with that width."
        ) from error
    if y_t.shape != (width,):
        raise ValueError(
            f"{name} must map width {width} to width {width}, but {type(mixer).__name__} returns "
            f"{y_t.shape}. Build it with that width."
        )
