"""Operators between fields: where a partial differential equation leads from an initial field within some time."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, checked
from s5eqx.data._random_order import in_epochs
from s5eqx.data._task import AbstractCorpus, FieldBatch
from s5eqx.nn import AbstractBasis, Cosine, Fourier

TRAIN, TEST = range(2)
"""The streams of random fields that a seed holds."""

CHUNK = 256
"""Examples that are made at once."""


@checked
def random_coefficients(
    key: PRNGKeyArray, bases: Sequence[AbstractBasis], modes: Sequence[int], *, length: float, smoothness: float
) -> Float[Array, "*modes"]:
    """The coefficients of a Gaussian random field on the unit interval, square or cube.

    Independent normals whose variance falls with the frequency f, and is 1 together: so is the field's mean square.

        variance ~ (1 + (2 pi length |f|)^2)^(-smoothness)

    **Arguments:** `bases` and `modes`, one for each axis; `length`, the distance over which the field varies;
    `smoothness`, how fast the spectrum falls beyond the frequencies of that distance.
    """
    axes = np.meshgrid(*(basis.frequencies(m) for basis, m in zip(bases, modes, strict=True)), indexing="ij")
    squares = sum(f**2 for f in axes)
    variance = (1 + (2 * math.pi * length) ** 2 * squares) ** -smoothness
    scale = np.sqrt(variance / variance.sum()).astype(np.float32)
    return scale * jr.normal(key, scale.shape, jnp.float32)


@checked
def burgers(u: Float[Array, "*batch n"], viscosity: float, time: float, *, num_steps: int) -> Float[Array, "*batch n"]:
    """The solution of Burgers' equation at `time`, periodic on the unit interval, from samples u at `x_j = j / n`.

        u_t + (u^2 / 2)_x = viscosity u_xx

    Pseudo-spectral. The classical Runge-Kutta method in `num_steps` steps acts on `exp(viscosity k^2 t) û`, for which
    the diffusion is exact, and frequencies above n / 3 are left out of u^2, so that none is taken for another.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}.")
    u = jnp.asarray(u)
    n, h = u.shape[-1], time / num_steps
    f = np.arange(n // 2 + 1)
    like = lambda a: jnp.broadcast_to(jnp.asarray(a, np.promote_types(u.dtype, np.complex64)), (*u.shape[:-1], len(f)))
    half = like(np.exp(-viscosity * (2 * math.pi * f) ** 2 * h / 2))
    slope = like(-h / 2 * 2j * math.pi * f * (3 * f < n))

    def change(v):
        """What u^2 / 2 adds to the spectrum in a step."""
        return slope * jnp.fft.rfft(jnp.fft.irfft(v, n) ** 2)

    def step(v, _):
        a = change(v)
        b = change(half * (v + a / 2))
        c = change(half * v + b / 2)
        d = change(half * (half * v + c))
        return half * (half * (v + a / 6) + (b + c) / 3) + d / 6, None

    v, _ = jax.lax.scan(step, jnp.fft.rfft(u), length=num_steps)
    return jnp.fft.irfft(v, n)


@checked
def heat(u: Float[Array, "*batch n m"], diffusivity: float, time: float) -> Float[Array, "*batch n m"]:
    """The solution of the heat equation at `time`, on the unit square between walls that no heat passes, from samples u
    in the middle of cells.

        u_t = diffusivity (u_xx + u_yy)

    Exact for the function of n by m cosines that the samples are.
    """
    c = Cosine().analyse(Cosine().analyse(u, u.shape[-2], axis=-2), u.shape[-1])
    f, g = (Cosine().frequencies(n) for n in u.shape[-2:])
    decay = np.exp(-diffusivity * time * (2 * math.pi) ** 2 * (f[:, None] ** 2 + g[None] ** 2))
    c = c * jnp.broadcast_to(jnp.asarray(decay, c.dtype), c.shape)
    return Cosine().synthesise(Cosine().synthesise(c, u.shape[-2], axis=-2), u.shape[-1])


@dataclasses.dataclass(frozen=True)
class AbstractOperatorTask(AbstractCorpus):
    """Pairs of an initial field and what became of it, of one channel each. All of them are made on the device at the
    first request and kept on the host; an epoch goes through those for training in an order of its own.

    Example i is a function of (seed, i) alone, and a task of another resolution has the same fields on another grid.
    """

    seed: int = dataclasses.field(default=0, kw_only=True)
    """Chooses all of the data."""
    num_examples: int = dataclasses.field(default=1000, kw_only=True)
    """Size of the training set."""
    num_test: int = dataclasses.field(default=200, kw_only=True)
    """Size of the test set."""

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, ...]:
        """Samples along each axis."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray) -> tuple[Float[Array, "*grid"], Float[Array, "*grid"]]:
        """One example."""

    @property
    def sequence_length(self) -> int:
        return math.prod(self.grid)

    @checked
    def train(self, indices: Int[Array, " B"]) -> FieldBatch:
        rows = in_epochs(self.seed, np.asarray(indices), self.num_examples)
        inputs, targets = self._training
        return FieldBatch(inputs[rows], targets[rows], np.ones(len(rows), np.float32))

    @checked
    def test(self, indices: Int[Array, " B"]) -> FieldBatch:
        indices = np.asarray(indices)
        rows = np.minimum(indices, self.num_test - 1)
        weights = (indices < self.num_test).astype(np.float32)
        inputs, targets = self._tested
        return FieldBatch(inputs[rows], targets[rows], weights)

    @functools.cached_property
    def _training(self):
        return self._made(TRAIN, self.num_examples)

    @functools.cached_property
    def _tested(self):
        return self._made(TEST, self.num_test)

    def _made(self, stream: int, count: int) -> tuple[Float[np.ndarray, "count *grid 1"], ...]:
        # The generator is named, so that JAX's default does not change the data.
        key = jr.fold_in(jr.key(self.seed, impl="threefry2x32"), stream)
        draw = jax.jit(jax.vmap(lambda i: self.draw(jr.fold_in(key, i))))
        pieces = [draw(start + np.arange(CHUNK, dtype=np.int32)) for start in range(0, count, CHUNK)]
        return tuple(np.concatenate(parts)[:count, ..., None] for parts in zip(*pieces, strict=True))

    def check_sizes(self, **positive: float) -> None:
        """Refuses a seed that cannot be, and numbers that are not above 0."""
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"a seed is a number of 32 bits, 0 to {2**32 - 1}, got {self.seed}")
        for name, value in {"num_examples": self.num_examples, "num_test": self.num_test, **positive}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclasses.dataclass(frozen=True)
class Burgers(AbstractOperatorTask):
    """What Burgers' equation makes of a smooth periodic field within `time`: steep fronts.

    Solved by `burgers` on 256 points, of which every so many are taken.

    Source: the first example of Li et al. (arXiv 2010.08895).

    Differs from the reference: the fields, drawn by `random_coefficients` from 31 modes with `length` and a smoothness
    of 2, have a mean square of 1; the viscosity is a tenth.

    **Arguments:** those of every such task, and

    - `resolution`: samples, a divisor of 256.
    - `viscosity`: per unit length of the interval and unit time.
    - `time`: until when; fronts form at about 0.1.
    - `length`: the distance over which the initial field varies, as a part of the interval.
    """

    resolution: int = 128
    viscosity: float = 0.01
    time: float = 0.3
    length: float = 0.1

    SOLVED_ON = 256
    NUM_STEPS = 300

    def __post_init__(self):
        self.check_sizes(viscosity=self.viscosity, time=self.time, length=self.length)
        if self.resolution < 1 or self.SOLVED_ON % self.resolution:
            raise ValueError(f"resolution must divide the {self.SOLVED_ON} points of the solver, got {self.resolution}")

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.resolution,)

    def draw(self, key: PRNGKeyArray) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        c = random_coefficients(key, [Fourier()], [31], length=self.length, smoothness=2.0)
        u = Fourier().synthesise(c, self.SOLVED_ON)
        later = burgers(u, self.viscosity, self.time, num_steps=self.NUM_STEPS)
        every = self.SOLVED_ON // self.resolution
        return u[::every], later[::every]


@dataclasses.dataclass(frozen=True)
class Heat(AbstractOperatorTask):
    """How a rough field on the unit square between insulated walls smooths out within `time`.

    Drawn by `random_coefficients` from 32 by 32 cosines with `length` and a smoothness of 1.5, and solved exactly.

    **Arguments:** those of every such task, and

    - `resolution`: samples along each axis, at least 32.
    - `diffusivity`: per area of the square and unit time.
    - `time`: until when.
    - `length`: the distance over which the initial field varies, as a part of the side.
    """

    resolution: int = 32
    diffusivity: float = 0.001
    time: float = 1.0
    length: float = 0.1

    MODES = 32

    def __post_init__(self):
        self.check_sizes(diffusivity=self.diffusivity, time=self.time, length=self.length)
        if self.resolution < self.MODES:
            raise ValueError(f"resolution must be at least {self.MODES}, the cosines drawn, got {self.resolution}")

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.resolution, self.resolution)

    def draw(self, key: PRNGKeyArray) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
        modes = (self.MODES, self.MODES)
        u = random_coefficients(key, [Cosine(), Cosine()], modes, length=self.length, smoothness=1.5)
        for axis in (0, 1):
            u = Cosine().synthesise(u, self.resolution, axis=axis)
        return u, heat(u, self.diffusivity, self.time)
