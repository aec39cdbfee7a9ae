"""Shapes: which of six shapes is seen in an uneven light, on a grid of any resolution."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray
from s5eqx.data._task import AbstractBatch, ImageBatch
from s5eqx.data.synthetics._synthetic import AbstractSynthetic

WAVES = 6
"""Waves that the light is made of."""
LIGHT = 0.15
"""Deviation of the light."""
CYCLES = 1.5
"""The most cycles of a wave on each axis of the picture."""

REACH = 1.2
"""How far from its middle a shape extends, in units of its radius."""


def distances(x: Float[Array, "*grid"], y: Float[Array, "*grid"]) -> Float[Array, "*grid 6"]:
    """How far a point lies outside of each shape around 0, negative inside, in units of the shape's radius."""
    r = jnp.hypot(x, y)
    square = _box(x, y, 0.8, 0.8)
    bars = jnp.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0))
    half = math.sqrt(3) / 2
    sides = jnp.maximum(-y, half * jnp.abs(x) + y / 2)  # of the triangle, each as far from 0
    return jnp.stack(
        [r - 0.9, jnp.abs(r - 0.75) - 0.25, square, jnp.abs(square + 0.2) - 0.2, sides - 0.6, bars], axis=-1
    )


def _box(x, y, width, height):
    x, y = jnp.abs(x) - width, jnp.abs(y) - height
    return jnp.hypot(jnp.maximum(x, 0), jnp.maximum(y, 0)) + jnp.minimum(jnp.maximum(x, y), 0)


@dataclasses.dataclass(frozen=True)
class Shapes(AbstractSynthetic):
    """Pictures of one shape, to be named: a disc, a ring, a square, a frame, a triangle or a cross.

    The picture is a function on the unit square. A shape of radius 0.2 to 0.35 lies anywhere inside, turned by any
    angle, lighter or darker by 0.4 to 1. The light is uneven: a sum of six waves of normal amplitudes, with a deviation
    of 0.15 in all, each of up to 1.5 cycles on an axis. A pixel is the mean over its square: exactly for the light, and
    for the shape as if its edge were straight within a pixel and along an axis. So example i is the same picture at
    every `size`, coarser or finer. Who always says the same is right in 1/6 of all cases.

    **Arguments:** those of every synthetic task, and

    - `size`: pixels of a picture along each side.
    """

    size: int = 16

    batch: ClassVar[type[AbstractBatch]] = ImageBatch
    names: ClassVar[tuple[str, ...]] = ("disc", "ring", "square", "frame", "triangle", "cross")
    num_classes: ClassVar[int] = 6
    num_features: ClassVar[int] = 1

    def __post_init__(self):
        if self.size < 4:
            raise ValueError(f"a shape must be some pixels wide: size must be at least 4, got {self.size}")
        self.check_sizes()

    @property
    def sequence_length(self) -> int:
        return self.size**2

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        name_key, shape_key, light_key, waves_key = jr.split(key, 4)
        name = jr.randint(name_key, (), 0, self.num_classes, jnp.int32)
        u = jr.uniform(shape_key, (6,), jnp.float32)
        radius, turn = 0.2 + 0.15 * u[0], 2 * math.pi * u[1]
        contrast = jnp.where(u[2] < 0.5, -1, 1) * (0.4 + 0.6 * u[3])
        places = (jnp.arange(self.size, dtype=jnp.float32) + 0.5) / self.size
        margin = REACH * radius
        right = places[None, :] - margin - (1 - 2 * margin) * u[4]
        down = places[:, None] - margin - (1 - 2 * margin) * u[5]
        x = (jnp.cos(turn) * right + jnp.sin(turn) * down) / radius
        y = (jnp.cos(turn) * down - jnp.sin(turn) * right) / radius
        inside = jnp.clip(0.5 - distances(x, y)[..., name] * radius * self.size, 0, 1)
        picture = contrast * inside + self._light(places, light_key, waves_key)
        return {"inputs": picture[..., None], "targets": name}

    def trained(self) -> Bool[np.ndarray, ""]:
        return np.ones((), bool)

    def asked(self) -> Bool[np.ndarray, ""]:
        return np.ones((), bool)

    def num_distinct(self) -> float:
        return math.inf

    def _light(self, places, amplitudes_key, waves_key):
        amplitudes = LIGHT * math.sqrt(2 / WAVES) * jr.normal(amplitudes_key, (WAVES,), jnp.float32)
        u = jr.uniform(waves_key, (3, WAVES), jnp.float32, -1, 1)
        kx, ky, phase = CYCLES * u[0], CYCLES * u[1], u[2] / 2
        right, down = places[:, None] * kx[None] + phase[None], places[:, None] * ky[None]
        shares = jnp.sinc(kx / self.size) * jnp.sinc(ky / self.size)  # that a wave keeps in the mean over a pixel
        waves = jnp.cos(2 * math.pi * (right[None] + down[:, None]))
        return jnp.matmul(waves, amplitudes * shares, precision="highest")
