"""The scan of a sequence whose length is split over devices."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from s5eqx._typing import Array, Bool, Float, Inexact, checked
from s5eqx._varying import varying_axes
from s5eqx.ops._power import power
from s5eqx.ops.scan import broadcast, diagonal_scan, diagonal_scan_pairs, final_state, final_state_pairs


@checked
def sharded_scan(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "*batch L P"],
    x0: Inexact[Array, "..."] | None = None,
    *,
    axis_name: str | tuple[str, ...],
    reset: Bool[Array, "..."] | None = None,
    reverse: bool = False,
) -> Inexact[Array, "*batch L P"]:
    """`diagonal_scan` along an axis that is split, in order, over the devices of a mesh axis; inside `jax.shard_map`.

    Each device finds the last state of its own steps, all exchange these, of (*batch, P) numbers each, and then each
    scans its steps from the state that enters them: as exact as on one device, value and gradients.

        def local(a, b):  # b: L / 8 steps
            return s5eqx.ops.sharded_scan(a, b, axis_name="time")

        time = PartitionSpec(None, "time")
        x = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), time), out_specs=time)(a, b)

    With |a| > 1, where the product of one device's multipliers overflows, states may be NaN that are finite on one
    device.

    **Arguments:**

    - `a`, `b`, `reset`: as for `diagonal_scan`; what varies over L is this device's piece. Pieces have one length.
    - `x0`: the state before the first step of all, the same on all devices, which `check_vma` of `shard_map` checks.
    - `axis_name`: the mesh axis, or axes, over which the length is split.
    - `reverse`: from the last step of the last device to the first of the first; `x0` is the state after the last.

    **Raises:** `ValueError` outside of `shard_map`, where `x0` varies over `axis_name`, and as `diagonal_scan` does.
    """
    return _sharded(a, b, x0, axis_name, reset, reverse, pairs=False)


@checked
def sharded_scan_pairs(
    a: Float[Array, "..."],
    b: Float[Array, "*batch L P 2"],
    x0: Float[Array, "..."] | None = None,
    *,
    axis_name: str | tuple[str, ...],
    reset: Bool[Array, "..."] | None = None,
    reverse: bool = False,
) -> Float[Array, "*batch L P 2"]:
    """`sharded_scan` for complex numbers stored as pairs (re, im) of floats; see `diagonal_scan_pairs`."""
    return _sharded(a, b, x0, axis_name, reset, reverse, pairs=True)


@checked
def entering_state_pairs(
    a: Float[Array, "..."],
    b: Float[Array, "*batch L P 2"],
    x0: Float[Array, "..."] | None = None,
    *,
    axis_name: str | tuple[str, ...],
    reset: Bool[Array, "..."] | None = None,
    reverse: bool = False,
) -> Float[Array, "*batch P 2"]:
    """The state that `sharded_scan_pairs` enters this device's steps with, for those who run the steps by other means:
    `diagonal_scan_pairs(a, b, entering_state_pairs(a, b, x0, ...))` is `sharded_scan_pairs(a, b, x0, ...)`."""
    return _entering(a, b, x0, axis_name, reset, reverse, pairs=True)


def _sharded(a, b, x0, axis_name, reset, reverse, *, pairs):
    x0 = _entering(a, b, x0, axis_name, reset, reverse, pairs=pairs)
    scan = diagonal_scan_pairs if pairs else diagonal_scan
    return scan(a, b, x0, reset=reset, reverse=reverse)


def _entering(a, b, x0, axis_name, reset, reverse, *, pairs):
    try:
        here = lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"A sharded scan must run in jax.shard_map over a mesh with the axis {axis_name!r}, each device with its "
            f"piece of the length; here there is no such axis ({error}). On a whole sequence call diagonal_scan."
        ) from error
    names = {axis_name} if isinstance(axis_name, str) else {*axis_name}
    if x0 is not None and (varying := names & varying_axes(jnp.asarray(x0))):
        raise ValueError(
            "x0 of sharded_scan is the state before the first step of all and must be the same on all devices; got one "
            f"that varies over {sorted(varying)}. Give it PartitionSpec() in in_specs; if it is computed inside, bring "
            "the one that is meant to all devices with jax.lax.psum."
        )
    scan, final = (diagonal_scan_pairs, final_state_pairs) if pairs else (diagonal_scan, final_state)
    scan, final = partial(scan, reverse=reverse), partial(final, reverse=reverse)
    final = jax.checkpoint(final)  # else its derivative keeps as many states as the result has
    a, b = jnp.asarray(a), jnp.asarray(b)
    tail = 2 if pairs else 1  # the axes from P on
    time = b.ndim - tail - 1
    if reset is not None:
        reset = broadcast("reset", jnp.asarray(reset), b.shape[: time + 1])
    last = final(a, b, reset=reset)

    # The same recurrence with one step a device, which makes decay * state + last of the state that enters it.
    decay = _decay(a, b, final, reset, tail)
    decays = lax.all_gather(decay, axis_name, axis=decay.ndim - tail)
    cuts = None if reset is None else lax.all_gather(jnp.any(reset, axis=-1), axis_name, axis=time)
    states = scan(decays, lax.all_gather(last, axis_name, axis=time), x0, reset=cuts)

    # A device is entered by what leaves the one before it, the first one by x0.
    start = jnp.zeros_like(last) if x0 is None else broadcast("x0", jnp.asarray(x0), last.shape)
    start = jnp.expand_dims(start, time)
    entering = jnp.concatenate([states, start] if reverse else [start, states], axis=time)
    return lax.dynamic_index_in_dim(entering, here + int(reverse), time, keepdims=False)


def _decay(a, b, final, reset, tail):
    """The product of this device's multipliers, which is what its steps leave of a state."""
    a = a.reshape((1,) * (tail + 1 - a.ndim) + a.shape)
    steps = a.ndim - tail - 1
    if a.shape[steps] == 1:
        return _power(jnp.squeeze(a, steps), b.shape[b.ndim - tail - 1], tail)
    # The scan itself is a product whose derivative needs no division, and resets cut it.
    one = jnp.ones((), a.dtype) if tail == 1 else jnp.array([1, 0], a.dtype)
    return final(a, jnp.zeros_like(a if reset is None else b), one, reset=reset)


def _power(a, n, tail):
    if tail == 1:
        return power(a, n)
    z = power(lax.complex(a[..., 0], a[..., 1]), n)
    return jnp.stack([z.real, z.imag], axis=-1)
