"""Hyena's implicit filters: long convolutions whose kernels a small network computes from the position."""

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Float, PRNGKeyArray, checked
from s5eqx.nn.bank import AbstractFilterBank
from s5eqx.nn.buffer import Buffer
from s5eqx.nn.convolution import Convolution
from s5eqx.nn.linear import linear


class ImplicitFilter(AbstractFilterBank):
    """`N - 1` long convolutions of `D` channels and `max_length` taps, out of one network of sines. At tap `i`

        t = i / (max_length - 1),   p = 2 pi i / max_length
        z = [t, cos(f_1 p), ..., cos(f_b p), -sin(f_1 p), ..., -sin(f_b p)]
        h = W_n sin(freq (... W_1 sin(freq (W_0 z + b_0)) + b_1 ...))
        kernel = h (exp(-t |delta|) + shift)

    with one frequency vector `freq` for all layers, `b` frequencies `f` evenly spaced from 1e-4 to `b - 1`, and
    decay rates `delta` evenly spaced over the `D (N - 1)` filter channels; channel `d` of operator `n` is number
    `d (N - 1) + n`. With `normalize`, each tap is divided by the sum of its absolute values over all channels.
    Each convolution has a skip of its own, `bias`. Taps depend on `max_length`, not on the length of the input.

    `z`, `t` and `deltas` are leaves, so that released weights bring their own. `t` and `deltas` are not trained,
    and `z` is where `train_positions` is set.

    Source: Poli et al., "Hyena Hierarchy" (arXiv 2302.10866), section 3.3 and its code.

    Differs from the reference: operators come out one by one; inputs are never cut to `max_length` but refused.
    """

    recurrence: ClassVar[tuple[str, ...]] = ("layers", "freq", "bias", "z", "t", "deltas")
    resets: ClassVar[bool] = False

    layers: tuple[eqx.nn.Linear, ...]
    freq: Float[Array, " width"]
    bias: Float[Array, " channels"] | None
    z: Float[Array, "max_length features"] | Buffer
    t: Buffer
    deltas: Buffer
    order: int = eqx.field(static=True)
    modulate: bool = eqx.field(static=True)
    shift: float = eqx.field(static=True)
    normalize: bool = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        order: int = 2,
        features: int = 5,
        filter_width: int = 64,
        num_hidden: int = 2,
        frequency: float = 10.0,
        modulate: bool = True,
        fast_decay: float = 0.3,
        slow_decay: float = 1.5,
        target: float = 1e-2,
        shift: float = 0.0,
        normalize: bool = False,
        use_bias: bool = True,
        train_positions: bool = False,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels of each operator, `D`; for a Hyena layer with heads, the number of heads.
        - `max_length`: taps, in samples; the longest sequence.
        - `order`: `N`, of the Hyena layer; there are `N - 1` operators.
        - `features`: size of `z`, odd and at least 3.
        - `filter_width`: hidden channels of the network.
        - `num_hidden`: its layers between the first and the last.
        - `frequency`: where `freq` starts.
        - `modulate`: multiply by the window; without it, `delta` and `shift` do nothing.
        - `fast_decay`, `slow_decay`: the shares of `max_length` after which the window of the fastest and of the
            slowest channel has fallen to `target`.
        - `shift`: keeps the window from falling below it.
        - `normalize`: divide each tap by its l1 norm over the channels.
        - `use_bias`: add the skips `bias`, drawn from `N(0, 1)`.
        - `train_positions`: train the features `z`.
        """
        if min(width, max_length, filter_width) < 1 or num_hidden < 0 or order < 2:
            raise ValueError(
                "width, max_length and filter_width must be positive, num_hidden at least 0 and order at least 2; got "
                f"{width}, {max_length}, {filter_width}, {num_hidden} and {order}."
            )
        if features < 3 or features % 2 == 0:
            raise ValueError(f"features must be odd and at least 3: t, and cosine and sine pairs; got {features}.")
        if not (fast_decay > 0 and slow_decay > 0 and 0 < target < 1):
            raise ValueError(
                f"The decays must be positive and target must lie in (0, 1); got fast_decay={fast_decay}, "
                f"slow_decay={slow_decay}, target={target}."
            )
        dtype = jnp.result_type(float)
        channels = width * (order - 1)
        sizes = [features, *([filter_width] * (num_hidden + 1)), channels]
        *keys, bias_key = jr.split(key, len(sizes))
        self.layers = tuple(
            eqx.nn.Linear(n, m, use_bias=i < num_hidden + 1, key=k)
            for i, (n, m, k) in enumerate(zip(sizes, sizes[1:], keys, strict=False))
        )
        self.freq = jnp.full(filter_width, frequency, dtype)
        self.bias = jr.normal(bias_key, (channels,), dtype) if use_bias else None
        z, t = _positions(max_length, features)
        z = jnp.asarray(z, dtype)
        self.z = z if train_positions else Buffer(z)
        self.t = Buffer(jnp.asarray(t, dtype))
        ends = -math.log(target) / slow_decay, -math.log(target) / fast_decay
        self.deltas = Buffer(jnp.asarray(np.linspace(*ends, channels), dtype))
        self.order = order
        self.modulate = modulate
        self.shift = float(shift)
        self.normalize = normalize

    @checked
    def kernels(self) -> Float[Array, "operators K D"]:
        """The taps of each operator."""
        h = self.z() if isinstance(self.z, Buffer) else self.z
        *hidden, last = self.layers
        for layer in hidden:
            h = jnp.sin(self.freq[None] * linear(layer, h, precision="highest"))  # sines amplify what a GPU rounds
        h = linear(last, h, precision="highest")
        if self.modulate:
            h = h * (jnp.exp(-self.t()[:, None] * jnp.abs(self.deltas())[None]) + self.shift)
        if self.normalize:
            norm = jnp.sum(jnp.abs(h), axis=1, keepdims=True)
            h = h / jnp.maximum(norm, jnp.finfo(h.dtype).tiny ** 0.5)  # a fast window underflows
        return jnp.moveaxis(h.reshape(len(h), -1, self.order - 1), -1, 0)

    def operators(self) -> tuple[Convolution, ...]:
        kernels = self.kernels()
        skips = jnp.zeros_like(kernels[:, 0]) if self.bias is None else self.bias.reshape(-1, self.order - 1).T
        return tuple(Convolution(kernel, skip) for kernel, skip in zip(kernels, skips, strict=True))


def _positions(max_length, features):
    """The features `z` and the times `t` of every tap, in double precision."""
    t = np.linspace(0, 1, max_length)
    bands = (features - 1) // 2
    f = np.linspace(1e-4, bands - 1, bands)
    angle = 2 * np.pi / max_length * np.outer(np.arange(max_length), f)
    return np.concatenate([t[:, None], np.cos(angle), -np.sin(angle)], axis=1), t
