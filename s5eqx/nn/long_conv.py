"""Long convolutions whose kernel is a plain parameter, pushed towards sparsity."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, PyTree, checked
from s5eqx.nn._check import check_rate
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._mixer import refuse_reset
from s5eqx.nn._random import split
from s5eqx.nn._read_out import AbstractReadOut
from s5eqx.nn.activations import GLU, Gelu
from s5eqx.nn.convolution import AbstractConvolution, Convolution, State
from s5eqx.nn.long_conv_init import AbstractKernelInit, AbstractSmooth, RandomKernel


class SquashedConvolution(AbstractConvolution):
    """`c` convolutions of each input channel, with squashed kernels:

        y[t, c] = sum_j kbar[c, j] u[t-j] + D[c] u[t]
        kbar = dropout(squash(smooth(kernel))),   squash(k) = sign(k) max(|k| - lam, 0)

    The output is `(L, c D)`, channel-major. The state is that of `Convolution`, one window for all `c`. The dropout is
    of taps, once a call: the whole sequence sees one kernel.

    A tap at or below `lam` is zero and has no gradient: it never comes back. With the two published initialisations and
    `lam = 0.003`, about 13 % and 34 % of the taps start above it, and only these can learn. `lam = 0` trains all.

    Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646).

    Differs from the reference: it streams; the kernel is as long as `max_length`, and a longer sequence is refused;
    under `jax.vmap` over keys, each example drops other taps.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("kernel", "D")
    resets: ClassVar[bool] = False

    kernel: Float[Array, "c D K"]
    D: Float[Array, "c D"]
    smooth: AbstractSmooth | None
    dropout: eqx.nn.Dropout
    lam: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        channels: int = 1,
        init: AbstractKernelInit = RandomKernel(),
        lam: float = 0.003,
        smooth: AbstractSmooth | None = None,
        dropout: float = 0.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in, `D`.
        - `max_length`: taps of a kernel, and the longest sequence, in samples.
        - `channels`: kernels for each channel, `c`.
        - `init`: draws the kernels: `RandomKernel()` or `GeometricDecay()`.
        - `lam`: the threshold of the squash, at least 0.
        - `smooth`: `SmoothTime(window)`, `SmoothFrequency(window)`, or None.
        - `dropout`: the probability to drop a tap.
        """
        if width < 1 or max_length < 1 or channels < 1:
            raise ValueError(
                f"width, max_length and channels must be positive; got {width}, {max_length} and {channels}."
            )
        if not lam >= 0:
            raise ValueError(f"lam is what the squash takes off each tap and must be at least 0; got {lam}.")
        kernel_key, D_key = jr.split(key)
        dtype = jnp.result_type(float)
        self.kernel = init(channels, width, max_length, dtype=dtype, key=kernel_key)
        self.D = jr.normal(D_key, (channels, width), dtype)
        self.smooth = smooth
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.lam = float(lam)

    @checked
    def processed(self, *, key: PRNGKeyArray | None = None) -> Float[Array, "c K D"]:
        """`kbar`, the kernels as they are applied."""
        k = self.kernel if self.smooth is None else self.smooth(self.kernel)
        k = jnp.sign(k) * jax.nn.relu(jnp.abs(k) - self.lam)
        return jnp.swapaxes(self.dropout(k, key=key), 1, 2)

    @property
    def max_length(self) -> int:
        return self.kernel.shape[-1]

    def taps(self) -> tuple[Float[Array, "K cD"], Float[Array, " cD"]]:
        kernels = jnp.moveaxis(self.processed(), 0, 1)
        return kernels.reshape(len(kernels), self.D.size), self.D.reshape(-1)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L cD"]:
        refuse_reset(self, reset)
        return self._each(lambda conv: ((), conv(x)), key)[1]

    def init_state(self) -> State:
        return Convolution(self.kernel[0].T, self.D[0]).init_state()

    @checked
    def prefill(
        self,
        state: State,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[State, Float[Array, "L cD"]]:
        refuse_reset(self, reset)
        return self._each(lambda conv: conv.prefill(state, x), key)

    @checked
    def step(
        self,
        state: State,
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[State, Float[Array, " cD"]]:
        refuse_reset(self, reset)
        return self._each(lambda conv: conv.step(state, x_t), key)

    def _each(self, run, key):
        """`run` for each of the `c` convolutions: they share a state, and their outputs are laid side by side."""
        each = jax.vmap(lambda k, skip: run(Convolution(k, skip)), out_axes=(None, -2))
        state, y = each(self.processed(key=key), self.D)
        return state, y.reshape(*y.shape[:-2], self.D.size)


class LongConv(AbstractReadOut, AbstractComposedMixer):
    """The long-convolution layer: `output_linear(dropout(activation(conv(u))))`, with a `SquashedConvolution` and a
    dense layer with a gate.

    Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646).

    Differs from the reference: it streams.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    conv: SquashedConvolution
    activation: Callable
    dropout: eqx.nn.Dropout
    output_linear: GLU | eqx.nn.Linear

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        channels: int = 1,
        init: AbstractKernelInit = RandomKernel(),
        lam: float = 0.003,
        smooth: AbstractSmooth | None = None,
        kernel_dropout: float = 0.0,
        dropout: float = 0.0,
        activation: Callable = Gelu(),
        glu: bool = True,
        key: PRNGKeyArray,
    ):
        """**Arguments:** those of `SquashedConvolution`, with its dropout as `kernel_dropout`, and

        - `dropout`: the probability to drop an entry before the dense layer.
        - `activation`: a module that acts on what is convolved.
        - `glu`: end in a `GLU`; otherwise in a plain dense layer.
        """
        conv_key, linear_key = jr.split(key)
        self.conv = SquashedConvolution(
            width,
            max_length,
            channels=channels,
            init=init,
            lam=lam,
            smooth=smooth,
            dropout=check_rate(kernel_dropout, "kernel_dropout"),
            key=conv_key,
        )
        self.activation = activation
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        dense = GLU if glu else eqx.nn.Linear
        self.output_linear = dense(channels * width, width, key=linear_key)

    def init_state(self) -> PyTree[Array]:
        return self.conv.init_state()

    def forward(self, run, state, x, key):
        conv_key, dropout_key = split(key, 2)
        state, y = run(self.conv, state, x, conv_key)
        return state, self.read_out(y, key=dropout_key)
