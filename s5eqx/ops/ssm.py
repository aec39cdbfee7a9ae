"""The whole state-space step: input projection, scan, read-out and skip."""

import jax.numpy as jnp
from jax import lax

from s5eqx._typing import Array, Bool, Complex, Float, checked
from s5eqx.ops._backend import current_backend
from s5eqx.ops._primitive import bind
from s5eqx.ops._ssm_primitives import CHUNK, ssm_p
from s5eqx.ops.scan import diagonal_scan_pairs


@checked
def ssm(
    u: Float[Array, "*batch L D"],
    Lambda_bar: Complex[Array, " P"] | Complex[Array, "L P"],
    B_bar: Complex[Array, "P D"],
    C: Complex[Array, "D P"],
    D: Float[Array, " D"],
    x0: Complex[Array, "*batch P"] | None = None,
    *,
    gain: Complex[Array, "L P"] | None = None,
    reset: Bool[Array, "*batch L"] | None = None,
) -> tuple[Float[Array, "*batch L D"], Complex[Array, "*batch P"]]:
    """x[t] = Lambda_bar x[t-1] + gain[t] B_bar u[t], y[t] = Re(C x[t]) + D u[t]. Returns y and the last state.

    The complex products are real ones with interleaved columns, on matrices of B·L rows however many axes `jax.vmap`
    adds. The native kernels go from `u` to `y` without writing the states: one in 64 is kept for the gradient, which
    computes the others again. Layers wider than 256, or of more than 128 states, keep all of them on a CPU, which is
    little beside `u` where they are wide, and are composed of matrix products and the scan on a GPU, as is everything
    there above 64 states (32 in double precision). The recurrence runs in the precision of the weights (complex64 or
    complex128); `y` comes back in the dtype of `u`. Where L = 0 the last state is `x0`.

    A time-varying `Lambda_bar` (L, P), or a `gain`, serves irregular sampling; that case, and weights that `jax.vmap`
    maps, are composed of matrix products and the scan.

    **Arguments:**

    - `x0`: the state before the first step; zero if not given.
    - `gain`: multiplies the input of every state at every step; one if not given.
    - `reset`: where true, the state that enters the step is dropped, `x0` included.

    **Raises:** `TypeError` where the weights differ in dtype.
    """
    u, Lambda_bar, B_bar, C, D = map(jnp.asarray, (u, Lambda_bar, B_bar, C, D))
    x0, gain = (None if z is None else jnp.asarray(z) for z in (x0, gain))
    weights = {"Lambda_bar": Lambda_bar, "B_bar": B_bar, "C": C, "x0": x0, "gain": gain}
    for name, w in weights.items():
        if w is not None and w.dtype != B_bar.dtype:
            raise TypeError(f"ssm needs {name} in the dtype of B_bar, {B_bar.dtype}; got {w.dtype}. Cast one of them.")
    *batch, length, width = u.shape
    rows = 1
    for n in batch:
        rows *= n
    real = jnp.finfo(B_bar.dtype).dtype
    if D.dtype != real:
        raise TypeError(f"ssm needs D in {real}, the real dtype of B_bar; got {D.dtype}. Cast one of them.")

    states = B_bar.shape[0]
    drive = u.astype(real).reshape(rows, length, width)
    a = _pairs(Lambda_bar)
    w_in = jnp.moveaxis(_pairs(B_bar), 1, 0).reshape(width, 2 * states)
    w_out = jnp.moveaxis(_pairs(jnp.conj(C)), 0, 2).reshape(2 * states, width)
    start = jnp.zeros((rows, states, 2), real) if x0 is None else _pairs(x0).reshape(rows, states, 2)
    flags = jnp.zeros((1, 0), bool) if reset is None else jnp.asarray(reset).reshape(rows, length)

    if Lambda_bar.ndim == 1 and gain is None:
        y, last, _ = bind(
            ssm_p, drive, a, w_in, w_out, D, start, flags, chunk=_chunk(width, states), backend=current_backend()
        )
    else:
        y, last = _varying(drive, a, w_in, w_out, D, start, flags if reset is not None else None, gain)
    y = y.reshape(u.shape).astype(u.dtype)
    return y, lax.complex(last[..., 0], last[..., 1]).reshape(*batch, states)


def _chunk(width, states):
    """The steps between states that are kept.

    To compute states again takes one matrix product in six. Where the width is small it costs no more than to write and
    read them, and saves nearly all memory but `u` and `y`; in wide layers, 12 % of the time at a width of 256 and more
    beyond, to save little.
    """
    return CHUNK if width <= 256 and states <= 128 else 1


def _varying(u, a, w_in, w_out, D, x0, reset, gain):
    rows, length, _ = u.shape
    drive = (u @ w_in).reshape(rows, length, *a.shape[-2:])
    if gain is not None:
        re, im = gain.real[None], gain.imag[None]
        drive = jnp.stack([drive[..., 0] * re - drive[..., 1] * im, drive[..., 0] * im + drive[..., 1] * re], axis=-1)
    x = diagonal_scan_pairs(a, drive, x0, reset=reset)
    y = x.reshape(rows, length, len(w_out)) @ w_out + D[None, None] * u
    return y, (x[:, -1] if length else x0)


def _pairs(z):
    return jnp.stack([z.real, z.imag], axis=-1)
