"""The state-space step as three JAX primitives, so that its dense maths stays two-dimensional under `jax.vmap`.

    forward    u -> (y, last state, states)
    tangent    its derivative, linear in the tangents of u, a, the weights and x0
    backward   the transpose of the tangent

Canonical shapes: `u` and `y` (B, L, D), `a` (P, 2), `w_in` (D, 2P), `w_out` (2P, D), `skip` (D,), `x0` (B, P, 2),
`reset` as for the scan. Columns of `w_in` and rows of `w_out` interleave real and imaginary parts, so the complex
products B u and Re(C x) are real ones, on (B·L, .) matrices, and the states are float pairs.

`states` passes from the forward to the backward pass and has no tangent of its own: derivatives of the tangent and
of the backward pass compute the states again.
"""

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from s5eqx.ops._primitive import (
    bind,
    differentiate_by,
    fold_batches,
    like,
    lower_plainly,
    map_reference,
    new_primitive,
    wanted,
)
from s5eqx.ops._scan_primitives import backward_p as scan_backward_p
from s5eqx.ops._scan_primitives import last_state, scan_p
from s5eqx.ops._scan_primitives import tangent_p as scan_tangent_p


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


def _forward(u, a, w_in, w_out, skip, x0, reset, *, backend):
    u_rows = _rows(u, u.shape[2])
    drive = _states(u_rows @ w_in, (*u.shape[:2], *a.shape))
    (x,) = bind(scan_p, a[None, None], drive, x0, reset, reverse=False, pairs=True, backend=backend)
    y = _rows(x, w_out.shape[0]) @ w_out + u_rows * skip[None]
    return [y.reshape(u.shape), last_state(x, x0, reverse=False), x]


def _tangent(u, a, w_in, w_out, skip, x0, reset, x, du, da, dw_in, dw_out, dskip, dx0, *, backend):
    u_rows, du_rows, x_rows = _rows(u, u.shape[2]), _rows(du, u.shape[2]), _rows(x, w_out.shape[0])
    drive = _states(du_rows @ w_in + u_rows @ dw_in, x.shape)
    (dx,) = bind(
        scan_tangent_p, a[None, None], x, x0, reset, da[None, None], drive, dx0,
        reverse=False, pairs=True, backend=backend,
    )  # fmt: skip
    dy = _rows(dx, w_out.shape[0]) @ w_out + x_rows @ dw_out + du_rows * skip[None] + u_rows * dskip[None]
    return [dy.reshape(u.shape), last_state(dx, dx0, reverse=False)]


def _backward(u, a, w_in, w_out, skip, x0, reset, x, g, g_last, *, backend):
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

    def from_inputs(*operands, backend):
        inputs, others = operands[:7], operands[8:]
        _, _, states = _forward(*inputs, backend=backend)
        return function(*inputs, states, *others, backend=backend)

    return from_inputs


ssm_p = new_primitive(
    "s5eqx_ssm",
    lambda u, a, w_in, w_out, skip, x0, reset, **_: [
        like(u, u.shape), like(x0, x0.shape), like(u, (*u.shape[:2], *a.shape)),
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

lower_plainly(ssm_p, _forward)
lower_plainly(tangent_p, _tangent)
lower_plainly(backward_p, _backward)

fold_batches(ssm_p, batched=0, shareable=(6,), unbatched=(1, 2, 3, 4), reference=_forward)
fold_batches(tangent_p, batched=0, shareable=(6,), unbatched=(1, 2, 3, 4, 9, 10, 11, 12), reference=_tangent)
map_reference(backward_p, _backward)  # its results are sums over the batch: folding would mix them

differentiate_by(tangent_p, _anew(_tangent))
differentiate_by(backward_p, _anew(_backward))


def _ssm_jvp(primals, tangents, *, backend):
    y, last, x = bind(ssm_p, *primals, backend=backend)
    tangents = [ad.instantiate_zeros(t) for t in tangents[:6]]
    dy, dlast = bind(tangent_p, *primals, x, *tangents, backend=backend)
    return [y, last, x], [dy, dlast, ad.Zero(jax.typeof(x).to_tangent_aval())]


def _tangent_transpose(cotangents, *operands, backend):
    if all(isinstance(g, ad.Zero) for g in cotangents):
        return [None] * len(operands)
    g, g_last = (ad.instantiate_zeros(ct) for ct in cotangents)
    results = bind(backward_p, *operands[:8], g, g_last, backend=backend)
    return [None] * 8 + wanted(operands[8:], results)


ad.primitive_jvps[ssm_p] = _ssm_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
