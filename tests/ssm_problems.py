"""Problems for the state-space step, solved and compared: y, the last state and the cotangents of all inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import quick_jit, recurrence_vjp, relative_error

from s5eqx.ops import ssm, use_backend

CHUNK = 64  # kSsmChunk of csrc/ssm.h
LONGEST = 1024  # kMostSteps of csrc/ssm.cc
BLOCKS = (640, LONGEST)  # steps of its blocks for 19 channels and 13 states, by pass and dtype
NAMES = ("u", "Lambda_bar", "B_bar", "C", "D", "x0", "gain")


class Inputs(NamedTuple):
    u: np.ndarray
    Lambda_bar: np.ndarray
    B_bar: np.ndarray
    C: np.ndarray
    D: np.ndarray
    x0: np.ndarray | None
    gain: np.ndarray | None = None


def draw(batch, length, width=3, states=4, *, radius=(0.5, 0.999), varying=False, gain=False, x0=True, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    complex_normal = lambda *shape: normal(*shape) + 1j * normal(*shape)
    a_shape = (length, states) if varying else (states,)
    return Inputs(
        normal(*batch, length, width),
        rng.uniform(*radius, a_shape) * np.exp(1j * rng.uniform(0, 6, a_shape)),
        complex_normal(states, width),
        complex_normal(width, states),
        normal(width),
        complex_normal(*batch, states) if x0 else None,
        complex_normal(length, states) if gain else None,
    )


def in_dtype(inputs, dtype):
    """The same numbers in float32 or float64, and complex numbers of the same size."""
    wide = np.result_type(dtype, np.complex64)
    cast = lambda z: jax.device_put(np.asarray(z, wide if np.iscomplexobj(z) else dtype))  # which compiles nothing
    return [None if z is None else cast(z) for z in inputs]


def naive(u, Lambda_bar, B_bar, C, D, x0, gain=None, reset=None):
    """One example, one step at a time, in complex numbers: what `ssm` must equal."""
    length, states = u.shape[0], B_bar.shape[0]
    drive = jnp.einsum("pd,ld->lp", B_bar, u.astype(B_bar.dtype))
    drive = drive if gain is None else gain * drive
    reset = jnp.zeros(length, bool) if reset is None else reset
    x0 = jnp.zeros(states, B_bar.dtype) if x0 is None else x0

    def step(x, inputs):
        a, b, drop = inputs
        x = jnp.where(drop, b, a * x + b)
        return x, x

    last, x = jax.lax.scan(step, x0, (jnp.broadcast_to(Lambda_bar, drive.shape), drive, reset))
    return jnp.einsum("dp,lp->ld", C, x).real + D[None] * u, last


class Problem(NamedTuple):
    """On (B, L) examples: six inputs, the flags, the cotangents of y and of the last state."""

    inputs: tuple
    reset: np.ndarray | None
    g: np.ndarray
    g_last: np.ndarray

    @property
    def label(self):
        return f"u {self.inputs[0].shape}, {len(self.inputs[1])} states, resets {self.reset is not None}"


def problem(batch, length, width, states, *, radius=(0.5, 0.999), reset=False, seed=0):
    """A random problem; `reset` may be the flags, or whether to draw some."""
    inputs = draw((batch,), length, width, states, radius=radius, seed=seed)[:6]
    rng = np.random.default_rng(seed + 1)
    if isinstance(reset, bool):
        reset = rng.random((batch, length)) < 0.02 if reset else None
    return Problem(inputs, reset, rng.standard_normal(inputs[0].shape), inputs[5][::-1].conj())


def solve(problems, dtype, backend="native", step=ssm):
    """y, the last state and the cotangents of the six inputs of all problems, by one compiled program."""

    @quick_jit
    def everything(given):
        results = []
        for p, (*inputs, g, g_last) in zip(problems, given, strict=True):
            outputs, pull = jax.vjp(lambda *z, p=p: step(*z, reset=p.reset), *inputs)
            results.append((*outputs, *pull((g, g_last))))
        return results

    with use_backend(backend):
        given = [in_dtype((*p.inputs, p.g, p.g_last), dtype) for p in problems]
        return jax.tree.map(np.asarray, everything(given))


def truth(p, dtype):
    """The same by a loop in double precision, on the numbers that `dtype` has. JAX's cotangents have no conjugates."""
    wide = lambda z: np.asarray(z, np.complex128 if np.iscomplexobj(z) else np.float64)
    u, a, B_bar, C, D, x0, g, g_last = (wide(z) for z in in_dtype((*p.inputs, p.g, p.g_last), dtype))
    gx = g @ C
    gx[:, -1] += g_last
    x, (da, drive, dx0) = recurrence_vjp(a, u @ B_bar.T, x0, gx, p.reset)
    over_time = lambda z, w: np.tensordot(z, w, ((0, 1), (0, 1)))
    sums = over_time(drive, u), over_time(g, x), np.sum(g * u, axis=(0, 1))
    return (x @ C.T).real + D * u, x[:, -1], (drive @ B_bar).real + D * g, da, *sums, dx0


def check(problems, dtype, backend="native", tolerance=3e-6):
    bound = 1e-12 if dtype == "float64" else tolerance
    for p, given in zip(problems, solve(problems, dtype, backend), strict=True):
        names = ("y", "the last state", *(f"the cotangent of {name}" for name in NAMES[:6]))
        for name, ours, exact in zip(names, given, truth(p, dtype), strict=True):
            assert ours.shape == exact.shape, f"{name}: {p.label}"
            assert relative_error(ours, exact) < bound, f"{name}: {p.label}"
