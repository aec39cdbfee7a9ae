"""The linear recurrent unit: a diagonal recurrence that is parametrised in discrete time."""

import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from s5eqx import ops
from s5eqx._typing import Array, Bool, Complex, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._select import drop
from s5eqx.nn.s5 import as_complex


class LRU(AbstractCausalMixer):
    """One complex state of size `P`, shared by all `D` channels:

        x[t] = lambda x[t-1] + exp(gamma_log) B u[t],   lambda = exp(-exp(nu_log) + i exp(theta_log))
        y[t] = Re(C x[t]) + D u[t]

    followed by `activation(y)`. `|lambda| < 1` whatever is learnt.

    Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349).

    Differs from the reference: the state can be carried, and dropped by `reset`. The residual block with its norm,
    dropout and gate is not part of the layer.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("nu_log", "theta_log", "gamma_log", "B", "C", "D")
    resets: ClassVar[bool] = True

    nu_log: Float[Array, " P"]
    theta_log: Float[Array, " P"]
    gamma_log: Float[Array, " P"]
    B: Float[Array, "P D 2"]
    C: Float[Array, "D P 2"]
    D: Float[Array, " D"]
    activation: Callable

    def __init__(
        self,
        width: int,
        state_size: int,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        activation: Callable = eqx.nn.Identity(),
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `state_size`: complex states, `P`.
        - `r_min`, `r_max`: `|lambda|` starts between them, with `|lambda|^2` uniform.
        - `max_phase`: the phase of `lambda` starts uniform in `[0, max_phase]`, in radians a step.
        - `activation`: a module on `(L, D)` and `(D,)`, such as `Gelu()`.
        """
        if width < 1 or state_size < 1:
            raise ValueError(f"width and state_size must be positive; got width={width}, state_size={state_size}.")
        if not 0 <= r_min <= r_max <= 1 or r_max == 0 or not max_phase > 0:
            raise ValueError(
                "The ring of eigenvalues must satisfy 0 <= r_min <= r_max <= 1, r_max > 0 and max_phase > 0; got "
                f"r_min={r_min}, r_max={r_max}, max_phase={max_phase}."
            )
        dtype = jnp.result_type(float)
        tiny, eps = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).eps)
        r_key, phase_key, B_key, C_key, D_key = jr.split(key, 5)
        squared = jr.uniform(r_key, (state_size,), dtype, r_min**2, r_max**2)
        squared = jnp.clip(squared, tiny, 1 - eps)  # no logarithm of 0 below
        self.nu_log = jnp.log(-0.5 * jnp.log(squared))
        self.theta_log = jnp.log(max_phase * jr.uniform(phase_key, (state_size,), dtype, tiny))
        self.gamma_log = 0.5 * jnp.log1p(-squared)
        self.B = jr.normal(B_key, (state_size, width, 2), dtype) / math.sqrt(2 * width)
        self.C = jr.normal(C_key, (width, state_size, 2), dtype) / math.sqrt(state_size)
        self.D = jr.normal(D_key, (width,), dtype)
        self.activation = activation

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        return self.prefill(self.init_state(), x, reset=reset)[1]

    def init_state(self) -> Complex[Array, " P"]:
        return lax.complex(jnp.zeros_like(self.nu_log), jnp.zeros_like(self.nu_log))

    @checked
    def prefill(
        self,
        state: Complex[Array, " P"],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Complex[Array, " P"], Float[Array, "L D"]]:
        y, state = ops.ssm(x, self._transition(), self._input(), as_complex(self.C), self.D, state, reset=reset)
        return state, self.activation(y)

    @checked
    def step(
        self,
        state: Complex[Array, " P"],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Complex[Array, " P"], Float[Array, " D"]]:
        state = drop(state, reset)
        u = x_t.astype(self.D.dtype)
        state = self._transition() * state + self._input() @ lax.complex(u, jnp.zeros_like(u))
        y = jnp.real(as_complex(self.C) @ state) + self.D * u
        return state, self.activation(y.astype(x_t.dtype))

    def _transition(self):
        return jnp.exp(lax.complex(-jnp.exp(self.nu_log), jnp.exp(self.theta_log)))

    def _input(self):
        return as_complex(jnp.exp(self.gamma_log)[:, None, None] * self.B)
