"""Pendulum: the angle of a pendulum from noisy pictures of it, taken at irregular times."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray
from s5eqx.data.synthetics._synthetic import AbstractSeriesTask, some_places

GRAVITY = 9.81
"""g / l, per square second."""
SPACING = 0.05
"""Seconds between two times of the grid."""
SUBSTEPS = 4
"""Steps of the integration in `SPACING`."""
WANDER = 0.2
"""The most by which the clearness changes from one time to the next."""


def swing(
    angle: Float[Array, ""], friction: float, num_times: int
) -> tuple[Float[Array, " times"], Float[Array, " times"]]:
    """The angles and velocities of a pendulum that is let go at `angle`, at times SPACING, 2 SPACING, ...

    By the classical Runge-Kutta method.
    """
    h = SPACING / SUBSTEPS
    slope = lambda q, v: (v, -GRAVITY * jnp.sin(q) - friction * v)

    def step(state, _):
        q, v = state
        q1, v1 = slope(q, v)
        q2, v2 = slope(q + h / 2 * q1, v + h / 2 * v1)
        q3, v3 = slope(q + h / 2 * q2, v + h / 2 * v2)
        q4, v4 = slope(q + h * q3, v + h * v3)
        state = q + h / 6 * (q1 + 2 * q2 + 2 * q3 + q4), v + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        return state, state

    _, (angles, velocities) = jax.lax.scan(step, (angle, jnp.zeros_like(angle)), length=num_times * SUBSTEPS)
    return angles[SUBSTEPS - 1 :: SUBSTEPS], velocities[SUBSTEPS - 1 :: SUBSTEPS]


def pictures(angles: Float[Array, " L"], size: int) -> Float[Array, "L size size"]:
    """The bob at each angle, a Gaussian spot as bright as 1; angle 0 points down, that is to the last row."""
    centres = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size - 0.5
    spot = lambda at: jnp.exp(-(((centres[None] - 0.35 * at[:, None]) / 0.05) ** 2) / 2)
    return spot(jnp.cos(angles))[:, :, None] * spot(jnp.sin(angles))[:, None, :]


@dataclasses.dataclass(frozen=True)
class Pendulum(AbstractSeriesTask):
    """Pictures of a swinging pendulum, to each of which belong the sine and cosine of its angle, 0 hanging down.

    It is let go at time 0, at an angle uniform on the circle, and obeys

        θ'' = -(g / l) sin θ - friction θ',    g / l = 9.81 / s².

    Of `num_times` times, 0.05 s from each other, `length` are drawn without replacement. `intervals` counts times from
    one picture to the next, and from time 0 to the first. The inputs are the pixels, row by row.

    A picture is `c picture + (1 - c) noise` with noise uniform in [0, 1]. Its clearness c comes from a walk r between 0
    and 1, over all times, by steps uniform in [-0.2, 0.2] and reflected at both ends: c is 0 where r < a, 1 where r > b
    and linear between, with a uniform in [0, 1/4] and b in [3/4, 1] for each example. An eighth of the pictures are
    thus nothing but noise, an eighth are clean.

    All steps count, in training too. To answer always (0, 0) costs a squared error of 1/2 an output; to answer the
    mean, 0.37, their variance.

    Source: Becker et al., "Recurrent Kalman Networks" (arXiv 1905.07357), at irregular times as in Schirmer et al.,
    "Continuous Recurrent Units" (arXiv 2111.11344), and in section 6.3 of the S5 paper (arXiv 2208.04933).

    Differs from the reference: the bob is shown, not a line; times are 0.05 s from each other and the pendulum is a
    point mass, where CRU has 0.01 s and a rod; its velocity is not kicked at random; r is reflected, not clipped; the
    first pictures are as noisy as the others. Example i is a function of (seed, i), in place of 4000 sequences.

    **Arguments:** those of every synthetic task, and

    - `num_times`: times at which a picture may be taken, 0.05 s from each other.
    - `length`: L, the pictures that are taken, at most `num_times`.
    - `size`: of a picture, in pixels, at least 10. A step has `size * size` inputs.
    - `friction`: per second, between 0 and 10.
    - `noise`: False for clean pictures.
    - `intervals`: False to keep the times secret.
    """

    num_times: int = 100
    length: int = 50
    size: int = 24
    friction: float = 0.1
    noise: bool = True
    intervals: bool = True

    num_outputs = 2

    def __post_init__(self):
        if not 1 <= self.length <= self.num_times:
            raise ValueError(
                f"length must lie between 1 and num_times={self.num_times}, got {self.length}; take fewer pictures or "
                f"a longer time"
            )
        if self.size < 10:
            raise ValueError(f"the bob must be wider than a pixel: size must be at least 10, got {self.size}")
        if not 0 <= self.friction <= 10:
            raise ValueError(f"friction must lie between 0 and 10 per second, got {self.friction}")
        self.check_sizes()

    @property
    def sequence_length(self) -> int:
        return self.length

    @property
    def num_features(self) -> int:
        return self.size**2

    def draw(self, key: PRNGKeyArray) -> dict[str, Array]:
        start_key, times_key, clear_key, noise_key = jr.split(key, 4)
        angles, _ = swing(jr.uniform(start_key, (), jnp.float32, -math.pi, math.pi), self.friction, self.num_times)
        chosen = some_places(self.length, jr.bits(times_key, (self.num_times,), dtype=jnp.uint32))
        places = jnp.flatnonzero(chosen, size=self.length).astype(jnp.int32)
        angles = angles[places]
        inputs = pictures(angles, self.size).reshape(self.length, -1)
        if self.noise:
            clear = self._clearness(clear_key)[places][:, None]
            inputs = clear * inputs + (1 - clear) * jr.uniform(noise_key, inputs.shape, jnp.float32)
        targets = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=1)
        times = {"intervals": jnp.diff(places, prepend=jnp.int32(-1)).astype(jnp.float32)} if self.intervals else {}
        return {"inputs": inputs, "targets": targets, **times}

    def trained(self) -> Bool[np.ndarray, " L"]:
        return np.ones(self.length, bool)

    def asked(self) -> Bool[np.ndarray, " L"]:
        return np.ones(self.length, bool)

    def num_distinct(self) -> float:
        return math.inf

    def _clearness(self, key: PRNGKeyArray) -> Float[Array, " times"]:
        """How much of the picture is seen at each time; the rest is noise."""
        u = jr.uniform(key, (self.num_times + 2,), jnp.float32)
        low, high = u[0] / 4, 1 - u[1] / 4
        walk = jnp.cumsum(jnp.concatenate([u[2:3], WANDER * (2 * u[3:] - 1)]))
        walk = jnp.abs((walk + 1) % 2 - 1)
        return jnp.clip((walk - low) / (high - low), 0, 1)
