"""SOAP: Adam in the eigenbases of Shampoo's two factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s5eqx._typing import Array, Float, Int, PyTree


class Side(NamedTuple):
    """One axis of a matrix: the running mean of `G Gᵀ` over it, and that factor's eigenvectors, in columns."""

    factor: Float[Array, "*stack n n"]
    basis: Float[Array, "*stack n n"]


class Moments(NamedTuple):
    """What SOAP remembers of one leaf: `mu` in the space of the gradient, `nu` in the eigenbases."""

    mu: Float[Array, "..."]
    nu: Float[Array, "..."]
    left: Side | None
    right: Side | None


class SoapState(NamedTuple):
    """The number of gradients seen, and the `Moments` of each leaf."""

    count: Int[Array, ""]
    moments: PyTree


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    precondition_frequency: int = 10,
    max_size: int = 10_000,
    shampoo_decay: float | None = None,
) -> optax.GradientTransformation:
    """The direction of SOAP. For the gradient `G` of a matrix, with `Q_L` and `Q_R` the eigenvectors of `L` and `R`,

        M = b1 M + (1 - b1) G
        V = b2 V + (1 - b2) (Q_Lᵀ G Q_R)²
        direction = Q_L [Q_Lᵀ M Q_R / (√V + eps)] Q_Rᵀ        with Adam's corrections of M and V
        L = b2 L + (1 - b2) G Gᵀ,    R = b2 R + (1 - b2) Gᵀ G

    and, every `precondition_frequency` steps, one power iteration of each basis: the `Q` of the QR decomposition of
    `L Q_L`. The first gradient gives the first factors and, exactly, their eigenvectors; it moves nothing.

    The last two axes of a leaf are the matrix; those in front are stacks of matrices, each with factors of its own. A
    leaf of fewer axes gets plain Adam. The state is float32, or float64 where the leaf is.

    **Arguments:**

    - `b1`, `b2`: decay rates of the moments.
    - `eps`: is added to `√V`.
    - `precondition_frequency`: steps from one eigenbasis to the next.
    - `max_size`: an axis longer than this keeps its own basis, and the other alone is turned.
    - `shampoo_decay`: decay rate of `L` and `R`; `None` for `b2`.

    Source: arXiv 2409.11321, algorithms 3 and 4.

    Differs from the reference: the first gradient moves nothing, the moments are corrected for their start, and before
    a power iteration the columns of a basis are sorted by falling eigenvalue, and `V` with them, all as in the
    authors' code, nikhilvyas/SOAP; `eps` is added to the corrected `√V`, as in Adam.
    """
    decay = b2 if shampoo_decay is None else shampoo_decay
    check_decay_rates(b1=b1, b2=b2, shampoo_decay=decay)
    for name, size in {"precondition_frequency": precondition_frequency, "max_size": max_size}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")

    def init(params):
        return SoapState(jnp.zeros([], jnp.int32), jax.tree.map(lambda p: _init(p, max_size), params))

    def update(updates, state, params=None):
        del params
        grads, treedef = jax.tree.flatten(updates)
        moments = treedef.flatten_up_to(state.moments)
        wide = [g.astype(m.mu.dtype) for g, m in zip(grads, moments, strict=True)]

        def begin(moments):
            absorbed = [_absorb(m, g, decay) for g, m in zip(wide, moments, strict=True)]
            return [jnp.zeros_like(g) for g in wide], [_with_eigenvectors(m) for m in absorbed]

        def proceed(moments):
            steps = [_adam(m, g, state.count, b1, b2, eps) for g, m in zip(wide, moments, strict=True)]
            absorbed = [_absorb(m, g, decay) for g, (_, m) in zip(wide, steps, strict=True)]
            due = state.count % precondition_frequency == 0
            turned = jax.lax.cond(due, lambda ms: [_power_iteration(m) for m in ms], lambda ms: ms, absorbed)
            return [direction for direction, _ in steps], turned

        directions, moments = jax.lax.cond(state.count == 0, begin, proceed, moments)
        narrow = [d.astype(g.dtype) for d, g in zip(directions, grads, strict=True)]
        return treedef.unflatten(narrow), SoapState(state.count + 1, treedef.unflatten(moments))

    return optax.GradientTransformation(init, update)


def check_decay_rates(**rates: float):
    """Refuses rates of running means that are not at least 0 and below 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is the weight of the past in a mean: 0 <= {name} < 1 must hold, got {rate}")


def _init(p, max_size):
    dtype = np.promote_types(p.dtype, np.float32)

    def side(axis):
        if p.ndim < 2 or p.shape[axis] > max_size:
            return None
        shape = (*p.shape[:-2], p.shape[axis], p.shape[axis])
        return Side(jnp.zeros(shape, dtype), jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape))

    return Moments(jnp.zeros(p.shape, dtype), jnp.zeros(p.shape, dtype), side(-2), side(-1))


def _matmul(a, b):
    return jnp.matmul(a, b, precision="highest")


def _rotate(x, moments):
    """`Q_Lᵀ x Q_R`."""
    x = x if moments.left is None else _matmul(moments.left.basis.mT, x)
    return x if moments.right is None else _matmul(x, moments.right.basis)


def _rotate_back(x, moments):
    """`Q_L x Q_Rᵀ`."""
    x = x if moments.left is None else _matmul(moments.left.basis, x)
    return x if moments.right is None else _matmul(x, moments.right.basis.mT)


def _adam(moments, g, t, b1, b2, eps):
    """The direction of the step, and the moments with the gradient `g`, the `t`-th of them."""
    t = t.astype(g.dtype)
    mu = b1 * moments.mu + (1 - b1) * g
    nu = b2 * moments.nu + (1 - b2) * jnp.square(_rotate(g, moments))
    scale = jnp.sqrt(nu / (1 - b2**t)) + eps
    direction = _rotate_back(_rotate(mu / (1 - b1**t), moments) / scale, moments)
    return direction, moments._replace(mu=mu, nu=nu)


def _absorb(moments, g, decay):
    """The factors with the gradient `g`."""

    def absorb(side, product):
        if side is None:
            return None
        outer = jnp.einsum(product, g, g, precision="highest")
        return side._replace(factor=decay * side.factor + (1 - decay) * outer)

    left, right = absorb(moments.left, "...ik,...jk->...ij"), absorb(moments.right, "...ki,...kj->...ij")
    return moments._replace(left=left, right=right)


def _with_eigenvectors(moments):
    solve = lambda side: None if side is None else side._replace(basis=jnp.linalg.eigh(side.factor)[1])
    return moments._replace(left=solve(moments.left), right=solve(moments.right))


def _power_iteration(moments):
    """One step of each basis towards the eigenvectors of its factor, the largest eigenvalue in front."""

    def turn(side, nu):
        """The side, and `nu` with its columns in the new order."""
        if side is None:
            return None, nu
        power = _matmul(side.factor, side.basis)
        eigenvalues = jnp.sum(side.basis * power, axis=-2, keepdims=True)
        order = jnp.argsort(eigenvalues, axis=-1, descending=True)
        basis = jnp.linalg.qr(jnp.take_along_axis(power, order, axis=-1))[0]
        return side._replace(basis=basis), jnp.take_along_axis(nu, order, axis=-1)

    right, nu = turn(moments.right, moments.nu)
    if moments.left is None:
        return moments._replace(nu=nu, right=right)
    left, nu = turn(moments.left, nu.mT)
    return moments._replace(nu=nu.mT, left=left, right=right)
