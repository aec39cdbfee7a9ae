"""The state-space step as three JAX primitives, closed under differentiation, batching and sharding.

    forward    u -> (y, last state, kept states)
    tangent    its derivative, linear in the tangents of u, a, the weights and x0
    backward   the transpose of the tangent

Canonical shapes: `u` and `y` (B, L, D), `a` (P, 2), `w_in` (D, 2P), `w_out` (2P, D), `skip` (D,), `x0` (B, P, 2),
`reset` as for the scan. Columns of `w_in` and rows of `w_out` interleave real and imaginary parts, so the complex
products B u and Re(C x) are real ones, on (B·L, .) matrices, and the states are float pairs.

`kept` (B, L / chunk, P, 2), rounded up, passes from the forward to the backward pass: the state after every `chunk`
steps, and the last one. The native kernels keep few and compute the others again, a block at a time, so that states
never leave the cache; they have a `chunk` of their own, `CHUNK`. With a `chunk` of 1 all are kept, and only the CPU's
kernel takes part: other platforms compose the step of matrix products and the scan. `kept` has no tangent of its own:
derivatives of the tangent and of the backward pass compute the states from the inputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from s5eqx.ops import _native
from s5eqx.ops._primitive import (
    bind,
    differentiate_by,
    fold_batches,
    like,
    lower_natively,
    lower_plainly,
    map_reference,
    new_primitive,
    wanted,
)
from s5eqx.ops._scan_primitives import backward_p as scan_backward_p
from s5eqx.ops._scan_primitives import last_state, scan_p
from s5eqx.ops._scan_primitives import tangent_p as scan_tangent_p

CHUNK = 64
"""Steps between the states that the native kernels keep."""


# Reshaped in two steps, each of one axis: an axis that is sharded under an explicit mesh survives only such steps.
def _rows(z, width):
    """(B, L, ...) as (B L, width)."""
    return z.reshape(*z.shape[:2], width).reshape(z.shape[0] * z.shape[1], width)


def _states(z, shape):
    """(B L, 2P) as (B, L, P, 2)."""
    return z.reshape(*shape[:2], z.shape[1]).reshape(shape)


def _cotangent(w, rows, g):
    """rows^T g: the cotangent of w in rows @ w, and sharded as w is."""
    return jax.linear_transpose(lambda w: rows @ w, w)(g)[0]


def _all_states(u, a, w_in, x0, reset, backend):
    drive = _states(_rows(u, u.shape[2]) @ w_in, (*u.shape[:2], *a.shape))
    (x,) = bind(scan_p, a[None, None], drive, x0, reset, reverse=False, pairs=True, backend=backend)
    return x


def _forward(u, a, w_in, w_out, skip, x0, reset, *, chunk, backend):
    x = _all_states(u, a, w_in, x0, reset, backend)
    y = _rows(x, w_out.shape[0]) @ w_out + _rows(u, u.shape[2]) * skip[None]
    kept = x if chunk == 1 else x[:, chunk - 1 :: chunk]
    if x.shape[1] % chunk:
        kept = jnp.concatenate([kept, x[:, -1:]], axis=1)
    return [y.reshape(u.shape), last_state(x, x0, reverse=False), kept]


def _tangent(u, a, w_in, w_out, skip, x0, reset, kept, du, da, dw_in, dw_out, dskip, dx0, *, chunk, backend):
    x = kept if chunk == 1 else _all_states(u, a, w_in, x0, reset, backend)
    u_rows, du_rows, x_rows = _rows(u, u.shape[2]), _rows(du, u.shape[2]), _rows(x, w_out.shape[0])
    drive = _states(du_rows @ w_in + u_rows @ dw_in, x.shape)
    (dx,) = bind(
        scan_tangent_p, a[None, None], x, x0, reset, da[None, None], drive, dx0,
        reverse=False, pairs=True, backend=backend,
    )  # fmt: skip
    dy = _rows(dx, w_out.shape[0]) @ w_out + x_rows @ dw_out + du_rows * skip[None] + u_rows * dskip[None]
    return [dy.reshape(u.shape), last_state(dx, dx0, reverse=False)]


def _backward(u, a, w_in, w_out, skip, x0, reset, kept, g, g_last, *, chunk, backend):
    x = kept if chunk == 1 else _all_states(u, a, w_in, x0, reset, backend)
    u_rows, g_rows, x_rows = _rows(u, u.shape[2]), _rows(g, u.shape[2]), _rows(x, w_out.shape[0])
    gx = _states(g_rows @ w_out.T, x.shape)
    if x.shape[1]:
        gx = gx.at[:, -1].add(g_last)
    drive, da, dx0 = bind(scan_backward_p, a[None, None], x, x0, reset, gx, reverse=False, pairs=True, backend=backend)
    drive = _rows(drive, w_out.shape[0])
    du = (drive @ w_in.T + g_rows * skip[None]).reshape(u.shape)
    return [
        du,
        jnp.sum(da, axis=(0, 1)),
        _cotangent(w_in, u_rows, drive),
        _cotangent(w_out, x_rows, g_rows),
        jnp.sum(u_rows * g_rows, axis=0),
        dx0 if x.shape[1] else g_last,
    ]


def _anew(function):
    """`function` with the states computed again from the inputs, so that it may be differentiated."""

    def from_inputs(*operands, chunk, backend):
        inputs, others = operands[:7], operands[8:]
        u, a, w_in, _, _, x0, reset = inputs
        states = _all_states(u, a, w_in, x0, reset, backend)
        return function(*inputs, states, *others, chunk=1, backend=backend)

    return from_inputs


ssm_p = new_primitive(
    "s5eqx_ssm",
    lambda u, a, w_in, w_out, skip, x0, reset, *, chunk, **_: [
        like(u, u.shape), like(x0, x0.shape), like(u, (u.shape[0], -(-u.shape[1] // chunk), *a.shape)),
    ],
)  # fmt: skip
tangent_p = new_primitive(
    "s5eqx_ssm_tangent",
    lambda u, a, w_in, w_out, skip, x0, *_, **__: [like(u, u.shape), like(x0, x0.shape)],
)
backward_p = new_primitive(
    "s5eqx_ssm_backward",
    lambda u, a, w_in, w_out, skip, x0, *_, **__: [like(z, z.shape) for z in (u, a, w_in, w_out, skip, x0)],
)


def _attributes(platform, u, *_, chunk):
    """Of the FFI call; None where no kernel of the platform is meant: GPUs have matrix products for wide layers."""
    if platform == "cpu":
        return {"chunk": np.int64(chunk)}
    return None if chunk == 1 else {"chunk": np.int64(chunk), "projection": _native.ssm_projection(u.dtype)}


def _workspace(platform, target, u, a, *_, **__):
    return _native.ssm_workspace_bytes(platform, target, u.shape, a.shape[0], u.dtype)


_native_forms = partial(lower_natively, lead=0, split="B", attributes=_attributes, workspace=_workspace)
_native_forms(ssm_p, "s5eqx_ssm_forward", "BLD S DX XD D BS BL -> BLD BS BCS", on_cpu=_forward, elsewhere=_forward)
_native_forms(
    backward_p, "s5eqx_ssm_backward", "BLD S DX XD D BS BL BCS BLD BS -> BLD S DX XD D BS",
    on_cpu=_backward, elsewhere=_backward,
)  # fmt: skip
lower_plainly(tangent_p, _tangent)

fold_batches(ssm_p, batched=0, shareable=(6,), unbatched=(1, 2, 3, 4), reference=_forward)
fold_batches(tangent_p, batched=0, shareable=(6,), unbatched=(1, 2, 3, 4, 9, 10, 11, 12), reference=_tangent)
map_reference(backward_p, _backward)  # its results are sums over the batch: folding would mix them

differentiate_by(tangent_p, _anew(_tangent))
differentiate_by(backward_p, _anew(_backward))


def _ssm_jvp(primals, tangents, **params):
    y, last, kept = bind(ssm_p, *primals, **params)
    tangents = [ad.instantiate_zeros(t) for t in tangents[:6]]
    dy, dlast = bind(tangent_p, *primals, kept, *tangents, **params)
    return [y, last, kept], [dy, dlast, ad.Zero(jax.typeof(kept).to_tangent_aval())]


def _tangent_transpose(cotangents, *operands, **params):
    if all(isinstance(g, ad.Zero) for g in cotangents):
        return [None] * len(operands)
    g, g_last = (ad.instantiate_zeros(ct) for ct in cotangents)
    results = bind(backward_p, *operands[:8], g, g_last, **params)
    return [None] * 8 + wanted(operands[8:], results)


ad.primitive_jvps[ssm_p] = _ssm_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
