"""A small run of the kernels on the devices that are there, against the loop that specifies them."""

import contextlib
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from s5eqx.ops import _native
from s5eqx.ops._backend import use_backend
from s5eqx.ops._scan_reference import loop
from s5eqx.ops.scan import diagonal_scan, diagonal_scan_pairs, final_state, final_state_pairs
from s5eqx.ops.ssm import ssm

_BATCH, _LENGTH = 2, 1300  # several tiles of every kernel, and a part of one
_BOUND, _BOUND_OF_TF32 = 1e-5, 3e-3


@dataclasses.dataclass(frozen=True)
class DeviceTest:
    """What `self_test` found on one device."""

    device: str
    """The device, as JAX names it."""
    backend: Literal["native", "jax"]
    """What was tested: the native kernels, or plain JAX where none are live for the device."""
    error: float
    """The largest difference from the loop over the largest value, in the worst output or gradient."""


@dataclasses.dataclass(frozen=True)
class _Case:
    layout: Literal["float32", "complex64", "pairs"]
    states: int
    varying: bool = False
    reverse: bool = False
    resets: bool = False

    def draw(self) -> tuple[np.ndarray, ...]:
        """a, b, x0, flags and the cotangent of the states, in the canonical shapes of the loop."""
        rng = np.random.default_rng(0)
        rows = (_BATCH, _LENGTH)

        def stored(z):
            if self.layout == "pairs":
                return np.stack([z.real, z.imag], -1).astype(np.float32)
            return z.astype(np.complex64) if self.layout == "complex64" else z.real.astype(np.float32)

        def normal(*shape):
            return stored(rng.standard_normal((*shape, self.states)) + 1j * rng.standard_normal((*shape, self.states)))

        shape = (*(rows if self.varying else (1, 1)), self.states)
        a = stored(rng.uniform(0.99, 0.999, shape) * np.exp(1j * rng.uniform(-0.05, 0.05, shape)))
        flags = rng.random(rows) < 0.003 if self.resets else np.zeros((1, 0), bool)
        return a, normal(*rows), normal(_BATCH), flags, normal(*rows)

    def both(self, operands):
        """By name, all results of the kernels and those of the loop."""
        a, b, x0, flags, g = operands
        pairs = self.layout == "pairs"
        scan, final = (diagonal_scan_pairs, final_state_pairs) if pairs else (diagonal_scan, final_state)
        options = {"reset": flags if self.resets else None, "reverse": self.reverse}
        x, pull = jax.vjp(lambda *z: scan(*z, **options), a, b, x0)
        (exact,), exact_pull = jax.vjp(
            lambda a, b, x0: loop(a, b, x0, flags, reverse=self.reverse, pairs=pairs), a, b, x0
        )

        def named(states, last, gradients):
            names = ("states", "final state", "gradient of a", "gradient of b", "gradient of x0")
            return {f"{name} ({self})": z for name, z in zip(names, (states, last, *gradients), strict=True)}

        ours = named(x, final(a, b, x0, **options), pull(g))
        return ours, named(exact, exact[:, 0 if self.reverse else -1], exact_pull([g]))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The whole state-space step, with work for several threads or blocks."""

    width: int
    states: int

    def draw(self) -> tuple[np.ndarray, ...]:
        """u, Lambda_bar, B_bar, C, D, x0, flags and the cotangents of y and the last state."""
        rng = np.random.default_rng(0)
        real = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        normal = lambda *shape: real(*shape) + np.complex64(1j) * real(*shape)
        rows = (_BATCH, _LENGTH)
        modulus, phase = rng.uniform(0.99, 0.999, self.states), rng.uniform(-0.05, 0.05, self.states)
        weights = normal(self.states, self.width), normal(self.width, self.states), real(self.width)
        return (
            real(*rows, self.width), (modulus * np.exp(1j * phase)).astype(np.complex64), *weights,
            normal(_BATCH, self.states), rng.random(rows) < 0.003, real(*rows, self.width), normal(_BATCH, self.states),
        )  # fmt: skip

    def both(self, operands):
        """By name, all results of `ssm` and those of the loop."""
        *inputs, flags, g, g_last = operands

        def plain(u, Lambda_bar, B_bar, C, D, x0):
            drive = jnp.einsum("bld,pd->blp", jax.lax.complex(u, jnp.zeros_like(u)), B_bar)
            (x,) = loop(Lambda_bar[None, None], drive, x0, flags, reverse=False, pairs=False)
            return jnp.einsum("blp,dp->bld", x, C).real + D[None, None] * u, x[:, -1]

        def results(step):
            outputs, pull = jax.vjp(step, *inputs)
            names = ("y", "last state", *(f"gradient of {z}" for z in ("u", "Lambda_bar", "B_bar", "C", "D", "x0")))
            return {f"{name} ({self})": z for name, z in zip(names, (*outputs, *pull((g, g_last))), strict=True)}

        return results(lambda *z: ssm(*z, reset=flags)), results(plain)


_CASES = (
    _Case("complex64", 5),
    _Case("pairs", 16, reverse=True, resets=True),
    _Case("float32", 3, varying=True, reverse=True),
    _Case("complex64", 16, varying=True, resets=True),
    _Layer(14, 7),
)


def _check(device) -> DeviceTest:
    backend = "native" if _native.runs_native(device) else "jax"

    @jax.jit
    def everything(drawn):
        with use_backend(backend), jax.default_matmul_precision("highest"):
            return [case.both(operands) for case, operands in zip(_CASES, drawn, strict=True)]

    def judged(case, ours, exact):
        """Name, error and bound of each result."""
        bound = _BOUND_OF_TF32 if isinstance(case, _Layer) and _native.ssm_rounds(device) else _BOUND
        for name, x in exact.items():
            yield name, float(np.max(np.abs(ours[name] - x)) / np.max(np.abs(x))), bound

    results = jax.device_get(everything(jax.device_put([case.draw() for case in _CASES], device)))
    found = [row for case, both in zip(_CASES, results, strict=True) for row in judged(case, *both)]
    wrong = [f"{name}: {error:.1e} must be below {bound:.0e}" for name, error, bound in found if not error < bound]
    if wrong:
        implementation = "The native kernels are" if backend == "native" else "Plain JAX is"
        raise RuntimeError(
            f"{implementation} wrong on {device}. Of the relative errors\n  "
            + "\n  ".join(wrong)
            + '\nReport this with the output of s5eqx.show_config(). s5eqx.use_backend("jax") works without kernels.'
        )
    return DeviceTest(str(device), backend, max(error for _, error, _ in found))


def self_test() -> tuple[DeviceTest, ...]:
    """Runs the scan, its final state and the state-space step with their gradients on the devices of this process, and
    compares with a plain loop.

    On each accelerator and on one CPU device, with the native kernels where they are live: time-invariant and not, both
    directions, with resets, real and complex. Takes a few seconds, most of them compiling.

    **Returns:** what was tested on each device, and the largest error.

    **Raises:** `RuntimeError` naming device, implementation and results where one is wrong.
    """
    accelerators = [device for device in jax.local_devices() if device.platform != "cpu"]
    cpus = []
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
        cpus = jax.local_devices(backend="cpu")[:1]
    return tuple(map(_check, [*accelerators, *cpus]))
