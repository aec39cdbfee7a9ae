"""S4ND: state-space kernels along each axis of an image or a video, and their product on its grid."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.fft

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.nn._check import check_rate
from s5eqx.nn._diagonal import impulse_response
from s5eqx.nn._read_out import AbstractReadOut
from s5eqx.nn.activations import GLU, Gelu
from s5eqx.nn.diagonal_ssm import DiagonalSSM
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.s4d_init import AbstractAInit, AbstractBInit, AbstractRealPart, ExpReal, LinInit, OnesBInit


class S4ND(AbstractReadOut):
    """`output_linear(dropout(activation(y)))` with a convolution over the grid, here of two axes:

        y[s, t] = sum_ij K[i, j] u[s-i, t-j] + D u[s, t],    K[i, j] = mean_r k_r[i] l_r[j],

    for each of `c` outputs of each channel. `k_r` and `l_r` are kernels of one `DiagonalSSM` for each axis. On an axis
    that is not causal a system has two read-outs, one on past and present and one on what is strictly to come, as in
    `BidirectionalS4D`:

        k[i] = past[i] for i >= 0,    k[-1-i] = future[i] for i >= 0.

    The grid is padded with zeros, so nothing wraps round. The spectrum of `K` is the product of those of the kernels:
    `K` itself is never formed. On one causal axis, of rank 1, this is `S4D`.

    The kernels are samples of continuous ones. A model that was trained on one grid runs on a finer or a coarser one
    if it is told the `rate`, the spacing of the samples in units of that in training. A `bandlimit` counts in samples
    of training, whatever the rate.

    Source: Nguyen et al., "S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces"
    (arXiv 2210.06583).

    Differs from the reference: an axis may be causal by itself; kernels are as long as the axis on every grid; see
    `DiagonalSSM` for the rest.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("D",)
    resets: ClassVar[bool] = False

    axes: tuple[DiagonalSSM, ...]
    D: Float[Array, "c D"]
    activation: Callable
    dropout: eqx.nn.Dropout
    output_linear: GLU | eqx.nn.Linear
    causal: tuple[bool, ...] = eqx.field(static=True)
    rank: int = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        state_size: int = 64,
        *,
        num_axes: int = 2,
        rank: int = 1,
        causal: bool | tuple[bool, ...] = False,
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
        activation: Callable = Gelu(),
        dropout: float = 0.0,
        glu: bool = True,
        key: PRNGKeyArray,
    ):
        """**Arguments:** those of `S4D`, for the system of each axis, and

        - `num_axes`: axes of the grid: 1, 2 or 3.
        - `rank`: `r`, the products whose mean a kernel is.
        - `causal`: see only what comes before, on all axes or on each.

        `dt_min` and `dt_max` are in units of the spacing of the samples in training.
        """
        if num_axes not in (1, 2, 3):
            raise ValueError(
                f"num_axes must be 1, 2 or 3, the axes of a sequence, an image or a video; got {num_axes}."
            )
        if channels < 1 or rank < 1:
            raise ValueError(f"channels and rank must be positive; got channels={channels}, rank={rank}.")
        self.causal = _for_each_axis(causal, num_axes, "causal")
        self.rank = rank
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        D_key, linear_key, *axis_keys = jr.split(key, 2 + num_axes)
        self.axes = tuple(
            DiagonalSSM(
                width,
                state_size,
                num_ssm=num_ssm,
                channels=(1 if is_causal else 2) * rank * channels,
                A_init=A_init,
                B_init=B_init,
                train_B=train_B,
                discretisation=discretisation,
                real_part=real_part,
                dt_min=dt_min,
                dt_max=dt_max,
                bandlimit=bandlimit,
                skip=False,
                key=axis_key,
            )
            for is_causal, axis_key in zip(self.causal, axis_keys, strict=True)
        )
        self.D = jr.normal(D_key, (channels, width))
        self.activation = activation
        dense = GLU if glu else eqx.nn.Linear
        self.output_linear = dense(channels * width, width, key=linear_key)

    @property
    def num_axes(self) -> int:
        return len(self.axes)

    @checked
    def __call__(
        self,
        x: Float[Array, "*grid D"],
        *,
        rate: float | int | tuple[float | int, ...] = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*grid D"]:
        """**Arguments:** `rate`, the spacing of the samples in units of that in training, on all axes or on each: 0.5
        on a grid of twice the resolution."""
        grid, rates = x.shape[:-1], _for_each_axis(rate, self.num_axes, "rate")
        if len(grid) != self.num_axes or 0 in grid or x.shape[-1] != self.D.shape[1]:
            raise ValueError(
                f"An S4ND of num_axes={self.num_axes} takes so many axes, none of them empty, and "
                f"{self.D.shape[1]} channels; got an input of shape {x.shape}. Build it with other num_axes or another "
                "width, or batch it with `jax.vmap`."
            )
        u = jnp.moveaxis(jnp.asarray(x).astype(np.promote_types(self.D.dtype, np.float32)), -1, 0)
        sizes = tuple(int(scipy.fft.next_fast_len(2 * n - 1, real=True)) for n in grid)  # pyright: ignore
        spectrum = self._spectrum(grid, rates, sizes)
        over_grid = tuple(range(-self.num_axes, 0))
        y = jnp.fft.irfftn(spectrum * jnp.fft.rfftn(u, sizes, over_grid)[None], sizes, over_grid)
        y = y[(..., *map(slice, grid))] + jnp.expand_dims(self.D, tuple(range(2, 2 + len(grid)))) * u[None]
        y = jnp.moveaxis(y.reshape(-1, *grid), 0, -1)
        return self.read_out(y.astype(x.dtype), key=key)

    @checked
    def kernel(self, axis: int, length: int, *, rate: float | int = 1.0) -> Float[Array, "rank c D taps"]:
        """The kernels of an axis of so many samples: of the lags 0 to `length - 1` and, where the axis is not causal,
        of `1 - length` to -1 behind them, as an FFT counts them."""
        k = impulse_response(*self.axes[axis].discretised(rate), length)
        k = jnp.moveaxis(k, 1, -1).reshape(-1, self.rank, *self.D.shape, length)
        if self.causal[axis]:
            return k[0]
        past, future = k
        return jnp.concatenate([past, future[..., : length - 1][..., ::-1]], axis=-1)

    def _spectrum(self, grid, rates, sizes):
        """Of `K`, as (c, D, *frequencies)."""
        factors = []
        for axis, (length, rate, size) in enumerate(zip(grid, rates, sizes, strict=True)):
            k = self.kernel(axis, length, rate=rate)
            zeros = jnp.zeros((*k.shape[:-1], size - k.shape[-1]), k.dtype)
            k = jnp.concatenate([k[..., :length], zeros, k[..., length:]], axis=-1)
            is_last = axis == self.num_axes - 1  # whose negative frequencies the real transform leaves out
            factors.append(jnp.fft.rfft(k) if is_last else jnp.fft.fft(k))
        axes = "xyz"[: self.num_axes]
        terms = ",".join(f"rcd{axis}" for axis in axes)
        return jnp.einsum(f"{terms}->cd{axes}", *factors, precision="highest") / self.rank


def _for_each_axis(value, num_axes, name):
    values = value if isinstance(value, tuple) else (value,) * num_axes
    if len(values) != num_axes:
        raise ValueError(f"{name} must be one for all, or one for each of num_axes={num_axes} axes; got {value}.")
    return values
