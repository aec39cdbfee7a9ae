"""Which algorithm of a long convolution is the fastest here."""

import functools
import math
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from s5eqx._typing import Array, Float, checked
from s5eqx.ops._conv_algorithm import FFT, AbstractConvAlgorithm
from s5eqx.ops.butterfly_conv import Monarch

_ROUNDS = 5


class Measured(AbstractConvAlgorithm):
    """The fastest of `candidates`, by measurement: at the first call of each size and dtype they run against each
    other on the default device, value and gradient, and what wins is kept for the process.

    Under `jax.vmap` a call, and so a measurement, is one example. Which one wins may differ from run to run where they
    are close, and with it the last bits of results. One that runs out of memory loses.
    """

    candidates: tuple[AbstractConvAlgorithm, ...]

    @checked
    def __init__(self, *candidates: AbstractConvAlgorithm):
        """**Arguments:** the candidates; `FFT(), Monarch(2), Monarch(3)` if there are none."""
        self.candidates = candidates or (FFT(), Monarch(2), Monarch(3))

    def __call__(
        self, u: Float[Array, "*batch L D"], k: Float[Array, "K D"], period: int
    ) -> Float[Array, "*batch L D"]:
        return self.fastest(u.shape, k.shape, period, u.dtype)(u, k, period)

    def fastest(
        self, u: tuple[int, ...], k: tuple[int, ...], period: int, dtype: DTypeLike = np.float32
    ) -> AbstractConvAlgorithm:
        """The one that wins for inputs and kernels of these shapes."""
        if jax.process_count() > 1:
            raise ValueError(
                f"Measured chooses in one process, and each of {jax.process_count()} could choose differently. Measure "
                "in one alone, and give all of them the algorithm that `fastest` returned."
            )
        device = jax.config.jax_default_device  # pyright: ignore  # a device, the name of a platform, or None
        platform = getattr(device, "platform", device) or jax.default_backend()
        return _race(self.candidates, _Problem(u, k, period, np.dtype(dtype).name, platform))


class _Problem(NamedTuple):
    u: tuple[int, ...]
    k: tuple[int, ...]
    period: int
    dtype: str
    platform: str


@functools.cache
def _race(candidates, problem):
    if len(candidates) == 1:
        return candidates[0]
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():  # a call may be under trace, a measurement is not
        u, k = (jnp.asarray(rng.standard_normal(shape), problem.dtype) for shape in (problem.u, problem.k))
        programs = [jax.jit(_value_and_gradient(candidate, problem.period)) for candidate in candidates]
        rounds = [[_seconds(program, u, k) for program in programs] for _ in range(1 + _ROUNDS)]
    medians = [statistics.median(times) for times in zip(*rounds[1:], strict=True)]  # the first one compiles
    return candidates[medians.index(min(medians))]


def _value_and_gradient(algorithm, period):
    def program(u, k):
        y, back = jax.vjp(lambda u, k: algorithm(u, k, period), u, k)
        return y, back(y)

    return program


def _seconds(program, u, k):
    start = time.perf_counter()
    try:
        jax.block_until_ready(program(u, k))
    except jax.errors.JaxRuntimeError as failure:
        if "RESOURCE_EXHAUSTED" not in str(failure):
            raise
        return math.inf
    return time.perf_counter() - start
