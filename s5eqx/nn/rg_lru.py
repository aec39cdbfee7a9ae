"""The real-gated linear recurrent unit: a diagonal recurrence whose decay depends on the input."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx import ops
from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._select import drop
from s5eqx.nn.linear import linear


class RGLRU(AbstractCausalMixer):
    """A real state of size `D`, whose channels meet only in the gates:

        r = sigmoid(a_proj(x)),   i = sigmoid(x_proj(x)),   a = sigmoid(Lambda)^(c r)
        h[t] = a[t] h[t-1] + sqrt(1 - a[t]^2) (i[t] x[t])

    The output is the state.

    Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention" (arXiv 2402.19427), section 2.4.

    Differs from the reference: the gates are dense, not block-diagonal; the first input of a sequence is scaled like
    any other, where the published code takes it as it is. The block around it, with its convolution and gate, is
    not part of the layer.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("Lambda",)
    resets: ClassVar[bool] = True

    a_proj: eqx.nn.Linear
    x_proj: eqx.nn.Linear
    Lambda: Float[Array, " D"]
    c: float = eqx.field(static=True)

    def __init__(self, width: int, *, c: float = 8.0, key: PRNGKeyArray):
        """**Arguments:** `width` channels in and out, `D`; `c > 0`, the exponent of the recurrence gate.
        `sigmoid(Lambda)^c`, which is `a` where the gate is open, starts uniform in [0.9, 0.999].
        """
        if width < 1 or not c > 0:
            raise ValueError(f"width and c must be positive; got width={width}, c={c}.")
        a_key, x_key, Lambda_key = jr.split(key, 3)
        self.a_proj = eqx.nn.Linear(width, width, key=a_key)
        self.x_proj = eqx.nn.Linear(width, width, key=x_key)
        log_a = jnp.log(jr.uniform(Lambda_key, (width,), jnp.result_type(float), 0.9, 0.999)) / c
        self.Lambda = log_a - jnp.log(-jnp.expm1(log_a))
        self.c = float(c)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        return self.prefill(self.init_state(), x, reset=reset)[1]

    def init_state(self) -> Float[Array, " D"]:
        return jnp.zeros_like(self.Lambda)

    @checked
    def prefill(
        self,
        state: Float[Array, " D"],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, " D"], Float[Array, "L D"]]:
        a, drive = self._gated(x)
        h = ops.diagonal_scan(a, drive, state, reset=reset)
        return (h[-1] if len(x) else state), h.astype(x.dtype)

    @checked
    def step(
        self,
        state: Float[Array, " D"],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        a, drive = self._gated(x_t)
        state = drop(state, reset)
        state = a * state + drive
        return state, state.astype(x_t.dtype)

    def _gated(self, x):
        """`a` and what is added to `a h`, in the precision of the recurrence."""
        gate = lambda layer: jax.nn.sigmoid(linear(layer, x).astype(self.Lambda.dtype))
        log_a = -self.c * gate(self.a_proj) * jnp.broadcast_to(jax.nn.softplus(-self.Lambda), x.shape)
        tiny = jnp.finfo(log_a.dtype).tiny  # the root has no derivative at 0, where a closed gate underflows
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), tiny))
        return jnp.exp(log_a), scale * gate(self.x_proj) * x.astype(log_a.dtype)
