"""The scan as four JAX primitives, closed under differentiation, batching and sharding.

    forward    x[t] = a[t] x[t-1] + b[t]
    final      its last state alone; the others are never written
    tangent    its derivative, linear in the tangents of a, b and x0
    backward   the transpose of the tangent: one fused pass that gives the cotangents of b, a and x0

Canonical shapes: `a` (1 or B, 1 or L, P), `b` and `x` (B, L, P), `x0` (B, P), `reset` (1 or B, L), or (1, 0) for
none; float pairs carry a last axis of 2. The cotangent of `a` comes one a batch row.

The two layouts differ in the sign of the gradient: the cotangents of float pairs are real gradients, so the
multiplier of the backward pass is conj(a); those of complex arrays follow JAX, whose transposes have no conjugates.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from s5eqx.ops import _native
from s5eqx.ops._primitive import (
    bind,
    differentiate_by,
    fold_batches,
    like,
    lower_natively,
    lower_plainly,
    new_primitive,
    wanted,
)
from s5eqx.ops._scan_reference import blocked, loop


def _conjugate(a, pairs):
    return a * jnp.array([1, -1], a.dtype).reshape((1,) * (a.ndim - 1) + (2,)) if pairs else a


def _multiply(p, q, pairs):
    if not pairs:
        return p * q
    re = p[..., 0] * q[..., 0] - p[..., 1] * q[..., 1]
    im = p[..., 0] * q[..., 1] + p[..., 1] * q[..., 0]
    return jnp.stack([re, im], axis=-1)


def _delayed(x, first, reverse):
    """x[t-1] in the order of the scan, with `first` where there is none before."""
    parts = (x[:, 1:], first) if reverse else (first, x[:, :-1])
    return jnp.concatenate(parts, axis=1)


def _kept(reset, x, values):
    """`values`, zero where a reset drops what enters the step."""
    if reset.shape[1] != x.shape[1]:
        return values
    dropped = reset.reshape(reset.shape + (1,) * (x.ndim - 2))
    return jnp.where(dropped, jnp.zeros_like(values), values)


def _adjoint(a, g, reset, *, reverse, pairs, backend):
    """Cotangents of b and x0, by the scan that runs the other way with the multipliers one step later."""
    nothing = jnp.zeros((g.shape[0], *g.shape[2:]), g.dtype)
    if g.shape[1] == 0:
        return g, nothing
    m = _conjugate(a, pairs)
    if a.shape[1] > 1:
        m = _delayed(m, jnp.zeros_like(m[:, :1]), not reverse)
    flags = reset
    if reset.shape[1] == g.shape[1]:
        flags = _delayed(reset, jnp.zeros_like(reset[:, :1]), not reverse)
    (cotangent,) = bind(scan_p, m, g, nothing, flags, reverse=not reverse, pairs=pairs, backend=backend)
    first = slice(-1, None) if reverse else slice(0, 1)
    entering = _multiply(
        jnp.broadcast_to(_conjugate(a, pairs)[:, first], g[:, first].shape), cotangent[:, first], pairs
    )
    flag = reset[:, first] if reset.shape[1] == g.shape[1] else reset
    return cotangent, _kept(flag, entering, entering)[:, 0]


def _tangent(a, x, x0, reset, da, db, dx0, *, reverse, pairs, backend):
    """dx[t] = a[t] dx[t-1] + (da[t] x[t-1] + db[t])."""
    source = _multiply(jnp.broadcast_to(da, x.shape), _delayed(x, x0[:, None], reverse), pairs)
    return bind(scan_p, a, _kept(reset, x, source) + db, dx0, reset, reverse=reverse, pairs=pairs, backend=backend)


def _backward(a, x, x0, reset, g, *, reverse, pairs, backend):
    cotangent, dx0 = _adjoint(a, g, reset, reverse=reverse, pairs=pairs, backend=backend)
    da = _multiply(_conjugate(_delayed(x, x0[:, None], reverse), pairs), cotangent, pairs)
    da = _kept(reset, x, da)
    return [cotangent, da if a.shape[1] > 1 else jnp.sum(da, axis=1, keepdims=True), dx0]


def last_state(x: jax.Array, x0: jax.Array, reverse: bool) -> jax.Array:
    """The last of the states `x` in the order of the scan; `x0` where L = 0."""
    return x[:, 0 if reverse else -1] if x.shape[1] else x0


def _final(scan):
    """The plain form of the last state, by the plain form of the scan."""

    def final(a, b, x0, reset, *, reverse, **options):
        (x,) = scan(a, b, x0, reset, reverse=reverse, **options)
        return [last_state(x, x0, reverse)]

    return final


scan_p = new_primitive("s5eqx_scan", lambda a, b, x0, reset, **_: [like(b, b.shape)])
final_p = new_primitive("s5eqx_scan_final", lambda a, b, x0, reset, **_: [like(x0, x0.shape)])
tangent_p = new_primitive("s5eqx_scan_tangent", lambda a, x, *_, **__: [like(x, x.shape)])
backward_p = new_primitive(
    "s5eqx_scan_backward",
    lambda a, x, x0, reset, g, **_: [
        like(g, g.shape),
        like(a, (x.shape[0], *a.shape[1:])),
        like(x0, x0.shape),
    ],
)


def _workspace(platform, target, a, b, *_, pairs, **__):
    return _native.workspace_bytes(platform, target, a.shape, b.shape, b.dtype, pairs)


_native_forms = partial(lower_natively, lead=1, split="BP", workspace=_workspace)
_native_forms(scan_p, "s5eqx_scan_forward", "BLP BLP BP BL -> BLP", on_cpu=loop, elsewhere=blocked)
_native_forms(final_p, "s5eqx_scan_final", "BLP BLP BP BL -> BP", on_cpu=_final(loop), elsewhere=_final(blocked))
_native_forms(
    backward_p, "s5eqx_scan_backward", "BLP BLP BP BL BLP -> BLP BLP BP", on_cpu=_backward, elsewhere=_backward
)
lower_plainly(tangent_p, _tangent)

fold_batches(scan_p, batched=1, shareable=(0, 3))
fold_batches(final_p, batched=1, shareable=(0, 3))
fold_batches(tangent_p, batched=1, shareable=(0, 3, 4))
fold_batches(backward_p, batched=1, shareable=(0, 3))

differentiate_by(tangent_p, _tangent)
differentiate_by(backward_p, _backward)


def _scan_jvp(primals, tangents, **params):
    a, _, x0, reset = primals
    da, db, dx0, _ = tangents
    (x,) = bind(scan_p, *primals, **params)
    if all(isinstance(t, ad.Zero) for t in (da, db, dx0)):
        return [x], [ad.Zero(jax.typeof(x).to_tangent_aval())]
    db, dx0 = ad.instantiate_zeros(db), ad.instantiate_zeros(dx0)
    if isinstance(da, ad.Zero):
        return [x], bind(scan_p, a, db, dx0, reset, **params)
    return [x], bind(tangent_p, a, x, x0, reset, da, db, dx0, **params)


def _final_jvp(primals, tangents, *, reverse, **options):
    a, _, x0, reset = primals
    if all(isinstance(t, ad.Zero) for t in tangents[:3]):
        (last,) = bind(final_p, *primals, reverse=reverse, **options)
        return [last], [ad.Zero(jax.typeof(last).to_tangent_aval())]
    if isinstance(tangents[0], ad.Zero):  # linear in the others: no state but the last is needed
        db, dx0 = map(ad.instantiate_zeros, tangents[1:3])
        final = partial(bind, final_p, reverse=reverse, **options)
        return final(*primals), final(a, db, dx0, reset)
    # The tangent of a needs all states, and the last one is among them.
    da, db, dx0 = map(ad.instantiate_zeros, tangents[:3])
    (x,) = bind(scan_p, *primals, reverse=reverse, **options)
    (dx,) = bind(tangent_p, a, x, x0, reset, da, db, dx0, reverse=reverse, **options)
    return [last_state(x, x0, reverse)], [last_state(dx, dx0, reverse)]


def _scan_transpose(cotangents, a, b, x0, reset, **params):
    (g,) = cotangents
    if isinstance(g, ad.Zero):
        return [None, None, None, None]
    db, dx0 = _adjoint(a, g, reset, **params)
    return [None, *wanted((b, x0), (db, dx0)), None]


def _final_transpose(cotangents, a, b, x0, reset, *, reverse, **options):
    (g,) = cotangents
    if isinstance(g, ad.Zero):
        return [None, None, None, None]
    shape = (b.aval if ad.is_undefined_primal(b) else b).shape
    at_end = jnp.zeros((shape[0], shape[1] - 1, *shape[2:]), g.dtype)
    g = jnp.concatenate([g[:, None], at_end] if reverse else [at_end, g[:, None]], axis=1)
    db, dx0 = _adjoint(a, g, reset, reverse=reverse, **options)
    return [None, *wanted((b, x0), (db, dx0)), None]


def _tangent_transpose(cotangents, a, x, x0, reset, da, db, dx0, **params):
    (g,) = cotangents
    if isinstance(g, ad.Zero):
        return [None] * 7
    cotangent, ct_a, ct_x0 = bind(backward_p, a, x, x0, reset, g, **params)
    rows = da.aval.shape[0] if ad.is_undefined_primal(da) else ct_a.shape[0]
    if rows != ct_a.shape[0]:
        ct_a = jnp.sum(ct_a, axis=0, keepdims=True)
    return [None] * 4 + wanted((da, db, dx0), (ct_a, cotangent, ct_x0))


ad.primitive_jvps[scan_p] = _scan_jvp
ad.primitive_transposes[scan_p] = _scan_transpose
ad.primitive_jvps[final_p] = _final_jvp
ad.primitive_transposes[final_p] = _final_transpose
ad.primitive_transposes[tangent_p] = _tangent_transpose
