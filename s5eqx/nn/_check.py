"""Checks of layers against each other while a model is built."""

from typing import TypeVar

import equinox as eqx
import jax
from jax.typing import DTypeLike

from s5eqx.nn._mixer import AbstractCausalMixer, AbstractLayer, AbstractMixer

Layer = TypeVar("Layer", bound=AbstractLayer)


def check_mixer(mixer: AbstractMixer, width: int, dtype: DTypeLike, name: str) -> AbstractCausalMixer:
    """Refuses a mixer that cannot stream, or that does not map (L, width) to (L, width). Nothing is computed."""
    if not isinstance(mixer, AbstractCausalMixer):
        raise ValueError(
            f"{name} must be causal, an `AbstractCausalMixer` with `init_state`, `prefill` and `step`; got "
            f"{type(mixer).__name__}. A layer that looks ahead, such as `BidirectionalS5`, cannot stream."
        )
    check_width(mixer, width, dtype, name)
    return mixer


def check_width(mixer: Layer, width: int, dtype: DTypeLike, name: str, *, num_axes: int = 1) -> Layer:
    """Refuses a mixer that does not map (*L, width) to (*L, width), with so many axes L. Nothing is computed."""
    shape = (*(1,) * num_axes, width)
    quiet = eqx.nn.inference_mode(mixer)  # asks for no key
    try:
        y = eqx.filter_eval_shape(lambda mixer, x: mixer(x), quiet, jax.ShapeDtypeStruct(shape, dtype))
    except Exception as error:  # whatever the mixer finds wrong with such an input
        raise ValueError(
            f"{name} must map width {width} to width {width}; {type(mixer).__name__} refuses such an input, as "
            "shown above. Build it with that width."
        ) from error
    if y.shape != shape:
        raise ValueError(
            f"{name} must map width {width} to width {width}; {type(mixer).__name__} returns {y.shape[num_axes:]}. "
            "Build it with that width."
        )
    return mixer


def check_rate(rate: float, name: str) -> float:
    """Refuses what is no probability to drop something."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is a probability to drop and lies in [0, 1); got {rate}.")
    return rate
