"""A diagonal state-space model for each channel: the recurrence of S4D, and the long one of H3."""

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from s5eqx._typing import Array, Complex, Float, PRNGKeyArray, checked
from s5eqx.nn._diagonal import AbstractDiagonalSSM
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.s4d_init import AbstractAInit, AbstractBInit, AbstractRealPart, ExpReal, LinInit, OnesBInit
from s5eqx.nn.s5 import as_complex, as_pairs


class DiagonalSSM(AbstractDiagonalSSM):
    """A complex state of size `P` for each channel `h`, with one input and `c` outputs:

        s[t] = dA s[t-1] + dB u[t]
        y[t] = 2 Re(C s[t]) + D u[t]

    `dA, dB` come from the continuous system `A, B` and the time step `Delta = exp(log_Delta)` of the channel. Channel
    `h` uses row `h mod S` of `A = -real_part(A_real) + i A_imag` and of `B`. Where `B` is None it is part of `C`: then
    `dB = 1`, and the gain of the discretisation multiplies `C`. Where `D` is None, nothing passes by the state. The
    outputs are flattened in the order (c, D).

    A whole sequence is convolved with `kernel(L)` by FFT, in O(D P sqrt(L)) memory for the states. With `reset` it is
    scanned, chunk after chunk.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893);
    Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052).

    Differs from the reference:
      - `bandlimit` acts on every form; in the reference a step does not know it;
      - powers of `dA` come from the recurrence, not from `exp(l log dA)`, whose phase float32 loses over a long
        sequence.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("A_real", "A_imag", "log_Delta", "B", "C", "D")
    resets: ClassVar[bool] = True

    A_real: Float[Array, "S P"]
    A_imag: Float[Array, "S P"]
    log_Delta: Float[Array, " D"]
    B: Float[Array, "S P 2"] | None
    C: Float[Array, "c D P 2"]
    D: Float[Array, "c D"] | None
    discretisation: AbstractDiscretisation
    real_part: AbstractRealPart
    bandlimit: float | None = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        state_size: int,
        *,
        num_ssm: int | None = None,
        channels: int = 1,
        A_init: AbstractAInit = LinInit(),
        B_init: AbstractBInit = OnesBInit(),
        train_B: bool = False,
        discretisation: AbstractDiscretisation = ZOH(),
        real_part: AbstractRealPart = ExpReal(),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bandlimit: float | None = None,
        skip: bool = True,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in, `D`.
        - `state_size`: real states a channel, even; `P` is half of it.
        - `num_ssm`: `S`, the systems that the channels share in turn; divides `width`. By default each has its own.
        - `channels`: `c`, the outputs of each channel.
        - `A_init`, `B_init`: draw the eigenvalues and the input vectors.
        - `train_B`: keep `B` as a parameter. Otherwise it is multiplied into `C` once, here.
        - `discretisation`: `ZOH()` or `Bilinear()`.
        - `real_part`: `ExpReal()` or `SoftplusReal()`, how `-Re A` is stored.
        - `dt_min`, `dt_max`: `Delta` starts log-uniform between them, in units of the input interval.
        - `bandlimit`: drop states of a frequency of `bandlimit / 2` cycles a step or more; 1 is the Nyquist limit.
        - `skip`: have a `D`.
        """
        num_ssm = width if num_ssm is None else num_ssm
        if width < 1 or channels < 1 or num_ssm < 1 or width % num_ssm:
            raise ValueError(
                "width and channels must be positive, and num_ssm a divisor of width; got "
                f"width={width}, channels={channels}, num_ssm={num_ssm}."
            )
        if state_size < 2 or state_size % 2:
            raise ValueError(
                f"state_size counts real states, two a complex one, and must be even and positive; got {state_size}."
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"The bounds of the time step must satisfy 0 < dt_min <= dt_max; got dt_min={dt_min}, dt_max={dt_max}."
            )
        if bandlimit is not None and not bandlimit > 0:
            raise ValueError(f"bandlimit must be positive, or None for no limit; got {bandlimit}.")
        dtype = jnp.result_type(float)
        A_key, B_key, C_key, D_key, Delta_key = jr.split(key, 5)
        decay, self.A_imag = A_init(num_ssm, state_size, dtype=dtype, key=A_key)
        decay = jnp.maximum(decay, 1e-4)
        self.A_real = real_part.inverse(decay)
        self.log_Delta = jr.uniform(Delta_key, (width,), dtype, math.log(dt_min), math.log(dt_max))
        B = B_init(lax.complex(-decay, self.A_imag), key=B_key)
        C = math.sqrt(0.5) * jr.normal(C_key, (channels, width, state_size // 2, 2), dtype)
        self.B = B if train_B else None
        self.C = C if train_B else as_pairs(as_complex(C) * _rows(as_complex(B), width)[None])
        self.D = jr.normal(D_key, (channels, width), dtype) if skip else None
        self.discretisation = discretisation
        self.real_part = real_part
        self.bandlimit = bandlimit

    @checked
    def discretised(
        self, rate: float | int = 1.0
    ) -> tuple[Complex[Array, "D P"], Complex[Array, "D P"], Complex[Array, "c D P"]]:
        """`dA`, `dB` and the `C` that reads `s`, with what a `bandlimit` drops at zero.

        `rate` is the time between samples in units of that in training: 0.5 where there are twice as many. It
        multiplies `Delta`. A `bandlimit` drops what it dropped in training whatever the rate, for that was never
        trained, and all else was.
        """
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be positive, as 0.5 for a grid of twice the resolution; got {rate}.")
        width = len(self.log_Delta)
        A = _rows(lax.complex(-self.real_part(self.A_real), self.A_imag), width)
        Delta = jnp.broadcast_to(jnp.exp(self.log_Delta)[:, None], A.shape)
        dA, gain = (z.reshape(A.shape) for z in self.discretisation(A.reshape(-1), float(rate) * Delta.reshape(-1)))
        C = as_complex(self.C)
        if self.B is None:
            dB, C = jnp.ones_like(gain), gain[None] * C
        else:
            dB = gain * _rows(as_complex(self.B), width)
        if self.bandlimit is not None:
            slow = Delta * jnp.abs(A.imag) / (2 * math.pi) < self.bandlimit / 2
            C = jnp.where(slow[None], C, jnp.zeros_like(C))
        return dA, dB, C


def _rows(a, width):
    """Channel `h` gets row `h mod S`."""
    return jnp.tile(a, (width // len(a), 1))
