"""A state-space model whose state is a shift register: the short memory of H3."""

import math
from typing import ClassVar

import jax.numpy as jnp
import jax.random as jr
import scipy.fft
from jax import lax

from s5eqx import ops
from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._select import drop, keep_rows


class ShiftSSM(AbstractCausalMixer):
    """For each channel a real state of size `N` that moves down by one entry a step:

        s[t] = shift(s[t-1]) + B u[t]
        y[t] = C s[t] + D u[t]

    With `B = e_0`, as it starts, the state holds the last `N` inputs. What enters is forgotten after `N` steps. A whole
    sequence is convolved with `kernel()` by FFT; with `reset` it is a sum of `N` shifted products.

    Source: Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052), section 3.

    Differs from the reference: it runs in the precision of its parameters; the state of an earlier chunk is read out
    after the shift that belongs to the first step, not before.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("B", "C", "D")
    resets: ClassVar[bool] = True

    B: Float[Array, "D N"]
    C: Float[Array, "D N"]
    D: Float[Array, " D"]

    def __init__(self, width: int, state_size: int, *, key: PRNGKeyArray):
        """**Arguments:** `width` channels; `state_size`, the memory in samples. `C` is uniform in
        `+-1 / sqrt(state_size)`, `D` normal.
        """
        if width < 1 or state_size < 1:
            raise ValueError(f"width and state_size must be positive; got width={width}, state_size={state_size}.")
        dtype = jnp.result_type(float)
        C_key, D_key = jr.split(key)
        bound = 1 / math.sqrt(state_size)
        self.B = jnp.zeros((width, state_size), dtype).at[:, 0].set(1)
        self.C = jr.uniform(C_key, (width, state_size), dtype, -bound, bound)
        self.D = jr.normal(D_key, (width,), dtype)

    @checked
    def kernel(self) -> Float[Array, "N D"]:
        """`sum_j B[j] C[j+l]` for `l < N`: the response to an impulse, without `D`. It is zero from there on."""
        return self._read(self.B)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        return self._respond(x.astype(self.D.dtype), reset).astype(x.dtype)

    def init_state(self) -> Float[Array, "D N"]:
        return jnp.zeros_like(self.B)

    @checked
    def prefill(
        self,
        state: Float[Array, "D N"],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "D N"], Float[Array, "L D"]]:
        length, size = len(x), self.B.shape[1]
        if not length:
            return state, x
        u = last = x.astype(self.D.dtype)
        if reset is not None:
            state = drop(state, reset[0])
        before = jnp.pad(self._read(state)[1:], ((0, max(0, length - size + 1)), (0, 0)))[:length]
        old = jnp.pad(state, ((0, 0), (min(length, size), 0)))[:, :size]
        if reset is not None:
            sequence = jnp.cumsum(reset, dtype=jnp.int32)
            before = keep_rows(sequence == 0, before)
            last = keep_rows(sequence == sequence[-1:], u)
            old = jnp.where(sequence[-1] == 0, old, jnp.zeros_like(old))
        y = self._respond(u, reset) + before
        newest = jnp.pad(last[::-1][:size], ((0, max(0, size - length)), (0, 0)))
        return old + ops.causal_convolution(newest, self.B.T).T, y.astype(x.dtype)

    @checked
    def step(
        self,
        state: Float[Array, "D N"],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "D N"], Float[Array, " D"]]:
        state = drop(state, reset)
        u = x_t.astype(self.D.dtype)
        state = jnp.pad(state, ((0, 0), (1, 0)))[:, :-1] + self.B * u[:, None]
        return state, (jnp.sum(self.C * state, axis=-1) + self.D * u).astype(x_t.dtype)

    def _respond(self, u, reset):
        """To `u`, from the empty state."""
        skip = self.D[None] * u
        if reset is None:
            return ops.causal_convolution(u, self.kernel()) + skip
        # A partial sum waits a step for each further tap, and a reset drops what of it comes from before.
        late = lambda y: keep_rows(~reset, jnp.pad(y, ((1, 0), (0, 0)))[:-1])
        y, _ = lax.scan(lambda y, tap: (late(y) + tap[None] * u, None), jnp.zeros_like(u), self.kernel()[::-1])
        return y + skip

    def _read(self, state):
        """`sum_n C[n+l] state[n]` for `l < N`: what is read `l` steps after `state`, with no input."""
        size = self.C.shape[1]
        fast = scipy.fft.next_fast_len(2 * size - 1, real=True)
        C, state = (jnp.fft.rfft(a, n=fast, axis=1) for a in (self.C, state))
        return jnp.fft.irfft(C * jnp.conj(state), n=fast, axis=1)[:, :size].T
