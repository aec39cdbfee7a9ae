"""What diagonal state-space models with a small system for each channel share: all but how it is parametrised."""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from s5eqx import ops
from s5eqx._typing import Array, Bool, Complex, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn._select import drop
from s5eqx.nn.s5 import as_complex, as_pairs

_CHUNK = 64  # steps whose states are held at once where flags ask for a scan


class AbstractDiagonalSSM(AbstractCausalMixer):
    """A complex state of size `P` for each channel, with one input and `c` outputs:

        s[t] = dA s[t-1] + dB u[t]
        y[t] = 2 Re(C s[t]) + D u[t]

    The outputs are flattened in the order (c, D). Where `D` is None, nothing passes by the state.

    A whole sequence is convolved with `kernel(L)` by FFT, in O(D P sqrt(L)) memory for the states. With `reset` it is
    scanned, chunk after chunk.
    """

    D: eqx.AbstractVar[Float[Array, "c D"] | None]

    @abc.abstractmethod
    def discretised(self) -> tuple[Complex[Array, "D P"], Complex[Array, "D P"], Complex[Array, "c D P"]]:
        """`dA`, `dB` and the `C` that reads `s`."""

    @checked
    def kernel(self, length: int) -> Float[Array, "c length D"]:
        """`2 Re sum_n C_n dB_n dA_n^l` for `l < length`: the response to an impulse, without `D`."""
        return impulse_response(*self.discretised(), length)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L out"]:
        if reset is not None:
            return self.prefill(self.init_state(), x, reset=reset)[1]
        return self._convolve(x, self.kernel(len(x))).astype(x.dtype)

    def init_state(self) -> Complex[Array, "D P"]:
        dA, *_ = eqx.filter_eval_shape(self.discretised)
        return jnp.zeros(dA.shape, dA.dtype)

    @checked
    def prefill(
        self,
        state: Complex[Array, "D P"],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Complex[Array, "D P"], Float[Array, "L out"]]:
        if reset is not None:
            return self._scan(state, x, reset)
        dA, dB, C = self.discretised()
        powers = _powers_in_blocks(dA, len(x))
        y = self._convolve(x, _response(C * dB[None], powers, len(x)))
        y = y + _flat(_response(C * (dA * state)[None], powers, len(x)))
        return _last_state(state, x.astype(y.dtype), dA, dB, powers), y.astype(x.dtype)

    @checked
    def step(
        self,
        state: Complex[Array, "D P"],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Complex[Array, "D P"], Float[Array, " out"]]:
        dA, dB, C = self.discretised()
        state = drop(state, reset)
        u = x_t.astype(jnp.real(C).dtype)
        state = dA * state + as_complex(as_pairs(dB) * u[:, None, None])
        y = self._skip(2 * jnp.real(jnp.sum(C * state[None], axis=-1)), u)
        return state, y.reshape(-1).astype(x_t.dtype)

    def _convolve(self, x, kernel):
        u = x.astype(kernel.dtype)
        return _flat(self._skip(jax.vmap(ops.causal_convolution, in_axes=(None, 0))(u, kernel), u))

    def _skip(self, y, u):
        """With what passes by the state; `y` is (c, *L, D), `u` is (*L, D)."""
        return y if self.D is None else y + jnp.expand_dims(self.D, tuple(range(1, u.ndim))) * u[None]

    def _scan(self, state, x, reset):
        dA, dB, C = self.discretised()
        a, dB, C = as_pairs(dA).reshape(-1, 2), as_pairs(dB), as_pairs(jnp.conj(C))
        u = x.astype(C.dtype)

        @jax.checkpoint
        def chunk(state, inputs):
            u, reset = inputs
            drive = u[:, :, None, None] * dB[None]
            s = ops.diagonal_scan_pairs(a, drive.reshape(len(u), *a.shape), state, reset=reset)
            y = 2 * jnp.einsum("tdpx,cdpx->ctd", s.reshape(drive.shape), C, precision="highest")
            return (s[-1] if len(u) else state), _flat(self._skip(y, u))

        s, y, done = as_pairs(state).reshape(-1, 2), [], len(u) // _CHUNK * _CHUNK
        if done:
            in_chunks = lambda z: z[:done].reshape(-1, _CHUNK, *z.shape[1:])
            s, y_chunks = lax.scan(chunk, s, (in_chunks(u), in_chunks(reset)))
            y.append(y_chunks.reshape(done, y_chunks.shape[-1]))
        s, y_rest = chunk(s, (u[done:], reset[done:]))
        y = jnp.concatenate([*y, y_rest])
        return as_complex(s).reshape(state.shape), y.astype(x.dtype)


def impulse_response(
    dA: Complex[Array, "D P"], dB: Complex[Array, "D P"], C: Complex[Array, "c D P"], length: int
) -> Float[Array, "c length D"]:
    """`2 Re sum_n C_n dB_n dA_n^l` for `l < length`."""
    return _response(C * dB[None], _powers_in_blocks(dA, length), length)


def _powers_in_blocks(a, length):
    """`a^r` for `r < T` and `a^(qT)`, `T` about `sqrt(length)`: each `a^l` with `l < length` is a product of two."""
    T = math.isqrt(max(length - 1, 0)) + 1
    low = _powers(a, T)
    return low, _powers(low[-1] * a, -(-length // T))


def _powers(a, count):
    impulse = jnp.zeros((count, a.size), a.dtype).at[:1].set(1)
    return ops.diagonal_scan(a.reshape(-1), impulse).reshape(count, *a.shape)


def _response(coefficients, powers, length):
    """`2 Re sum_n coefficients_n a_n^l` for `l < length`, as (c, length, D)."""
    low, high = powers
    left = as_pairs(jnp.conj(coefficients[:, None] * high[None]))
    y = 2 * jnp.einsum("cqdpx,tdpx->cqtd", left, as_pairs(low), precision="highest")
    return y.reshape(len(coefficients), -1, y.shape[-1])[:, :length]


def _last_state(state, u, dA, dB, powers):
    """`dA^L state + sum_j dA^(L-1-j) dB u_j`: the state after each block of inputs alone, then a scan over blocks."""
    if not len(u):
        return state
    low, high = powers
    T, blocks = len(low), len(high)
    padding = T * blocks - len(u)  # in front, so that the first block is the short one
    inputs = jnp.pad(u, ((padding, 0), (0, 0))).reshape(blocks, T, -1)
    after = dB[None] * as_complex(jnp.einsum("qtd,tdpx->qdpx", inputs, as_pairs(low[::-1]), precision="highest"))
    after = after.at[0].add(low[T - padding - 1] * dA * state)
    return ops.final_state((low[-1] * dA).reshape(-1), after.reshape(blocks, -1)).reshape(state.shape)


def _flat(y):
    """(c, L, D) as (L, c D)."""
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], y.shape[0] * y.shape[2])
