"""Long convolutions replaced by small state-space models: a step has a constant cost, and no sequence is too long.

    model, errors = distill_model(model, order=16)

`distill` does it for one kernel.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax

from s5eqx._realisation import find_poles, find_residues
from s5eqx._typing import Array, Float, PyTree, checked
from s5eqx.nn import BidirectionalLongConv, ModalSSM, Stack, materialise
from s5eqx.nn.convolution import AbstractConvolution

_RATE = 2e-2  # the first step of the refinement, as a share of what each parameter is worth


@checked
def distill(
    kernel: Float[Array, "K D"], order: int, *, skip: Float[Array, " D"] | None = None, steps: int = 100
) -> tuple[ModalSSM, Float[np.ndarray, " D"]]:
    """A `ModalSSM` of `order` modes a channel whose kernel is about `kernel`, and how far it is from it: for each
    channel `||h - h^|| / ||h||` over the taps, without the skip; 0 for a channel of zeros.

    Poles come from the Hankel matrix `H[i, j] = h[1+i+j]` of each channel: a shift by one row acts on its leading
    left singular vectors as a matrix (by least squares) whose eigenvalues they are. Residues are the least squares
    fit to all taps; tap 0 is exact, through `D`. A conjugate pair of poles takes one mode and a real pole another; a
    channel that needs fewer modes has residues of zero in the others. Gradient descent then moves poles and residues,
    and a channel keeps the result where it is nearer. A kernel that is of this order comes out exactly, up to rounding.

    The matrix is never formed: 256 channels of 16,384 taps and 16 modes take a minute or two on two cores.

    **Arguments:**

    - `kernel`: the taps, `h`. Concrete numbers: it is not for use inside `jax.jit`.
    - `order`: complex modes a channel, `P`.
    - `skip`: what acts beside tap 0, and becomes part of `D`.
    - `steps`: of the gradient descent; 0 leaves the closed form.

    **Raises:** `ValueError` for a kernel that is empty or not finite, and for an order below 1.

    Source: Massaroli et al., "Laughing Hyena" (arXiv 2310.18780); for the closed form Ho and Kalman, "Effective
    construction of linear state-variable models from input/output functions" (1966), and Kung, "A new identification
    and model reduction algorithm via singular value decompositions" (1978).

    Differs from the reference: it fits by gradient descent alone, from random modes, whose number it picks from the
    singular values of the Hankel matrix; here the order is given and the descent starts from the closed form.
    """
    taps = jnp.asarray(kernel)
    skips = jnp.zeros(taps.shape[1], taps.dtype) if skip is None else jnp.asarray(skip)
    ssm, errors = _fit("kernel", taps[None], skips[None], order, steps)
    return ssm, errors[0]


@checked
def distill_model(model: PyTree, order: int, *, steps: int = 100) -> tuple[PyTree, dict[str, Float[np.ndarray, "..."]]]:
    """The same model with a `ModalSSM` in place of every long convolution, and the errors of each: by its path in the
    new model, such as `.backbone.blocks[0].mixer.bank.mixers[0]`, one for each output of the convolution.

    Implicit filters are materialised first. The outputs of a channel that has several share its poles. Dropout of taps
    is off. A layer that looks ahead does not stream, and is left as it is.

    **Arguments:** those of `distill`.

    **Raises:** `ValueError` as `distill` does, and for a model without long convolutions.
    """
    errors = {}
    model = _distilled(materialise(model), "", order, steps, errors)
    if not errors:
        raise ValueError(
            "A model to distill must hold a long convolution: a `Convolution`, a `SquashedConvolution`, or a bank of "
            f"implicit filters; a {type(model).__name__} came, without any. Leave it as it is."
        )
    return model, errors


def _distilled(node, path, order, steps, errors):
    is_node = lambda node: isinstance(node, AbstractConvolution | Stack | BidirectionalLongConv)

    def replace(keys, node):
        here = path + jtu.keystr(keys)
        if isinstance(node, Stack):
            layers = (_distilled(layer, f"{here}[{i}]", order, steps, errors) for i, layer in enumerate(node))
            return Stack.of(tuple(layers))
        if not isinstance(node, AbstractConvolution):
            return node
        kernel, skip = eqx.nn.inference_mode(node).taps()
        _, window = node.init_state()
        width = window.shape[-1]
        kernel, skip = jnp.moveaxis(kernel.reshape(len(kernel), -1, width), 1, 0), skip.reshape(-1, width)
        ssm, error = _fit(f"the kernel at {here or 'the top'}", kernel, skip, order, steps)
        errors[here] = error.reshape(-1)
        return ssm

    return jtu.tree_map_with_path(replace, node, is_leaf=is_node)


def _fit(name, kernel, skip, order, steps):
    """The model of `kernel` (c, K, D) and `skip` (c, D), and its errors (c, D)."""
    if order < 1 or steps < 0:
        raise ValueError(f"order must be at least 1 and steps at least 0; got order={order}, steps={steps}.")
    if kernel.size == 0:
        raise ValueError(
            f"{name} must have at least one tap and one channel; got shape {kernel.shape[1:]}. Check the model."
        )
    h = np.asarray(kernel, np.float64)
    if not np.all(np.isfinite(h)):
        t, d = np.argwhere(~np.isfinite(h))[0, 1:]
        raise ValueError(f"{name} must be finite; got {h[:, t, d]} at tap {t} of channel {d}. Check the model.")
    dtype = np.promote_types(kernel.dtype, np.float32)
    found = [find_poles(h[:, 1:, d], order, float(jnp.finfo(kernel.dtype).eps)) for d in range(h.shape[2])]
    # Where poles are to spare, they are those of a discrete Fourier transform: 2 P taps are always a sum of them.
    spare = 0.5 ** (1 / h.shape[1]) * np.exp(1j * np.pi * (np.arange(order) + 0.5) / order)
    poles = np.stack([np.concatenate([modes, spare[len(modes) :]]) for modes in found])
    used = np.stack([np.arange(order) < len(modes) for modes in found])
    ssm = _with_poles(poles, used, h, skip, dtype)
    best = poles, used, ssm, _errors(ssm, skip, h)
    if 2 * order >= h.shape[1] - 1:
        best = _nearer(best, np.broadcast_to(spare, poles.shape), h, skip)
    elif not np.all(used):
        best = _nearer(best, poles, h, skip)
    if steps and h.shape[1] > 1:
        moved = _refined(best[2], jnp.asarray(h[:, 1:], dtype), steps)
        best = _nearer(best, np.asarray(moved, np.complex128), h, skip)
    return best[2:]


def _nearer(best, other, h, skip):
    """`best` (poles, those in use, model, errors) with the poles `other` for each channel that they bring nearer. Where
    the error is rounding there is nothing to gain."""
    poles, used, ssm, errors = best
    dtype = ssm.D.dtype
    other_errors = _errors(_with_poles(other, np.ones_like(used), h, skip, dtype), skip, h)
    size, other_size = (np.linalg.norm(e, axis=0) for e in (errors, other_errors))
    better = (other_size < size) & (size > float(jnp.finfo(dtype).eps) ** 0.75)
    poles, used = np.where(better[:, None], other, poles), used | better[:, None]
    return poles, used, _with_poles(poles, used, h, skip, dtype), np.where(better, other_errors, errors)


def _errors(ssm, skip, h):
    """`||h - h^|| / ||h||` for each output (c, D), zero where both are."""
    ours = np.array(_kernel(ssm, h.shape[1]), np.float64)
    ours[:, 0] += np.asarray(ssm.D, np.float64) - np.asarray(skip, np.float64)
    norm = np.linalg.norm(h, axis=1)
    return np.linalg.norm(ours - h, axis=1) / np.where(norm > 0, norm, 1)


@eqx.filter_jit
def _kernel(ssm, length):
    return ssm.kernel(length)


def _with_poles(poles, used, h, skip, dtype):
    """The model of these poles (D, P) whose residues fit the taps `h` best, zero where a pole is not `used`."""
    outputs, _, width = h.shape
    residues = np.zeros((outputs, *poles.shape), np.complex128)
    ssm = ModalSSM.from_poles(poles, residues, jnp.zeros((outputs, width), dtype))
    rounded = np.asarray(ssm.poles(), np.complex128)
    for d, mask in enumerate(used):
        residues[:, d, mask] = find_residues(h[:, 1:, d], rounded[d, mask], float(jnp.finfo(dtype).eps))
    R = jnp.asarray(np.stack([residues.real, residues.imag], axis=-1), dtype)
    D = np.asarray(skip, np.float64) + h[:, 0] - np.sum(np.asarray(R[..., 0], np.float64), axis=-1)
    return eqx.tree_at(lambda ssm: (ssm.R, ssm.D), ssm, (R, jnp.asarray(D, dtype)))


@eqx.filter_jit
def _refined(ssm, target, steps):
    """The poles (D, P) of the best iterate of each channel, for the taps from 1 on (c, M, D): gradient descent on
    poles and residues at once, all channels side by side."""
    # In these units a step of one size is fair to all: decays by their ratio, phases by what the decay can resolve,
    # residues by what their mode adds to the whole.
    decay = jnp.exp(ssm.log_decay)
    size = jnp.sqrt(jnp.sum(target**2, axis=(0, 1)))
    size = jnp.where(size > 0, size, 1.0)
    added = size[:, None] * jnp.sqrt(-jnp.expm1(-2 * decay))

    def moved(parameters):
        log_decay, phase, R = parameters
        leaves = ssm.log_decay + log_decay, ssm.phase + phase * decay, ssm.R + R * added[None, :, :, None]
        return eqx.tree_at(lambda ssm: (ssm.log_decay, ssm.phase, ssm.R), ssm, leaves)

    def loss(parameters):
        error = (moved(parameters).kernel(target.shape[1] + 1)[:, 1:] - target) / size[None, None]
        each = jnp.sum(error**2, axis=(0, 1))
        return jnp.sum(each), each

    def step(carry, _):
        parameters, state, best, least = carry
        gradient, each = jax.grad(loss, has_aux=True)(parameters)
        better = each < least
        keep = lambda new, old: jnp.where(better[:, None], new, old)
        best = jax.tree.map(keep, parameters[:2], best)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts by rates
            updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state, best, jnp.minimum(each, least)), None

    optimiser = optax.adam(optax.cosine_decay_schedule(_RATE, steps))
    start = jax.tree.map(jnp.zeros_like, (ssm.log_decay, ssm.phase, ssm.R))
    carry = start, optimiser.init(start), start[:2], jnp.full_like(size, jnp.inf)
    (_, _, best, _), _ = lax.scan(step, carry, length=steps)
    return moved((*best, start[2])).poles()
