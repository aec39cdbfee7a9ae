"""A state-space model of each channel in modal form: poles and residues in discrete time."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from s5eqx._typing import Array, Complex, Float, PRNGKeyArray, checked
from s5eqx.nn._diagonal import AbstractDiagonalSSM
from s5eqx.nn.s5 import as_complex


class ModalSSM(AbstractDiagonalSSM):
    """A complex state of `P` modes for each channel, with one input and `c` outputs:

        s[t] = lambda s[t-1] + u[t],   lambda = exp(-exp(log_decay) + i phase)
        y[t] = Re(sum_n R_n s_n[t]) + D u[t]

    Its kernel is `h[t] = Re(sum_n R_n lambda_n^t)`, plus `D` at 0. Modes are not taken to be halves of conjugate pairs:
    the real part does that, and a real pole has a mode of its own. `|lambda| < 1` whatever is learnt. The outputs are
    flattened in the order (c, D).

    A whole sequence is convolved with `kernel(L)` by FFT. With `reset` it is scanned, chunk after chunk.

    Source: Massaroli et al., "Laughing Hyena" (arXiv 2310.18780), with the indices of StripedHyena, where the residues
    read the state that has seen `u[t]`.

    Differs from the reference: the poles are stored as decay and phase; a channel may have several outputs.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("log_decay", "phase", "R", "D")
    resets: ClassVar[bool] = True

    log_decay: Float[Array, "D P"]
    phase: Float[Array, "D P"]
    R: Float[Array, "c D P 2"]
    D: Float[Array, "c D"]

    def __init__(
        self,
        width: int,
        state_size: int,
        *,
        channels: int = 1,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = math.pi,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in, `D`.
        - `state_size`: complex modes a channel, `P`.
        - `channels`: `c`, the outputs of each channel.
        - `r_min`, `r_max`: `|lambda|` starts between them, with `|lambda|^2` uniform.
        - `max_phase`: the phase of `lambda` starts uniform in `[0, max_phase]`, in radians a step.

        The residues are complex normals times `sqrt((1 - |lambda|^2) / P)`: white noise keeps about its size. `D` is
        drawn from `N(0, 1)`.
        """
        if width < 1 or state_size < 1 or channels < 1:
            raise ValueError(
                "width, state_size and channels must be positive; got "
                f"width={width}, state_size={state_size}, channels={channels}."
            )
        if not 0 <= r_min <= r_max <= 1 or r_max == 0 or not max_phase >= 0:
            raise ValueError(
                "The ring of poles must satisfy 0 <= r_min <= r_max <= 1, r_max > 0 and max_phase >= 0; got "
                f"r_min={r_min}, r_max={r_max}, max_phase={max_phase}."
            )
        dtype = jnp.result_type(float)
        tiny, eps = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).eps)
        r_key, phase_key, R_key, D_key = jr.split(key, 4)
        squared = jr.uniform(r_key, (width, state_size), dtype, r_min**2, r_max**2)
        squared = jnp.clip(squared, tiny, 1 - eps)  # no logarithm of 0 below
        self.log_decay = jnp.log(-0.5 * jnp.log(squared))
        self.phase = jr.uniform(phase_key, (width, state_size), dtype, 0, max_phase)
        scale = jnp.sqrt((1 - squared) / state_size)
        self.R = scale[None, :, :, None] * jr.normal(R_key, (channels, width, state_size, 2), dtype)
        self.D = jr.normal(D_key, (channels, width), dtype)

    @classmethod
    @checked
    def from_poles(
        cls, poles: Complex[Array, "D P"], residues: Complex[Array, "c D P"], D: Float[Array, "c D"]
    ) -> "ModalSSM":
        """The model of these poles `lambda` and residues `R`, in the dtype of `D`.

        **Raises:** `ValueError` for a pole on the unit circle or outside.
        """
        log_decay, phase = decay_and_phase(poles)
        pairs = np.stack([np.real(residues), np.imag(residues)], axis=-1)
        leaves = (jnp.asarray(a, D.dtype) for a in (log_decay, phase, pairs, D))
        (width, state_size), channels = poles.shape, len(D)
        skeleton = eqx.filter_eval_shape(lambda key: cls(width, state_size, channels=channels, key=key), jr.key(0))
        return eqx.tree_at(lambda ssm: (ssm.log_decay, ssm.phase, ssm.R, ssm.D), skeleton, tuple(leaves))

    @checked
    def poles(self) -> Complex[Array, "D P"]:
        """`lambda`."""
        return as_poles(self.log_decay, self.phase)

    @checked
    def discretised(self) -> tuple[Complex[Array, "D P"], Complex[Array, "D P"], Complex[Array, "c D P"]]:
        """`lambda`, ones, and half the residues: the recurrence that a `DiagonalSSM` runs."""
        poles = self.poles()
        return poles, jnp.ones_like(poles), 0.5 * as_complex(self.R)


def as_poles(log_decay: Float[Array, "*shape"], phase: Float[Array, "*shape"]) -> Complex[jax.Array, "*shape"]:
    """`exp(-exp(log_decay) + i phase)`."""
    return jnp.exp(lax.complex(-jnp.exp(log_decay), phase))


def decay_and_phase(poles: Complex[Array, "*shape"]) -> tuple[np.ndarray, np.ndarray]:
    """`log_decay` and `phase` of poles inside the unit circle, in double precision."""
    poles = np.asarray(poles, np.complex128)
    size = np.abs(poles)
    if not np.all(size < 1):
        worst = poles.flat[np.argmax(np.where(np.isnan(size), np.inf, size))]
        raise ValueError(
            f"Poles must lie inside the unit circle, |lambda| < 1; got {worst}, of size {abs(worst)}. Move such poles "
            "inside, or scale them down."
        )
    size = np.maximum(size, np.finfo(np.float32).tiny)  # no logarithm of 0, and no gradient that is NaN
    return np.log(-np.log(size)), np.angle(poles)
