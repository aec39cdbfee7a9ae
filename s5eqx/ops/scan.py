"""The diagonal linear recurrence, the one operation that this library is built on."""

import jax.numpy as jnp

from s5eqx._typing import Array, Bool, Float, Inexact, checked
from s5eqx.ops._backend import current_backend
from s5eqx.ops._primitive import bind
from s5eqx.ops._scan_primitives import final_p, scan_p

_DTYPES = ("float32", "float64", "complex64", "complex128")


@checked
def diagonal_scan(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "*batch L P"],
    x0: Inexact[Array, "..."] | None = None,
    *,
    reset: Bool[Array, "..."] | None = None,
    reverse: bool = False,
) -> Inexact[Array, "*batch L P"]:
    """x[t] = a[t] x[t-1] + b[t] along the axis L, for real or complex numbers.

    Differentiable in `a`, `b` and `x0`, to any order and in both modes. Runs a native kernel where there is one for
    the device (see `s5eqx.backends`), plain JAX elsewhere. Under `jit`, devices may share the first axis of the batch
    and P: of several batch axes, with those mapped by `vmap` in front, split the first one and no other.

    **Arguments:**

    - `a`: (P,) for a time-invariant recurrence, which is the fast case, or anything that broadcasts against `b`.
    - `b`: the inputs. float32, float64, complex64 or complex128; `a` and `x0` have the same dtype.
    - `x0`: the state before the first step, broadcast to (*batch, P). Zero if not given.
    - `reset`: broadcast to (*batch, L). Where true, the state that enters the step is dropped, `x0` included:
        x[t] = b[t], by selection, so neither NaN nor gradient crosses.
    - `reverse`: run from the last step to the first: x[t] = a[t] x[t+1] + b[t]. `x0` is then the state after the last
        step, and a reset at t drops what comes from t+1.

    **Raises:** `TypeError` where dtypes differ or are not supported, `ValueError` where a shape does not broadcast.
    """
    return _bound(scan_p, a, b, x0, reset, reverse, pairs=False)


@checked
def diagonal_scan_pairs(
    a: Float[Array, "..."],
    b: Float[Array, "*batch L P 2"],
    x0: Float[Array, "..."] | None = None,
    *,
    reset: Bool[Array, "..."] | None = None,
    reverse: bool = False,
) -> Float[Array, "*batch L P 2"]:
    """`diagonal_scan` for complex numbers stored as pairs (re, im) of floats, on a last axis of 2.

    XLA cannot view complex numbers as pairs or the reverse without a copy, which costs more than the scan. Use this
    form where the pairs come from, or go to, real matrix products. `a`, `b` and `x0` all carry the axis of 2.
    """
    return _bound(scan_p, a, b, x0, reset, reverse, pairs=True)


@checked
def final_state(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "*batch L P"],
    x0: Inexact[Array, "..."] | None = None,
    *,
    reset: Bool[Array, "..."] | None = None,
    reverse: bool = False,
) -> Inexact[Array, "*batch P"]:
    """The state after the last step of `diagonal_scan` (the first one if `reverse`), and no other; `x0` where L = 0.

    Takes what `diagonal_scan` takes and is differentiable like it. The states in between are never written: this reads
    `b` once and is the fast way to a prompt's last state.
    """
    return _bound(final_p, a, b, x0, reset, reverse, pairs=False)


@checked
def final_state_pairs(
    a: Float[Array, "..."],
    b: Float[Array, "*batch L P 2"],
    x0: Float[Array, "..."] | None = None,
    *,
    reset: Bool[Array, "..."] | None = None,
    reverse: bool = False,
) -> Float[Array, "*batch P 2"]:
    """`final_state` for complex numbers stored as pairs (re, im) of floats; see `diagonal_scan_pairs`."""
    return _bound(final_p, a, b, x0, reset, reverse, pairs=True)


def _bound(primitive, a, b, x0, reset, reverse, *, pairs):
    """The result of `scan_p` or `final_p`, in the caller's shapes."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    tail = 2 if pairs else 1  # the axes from P on
    *batch, length, _ = b.shape[: b.ndim - tail + 1]
    states = b.shape[b.ndim - tail :]
    x0 = _or_zeros(x0, b, tail)
    for name, x in (("a", a), ("x0", x0)) if pairs else ():
        if x.shape[-1:] != (2,):
            raise ValueError(f"{name} of a scan of pairs must end in an axis of 2, (re, im), as b does; got {x.shape}.")
    for name, x in (("a", a), ("b", b), ("x0", x0)):
        if x.dtype != b.dtype or x.dtype.name not in _DTYPES:
            raise TypeError(
                f"a, b and x0 of a scan must share one dtype out of {', '.join(_DTYPES)}; got {name} of {x.dtype} "
                f"with b of {b.dtype}. Cast before the call: the recurrence is at least float32 by design."
            )
    x0 = broadcast("x0", x0, (*batch, *states))
    rows = 1
    for n in batch:
        rows *= n
    a = _canonical_multiplier(a, b.shape, len(batch), rows)
    if b.size == 0:
        return x0 if primitive is final_p else b
    if reset is None:
        reset = jnp.zeros((1, 0), bool)
    else:
        reset = broadcast("reset", jnp.asarray(reset), (*batch, length)).reshape(rows, length)
    (result,) = bind(
        primitive,
        a,
        b.reshape(rows, length, *states),
        x0.reshape(rows, *states),
        reset,
        reverse=reverse,
        pairs=pairs,
        backend=current_backend(),
    )
    return result.reshape((x0 if primitive is final_p else b).shape)


def _canonical_multiplier(a, shape, batch_axes, rows):
    """`a` as (1 or rows, 1 or L, P, ...), repeated over batch and length only where it varies there."""
    _check_broadcasts("a", a.shape, shape)
    a = a.reshape((1,) * (len(shape) - a.ndim) + a.shape)
    a = jnp.broadcast_to(a, a.shape[: batch_axes + 1] + shape[batch_axes + 1 :])
    if all(n == 1 for n in a.shape[:batch_axes]):
        return a.reshape(1, *a.shape[batch_axes:])
    a = jnp.broadcast_to(a, shape[:batch_axes] + a.shape[batch_axes:])
    return a.reshape(rows, *a.shape[batch_axes:])


def _or_zeros(x0, b, tail):
    return jnp.zeros(b.shape[b.ndim - tail :], b.dtype) if x0 is None else jnp.asarray(x0)


def broadcast(name, x, shape):
    """`x` in `shape`; an error names it where it does not broadcast."""
    _check_broadcasts(name, x.shape, shape)
    return jnp.broadcast_to(x.reshape((1,) * (len(shape) - x.ndim) + x.shape), shape)


def _check_broadcasts(name, given, wanted):
    aligned = (1,) * (len(wanted) - len(given)) + tuple(given)
    if len(given) > len(wanted) or any(n not in (1, m) for n, m in zip(aligned, wanted, strict=False)):
        raise ValueError(
            f"{name} of a scan must broadcast to {tuple(wanted)}, which follows from b; got {tuple(given)}. "
            "The axes are (*batch, L, P): a vector over time needs a trailing axis of its own."
        )
