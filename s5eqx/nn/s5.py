"""S5: a diagonal state-space layer with many inputs and many outputs."""

import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from s5eqx import ops
from s5eqx._typing import Array, Bool, Complex, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._select import drop
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.hippo import diagonalise
from s5eqx.nn.s5_init import AbstractCInit, TruncatedNormal, init_B


class S5(AbstractCausalMixer):
    """One complex state of size `P`, shared by all `D` channels:

        x[t] = Lambda_bar x[t-1] + B_bar u[t]
        y[t] = f Re(C x[t]) + D u[t]               f = 2 under conjugate symmetry, else 1

    followed by `activation(y)`. `Lambda_bar, B_bar` come from the continuous system `Lambda, B` and the time
    step `Delta = step_rescale exp(log_Delta)`, one for each state.

    Source: Smith, Warrington and Linderman, "Simplified State Space Layers for Sequence Modeling"
    (arXiv 2208.04933).

    Differs from the reference:
      - every trainable leaf is real: `Lambda`, `B` and `C` are stored as (re, im) pairs;
      - the state can be carried from chunk to chunk, and dropped at any step by `reset`;
      - `intervals` serves samples that are not equally spaced: `intervals[t]`, the time from sample t-1 to sample t in
        units of the input interval, multiplies `Delta` at step t, in `Lambda_bar` and in `B_bar`.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("Lambda_re", "Lambda_im", "log_Delta", "B", "C", "D")
    resets: ClassVar[bool] = True
    takes_intervals: ClassVar[bool] = True

    Lambda_re: Float[Array, " P"]
    Lambda_im: Float[Array, " P"]
    log_Delta: Float[Array, " P"]
    B: Float[Array, "P D 2"]
    C: Float[Array, "D P 2"]
    D: Float[Array, " D"]
    activation: Callable
    discretisation: AbstractDiscretisation
    conj_sym: bool = eqx.field(static=True)
    clip_eigs: bool = eqx.field(static=True)
    step_rescale: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        state_size: int,
        *,
        num_blocks: int = 1,
        conj_sym: bool = True,
        C_init: AbstractCInit = TruncatedNormal(),
        discretisation: AbstractDiscretisation = ZOH(),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        clip_eigs: bool = True,
        step_rescale: float = 1.0,
        activation: Callable = eqx.nn.Identity(),
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `state_size`: real states; `P` is half of it under conjugate symmetry.
        - `num_blocks`: equal HiPPO blocks that the state starts from; divides `state_size`.
        - `conj_sym`: keep one of each pair of conjugate states, and count it twice in the output.
        - `C_init`: draws `C`; `TruncatedNormal()`, `LecunNormal()` or `ComplexNormal()`.
        - `discretisation`: `ZOH()` or `Bilinear()`.
        - `dt_min`, `dt_max`: `Delta` starts log-uniform between them, in units of the input interval.
        - `clip_eigs`: keep the real parts of `Lambda` at -1e-4 or below, so that the system is stable.
        - `step_rescale`: multiplies every `Delta`, e.g. by 2 for data sampled half as often.
        - `activation`: a module on `(L, D)` and `(D,)`, such as `Gelu()`.
        - `dtype`: float32 or float64; by default the one that JAX is set to.
        """
        if width < 1:
            raise ValueError(f"width must be positive; got {width}.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"The bounds of the time step must satisfy 0 < dt_min <= dt_max; got dt_min={dt_min}, dt_max={dt_max}."
            )
        if not step_rescale > 0:
            raise ValueError(f"step_rescale multiplies the time step and must be positive; got {step_rescale}.")
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        if dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"The recurrence is kept in float32 or float64; got dtype={dtype.name}. For a lower compute "
                "dtype build the layer in float32 and use `s5eqx.nn.cast`."
            )
        Lambda, V, Vinv = diagonalise(state_size, num_blocks, conj_sym=conj_sym)
        B_key, C_key, D_key, Delta_key = jr.split(key, 4)
        self.Lambda_re = jnp.asarray(np.real(Lambda), dtype)
        self.Lambda_im = jnp.asarray(np.imag(Lambda), dtype)
        self.log_Delta = jr.uniform(Delta_key, Lambda.shape, dtype, math.log(dt_min), math.log(dt_max))
        self.B = init_B(Vinv, width, dtype=dtype, key=B_key)
        self.C = C_init(V, width, dtype=dtype, key=C_key)
        self.D = jr.normal(D_key, (width,), dtype)
        self.activation = activation
        self.discretisation = discretisation
        self.conj_sym = conj_sym
        self.clip_eigs = clip_eigs
        self.step_rescale = float(step_rescale)

    @checked
    def discretised(
        self,
    ) -> tuple[Complex[Array, " P"], Complex[Array, "P D"], Complex[Array, "D P"]]:
        """`(Lambda_bar, B_bar, C_tilde)` at the interval 1; `C_tilde` holds the factor `f`, so that
        `y = Re(C_tilde x) + D u`."""
        Lambda_bar, gain = self._transition(None)
        return Lambda_bar, gain[:, None] * as_complex(self.B), self._factor * as_complex(self.C)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        intervals: Float[Array, " L"] | None = None,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        return self.prefill(self.init_state(), x, intervals=intervals, reset=reset, key=key)[1]

    def init_state(self) -> Complex[Array, " P"]:
        return jnp.zeros_like(self._eigenvalues())

    @checked
    def prefill(
        self,
        state: Complex[Array, " P"],
        x: Float[Array, "L D"],
        *,
        intervals: Float[Array, " L"] | None = None,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Complex[Array, " P"], Float[Array, "L D"]]:
        state, y = self.linear_part(state, x, intervals=intervals, reset=reset)
        return state, self.activation(y)

    @checked
    def step(
        self,
        state: Complex[Array, " P"],
        x_t: Float[Array, " D"],
        *,
        intervals: Float[Array, ""] | None = None,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Complex[Array, " P"], Float[Array, " D"]]:
        Lambda_bar, gain = self._transition(intervals)
        u = x_t.astype(self.D.dtype)
        state = drop(state, reset)
        # As products of a plain matrix and a vector, of which a loop over steps can keep the matrices.
        B, C = self.B.swapaxes(1, 2).reshape(-1, len(u)), self.C.reshape(len(u), -1)
        state = Lambda_bar * state + gain * as_complex((B @ u).reshape(-1, 2))
        parts = jnp.stack([jnp.real(state), -jnp.imag(state)], axis=-1)
        y = self._factor * (C @ parts.reshape(-1)) + self.D * u
        return state, self.activation(y.astype(x_t.dtype))

    def linear_part(
        self,
        state: Complex[Array, " P"],
        x: Float[Array, "L D"],
        *,
        intervals: Float[Array, " L"] | None = None,
        reset: Bool[Array, " L"] | None = None,
    ) -> tuple[Complex[Array, " P"], Float[Array, "L D"]]:
        """`prefill` without the activation."""
        if intervals is None:
            Lambda_bar, B_bar, C = self.discretised()
            y, state = ops.ssm(x, Lambda_bar, B_bar, C, self.D, state, reset=reset)
        else:
            Lambda_bar, gain = self._transition(intervals)
            B, C = as_complex(self.B), self._factor * as_complex(self.C)
            y, state = ops.ssm(x, Lambda_bar, B, C, self.D, state, gain=gain, reset=reset)
        return state, y

    def entering_state(
        self, x: Float[Array, "L D"], *, axis_name: str, reset: Bool[Array, " L"] | None = None
    ) -> Complex[Array, " P"]:
        """The state before this device's piece `x` of a sequence that is split over a mesh axis; see
        `ops.entering_state_pairs`."""
        Lambda_bar, B_bar, _ = self.discretised()
        w_in = as_pairs(B_bar).swapaxes(0, 1).reshape(x.shape[1], -1)
        drive = (x.astype(w_in.dtype) @ w_in).reshape(len(x), -1, 2)
        state = ops.entering_state_pairs(as_pairs(Lambda_bar), drive, axis_name=axis_name, reset=reset)
        return as_complex(state)

    @property
    def _factor(self):
        return 2 if self.conj_sym else 1

    def _eigenvalues(self):
        Lambda_re = jnp.minimum(self.Lambda_re, -1e-4) if self.clip_eigs else self.Lambda_re
        return lax.complex(Lambda_re, self.Lambda_im)

    def _transition(self, intervals):
        """`Lambda_bar` and `gain`, with a leading axis for the steps where `intervals` has one."""
        Delta = self.step_rescale * jnp.exp(self.log_Delta)
        if intervals is not None:
            intervals = jnp.expand_dims(intervals.astype(Delta.dtype), -1)
            Delta = intervals * jnp.broadcast_to(Delta, (*intervals.shape[:-1], *Delta.shape))
        return self.discretisation(self._eigenvalues(), Delta)


def as_complex(pairs: Float[Array, "*shape 2"]) -> Complex[Array, "*shape"]:
    """The complex numbers of (re, im) pairs on the last axis."""
    return lax.complex(pairs[..., 0], pairs[..., 1])


def as_pairs(z: Complex[Array, "*shape"]) -> Float[jax.Array, "*shape 2"]:
    """The (re, im) pairs of complex numbers, on a last axis."""
    return jnp.stack([jnp.real(z), jnp.imag(z)], axis=-1)
