"""Every causal mixer and model in a tiny size: the list that the law is tested over."""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, on_device

from s5eqx import models, nn

D, V, L, LONGEST = 6, 7, 12, 64


@dataclass(frozen=True)
class Case:
    build: Callable
    tokens: bool = False
    intervals: bool = False
    fft: bool = False
    """Without flags it is a convolution by FFT, and causal up to rounding."""
    resets: bool = True


def conv(key, kernel_size=3):
    return nn.ShortConv(D, kernel_size, key=key)


def s5(key, **options):
    return nn.S5(D, 8, num_blocks=2, key=key, **options)


def hyena(key, **options):
    return nn.hyena_s5(D, 4, key=key, **options)


def implicit(key, **options):
    return nn.hyena(D, LONGEST, filter_width=5, key=key, **options)


def language_model(key, mixer, **options):
    return models.LanguageModel(V, D, mixer, mlp_width=8, key=key, **options)


CASES = {
    "short_conv_1": Case(lambda key: conv(key, 1)),
    "short_conv_4": Case(lambda key: conv(key, 4)),
    "mlp": Case(lambda key: nn.MLP(D, 9, key=key)),
    "s5": Case(s5),
    "s5_full_gelu": Case(lambda key: s5(key, conj_sym=False, clip_eigs=False, activation=nn.Gelu())),
    "s5_bilinear_half_glu1": Case(
        lambda key: s5(key, discretisation=nn.Bilinear(), activation=nn.HalfGLU1(D, key=key))
    ),
    "s5_intervals_full_glu": Case(
        lambda key: s5(key, step_rescale=2.0, activation=nn.FullGLU(D, key=key)), intervals=True
    ),
    "hyena_2": Case(hyena),
    "hyena_2_no_short_conv": Case(lambda key: hyena(key, short_filter=0)),
    "hyena_3_half_glu2": Case(lambda key: hyena(key, order=3, activation=nn.HalfGLU2)),
    "hyena_4": Case(lambda key: hyena(key, order=4, short_filter=4)),
    "convolution": Case(lambda key: nn.Convolution(jnp.zeros((LONGEST, D)), jnp.zeros(D)), fft=True, resets=False),
    "hyena_implicit_2": Case(lambda key: implicit(key), fft=True, resets=False),
    "hyena_implicit_3": Case(
        lambda key: implicit(key, order=3, short_filter=0, normalize=True, shift=0.1), fft=True, resets=False
    ),
    "hyena_heads": Case(lambda key: implicit(key, num_heads=2, use_bias=False), fft=True, resets=False),
    "s4d": Case(lambda key: nn.S4D(D, 4, key=key), fft=True),
    "s4d_shared": Case(
        lambda key: nn.S4D(
            D,
            4,
            num_ssm=2,
            channels=2,
            train_B=True,
            discretisation=nn.Bilinear(),
            real_part=nn.SoftplusReal(),
            bandlimit=0.1,
            glu=False,
            key=key,
        ),
        fft=True,
    ),
    "shift_ssm": Case(lambda key: nn.ShiftSSM(D, 5, key=key), fft=True),
    "h3": Case(lambda key: nn.h3(D, 4, key=key), fft=True),
    "h3_heads": Case(lambda key: nn.h3(D, 4, head_dim=3, key=key), fft=True),
    "modal": Case(lambda key: nn.ModalSSM(D, 3, key=key), fft=True),
    "h3_conv": Case(lambda key: nn.h3_conv(D, LONGEST, kernel_dropout=0.0, key=key), fft=True, resets=False),
    "long_conv": Case(
        lambda key: nn.LongConv(D, LONGEST, channels=2, smooth=nn.SmoothTime(3), key=key), fft=True, resets=False
    ),
    "attention": Case(lambda key: nn.Attention(D, 3, max_length=LONGEST, key=key)),
    "attention_rotary": Case(
        lambda key: nn.Attention(
            D, max_length=LONGEST, rotary=nn.Rotary(4, interleaved=True), short_conv=3, use_bias=False, key=key
        )
    ),
    "attention_window": Case(
        lambda key: nn.Attention(D, 2, window=3, rotary=nn.Rotary(2, interleaved=True), short_conv=3, key=key)
    ),
    "lru": Case(lambda key: nn.LRU(D, 5, activation=nn.Gelu(), key=key)),
    "rg_lru": Case(lambda key: nn.RGLRU(D, key=key)),
    "block": Case(lambda key: nn.Block(s5(key), nn.MLP(D, 8, key=key))),
    "backbone": Case(lambda key: language_model(key, (conv(key), conv(key))).backbone),
    "stack": Case(lambda key: nn.Stack.of([s5(k) for k in jr.split(key)])),
    "language_model": Case(lambda key: language_model(key, (hyena(key), conv(key))), tokens=True),
    "language_model_hybrid": Case(
        lambda key: language_model(key, (conv(key), nn.Attention(D, max_length=LONGEST, key=key)), remat=True),
        tokens=True,
    ),
    "language_model_s4d": Case(
        lambda key: language_model(key, (nn.S4D(D, 4, key=key), nn.Attention(D, window=4, key=key)), remat=True),
        tokens=True,
        fft=True,
    ),
    "language_model_stack": Case(
        lambda key: language_model(key, implicit, num_layers=2, stack=True), tokens=True, fft=True, resets=False
    ),
    "language_model_positions": Case(
        lambda key: language_model(key, conv, num_layers=1, max_length=LONGEST), tokens=True
    ),
}

VARIANTS = {
    "short_conv_1",
    "s5",
    "s5_full_gelu",
    "s5_bilinear_half_glu1",
    "hyena_2_no_short_conv",
    "hyena_3_half_glu2",
    "hyena_4",
    "convolution",
    "hyena_implicit_2",
    "hyena_heads",
    "s4d",
    "shift_ssm",
    "h3_heads",
    "h3_conv",
    "attention",
    "attention_rotary",
    "block",
    "backbone",
    "language_model",
    "language_model_positions",
    "language_model_s4d",
    "language_model_stack",
}
"""Each shares its code with another case: among the slow tests."""
SMOKE = {"short_conv_4", "mlp", "modal", "long_conv", "lru", "rg_lru"}
"""Those that compile quickly: among the smoke tests."""


def marks(name):
    """All tests of a case run in one process, which compiles it once."""
    chosen = (name in VARIANTS, pytest.mark.slow), (name in SMOKE, pytest.mark.smoke)
    return [pytest.mark.xdist_group(name), *(mark for is_one, mark in chosen if is_one)]


every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=marks(name)) for name, case in CASES.items()]
)


def build(case, key, dtype=None):
    return drawn(case.build, key, dtype)


def inputs(case, seed=0, dtype=float):
    """A sequence, and what else comes in at every step: flags that are all False, where it takes any; intervals."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, V, L) if case.tokens else rng.standard_normal((L, D))
    each = {"reset": on_device(np.zeros(L, bool))} if case.resets else {}
    if case.intervals:
        each["intervals"] = on_device(rng.uniform(0.3, 3.0, L), dtype)
    return on_device(x, None if case.tokens else dtype), each


def used_state(mixer, key):
    """A state as an earlier chunk could have left it."""
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))  # NumPy's numbers cost no compilation

    def fill(a):
        if not eqx.is_inexact_array(a):
            return on_device(np.asarray(a) + 2)
        real, imaginary = rng.standard_normal((2, *a.shape))
        return on_device(np.asarray(a) + (real + 1j * imaginary if jnp.iscomplexobj(a) else real), a.dtype)

    return jax.tree.map(fill, mixer.init_state())


def forms(case, each):
    """With flags and without, where these are two ways to compute."""
    yield each
    if case.fft and case.resets:
        yield without_flags(each)


def without_flags(each):
    return {name: a for name, a in each.items() if name != "reset"}


def assert_close(got, expected, tolerance=1e-12):
    got, expected = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, float(np.abs(np.asarray(b)).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)
