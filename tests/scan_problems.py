"""Problems for the scan in every layout, solved and compared: outputs and all cotangents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import but_slow, on_device, quick_jit, recurrence, recurrence_vjp, relative_error, to_complex, to_pairs

import s5eqx
from s5eqx.ops import diagonal_scan, diagonal_scan_pairs, final_state, final_state_pairs, use_backend

native = pytest.mark.skipif(not s5eqx.backends()[0].live, reason=s5eqx.backends()[0].detail)
BACKENDS = [pytest.param("native", marks=native), "jax"]
BLOCK_BYTES = 128 << 10  # kBlockBytes of csrc/scan.cc


class Layout(NamedTuple):
    """How the numbers of a problem are stored."""

    dtype: str
    pairs: bool = False

    @property
    def is_complex(self):
        return self.pairs or self.dtype.startswith("complex")

    @property
    def is_double(self):
        return self.dtype in ("float64", "complex128")

    def block(self, states):
        """Steps in one block of the kernel."""
        return BLOCK_BYTES // (states * np.dtype(self.dtype).itemsize * (1 + self.pairs))

    def draw(self, rng, shape):
        z = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if self.is_complex else 0)
        return self.rounded(z)

    def rounded(self, z):
        single = np.complex64 if self.is_complex else np.float32
        return z if self.is_double else z.astype(single)

    def store(self, z):
        return on_device(to_pairs(z) if self.pairs else z, self.dtype)

    def read(self, x):
        assert x.dtype == self.dtype
        return to_complex(x) if self.pairs else np.asarray(x)

    def scan(self, a, b, x0=None, **options):
        return (diagonal_scan_pairs if self.pairs else diagonal_scan)(a, b, x0, **options)


LAYOUTS = {
    "float32": Layout("float32"),
    "float64": Layout("float64"),
    "complex64": Layout("complex64"),
    "complex128": Layout("complex128"),
    "pairs32": Layout("float32", pairs=True),
    "pairs64": Layout("float64", pairs=True),
}


OF_EACH_KERNEL = but_slow(LAYOUTS, "float64", "complex128", "pairs32")
"""Names of layouts: complex numbers and pairs, which share their kernels, take turns; all are among the slow tests."""


class Problem(NamedTuple):
    a: np.ndarray
    b: np.ndarray
    x0: np.ndarray
    g: np.ndarray
    reset: np.ndarray | None
    reverse: bool
    label: str

    @property
    def arrays(self):
        return self.a, self.b, self.x0


def problem(
    layout, batch, length, states, *, a=None, radius=(0.3, 0.999), reset=False, resets=0.1, reverse=False, seed=0
):
    """A random problem; `a` is the shape of the multipliers, (P,) if not given, `reset` the shape of the flags.

    `resets` is the share of steps that are one.
    """
    rng = np.random.default_rng(seed)
    a_shape = (states,) if a is None else a
    modulus = rng.uniform(*radius, a_shape)
    phase = rng.uniform(0, 2 * np.pi, a_shape)
    multiplier = modulus * (np.exp(1j * phase) if layout.is_complex else np.sign(np.cos(phase)))
    shape = (*batch, length, states)
    return Problem(
        layout.rounded(multiplier),
        layout.draw(rng, shape),
        layout.draw(rng, (*batch, states)),
        layout.draw(rng, shape),
        rng.random(reset) < resets if reset else None,
        reverse,
        f"b {shape}, a {a_shape}, reset {reset}, reverse {reverse}",
    )


def solve(layout, problems, backend="native"):
    """States and cotangents of a, b and x0 of all problems, by one compiled program."""

    def everything(inputs):
        results = []
        for p, (a, b, x0, g) in zip(problems, inputs, strict=True):
            x, pull = jax.vjp(lambda *z, p=p: layout.scan(*z, reset=p.reset, reverse=p.reverse), a, b, x0)
            results.append((x, pull(g)))
        return results

    inputs = [[layout.store(z) for z in (*p.arrays, p.g)] for p in problems]
    with use_backend(backend):
        return jax.tree.map(layout.read, quick_jit(everything)(inputs))


def check(layout, problems, backend="native", tolerance=2e-6):
    bound = 1e-12 if layout.is_double else tolerance
    for p, (x, cotangents) in zip(problems, solve(layout, problems, backend), strict=True):
        truth = recurrence_vjp(*p.arrays, p.g, p.reset, p.reverse, conjugate=layout.pairs)
        names = ("x", "cotangent of a", "of b", "of x0")
        for name, ours, exact in zip(names, (x, *cotangents), (truth[0], *truth[1]), strict=True):
            assert ours.shape == exact.shape, f"{name}: {p.label}"
            assert relative_error(ours, exact) < bound, f"{name}: {p.label}"


def check_all(layout, problems):
    """States and cotangents, and the last states from the kernel that finds them alone."""
    check(layout, problems)
    final = final_state_pairs if layout.pairs else final_state
    for p in problems:
        with use_backend("native"):
            last = layout.read(final(*map(layout.store, p.arrays), reset=p.reset, reverse=p.reverse))
        exact = recurrence(*p.arrays, p.reset, p.reverse)[..., 0 if p.reverse else -1, :]
        assert relative_error(last, exact) < (1e-12 if layout.is_double else 2e-6), p.label


def plain_scan(a, b, x0):
    """Time-varying or not, on one example, in plain JAX: the other side of the tests of transformations."""

    def step(x, inputs):
        x = inputs[0] * x + inputs[1]
        return x, x

    return jax.lax.scan(step, x0, (jnp.broadcast_to(a, b.shape), b))[1]
