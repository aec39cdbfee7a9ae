"""The law over many lengths: pieces that hypothesis draws, and memories that hardly fade."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from mixers import CASES, LONGEST, D, assert_close, build, marks

NAMES = [
    "short_conv_4",
    "s5",
    "hyena_3_half_glu2",
    "hyena_implicit_3",
    "hyena_heads",
    "s4d_shared",
    "h3",
    "h3_heads",
    "long_conv",
    "attention_rotary",
    "attention_window",
    "lru",
    "rg_lru",
]
LIKE_OTHERS = {"short_conv_4", "h3", "long_conv", "rg_lru"}
"""What a chunk leaves of them is what it leaves of another: among the slow tests."""
every_name = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[*marks(name), *[pytest.mark.slow] * (name in LIKE_OTHERS)]) for name in NAMES],
)
partitions = st.lists(st.sampled_from([1, 2, 13, LONGEST]), min_size=1, max_size=12)

NEAR_ONE = {"log_Delta": -9.0, "nu_log": -9.0, "Lambda": 9.0}
"""Values of parameters that put eigenvalues within about 1e-3 of the unit circle."""


def barely_fading(mixer):
    name_of = lambda path: getattr(path[-1], "name", None)
    near_one = lambda path, leaf: jnp.full_like(leaf, NEAR_ONE[name_of(path)]) if name_of(path) in NEAR_ONE else leaf
    return jax.tree_util.tree_map_with_path(near_one, mixer)


@functools.cache
def in_steps(name, dtype):
    """The mixer compiled, a sequence, the state before and after every step, and the outputs."""
    mixer = barely_fading(build(CASES[name], jax.random.key(0), dtype))
    x = np.random.default_rng(1).standard_normal((LONGEST, D)).astype(dtype)

    @quick_jit
    def run(mixer):
        def step(state, x_t):
            state, y_t = mixer.step(state, x_t)
            return state, (state, y_t)

        first = mixer.init_state()
        _, (later, y) = lax.scan(step, first, x)
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later), y

    return quick_jit(mixer.prefill), x, *jax.tree.map(np.asarray, run(mixer))


def check_partition(name, dtype, pieces, tolerance):
    prefill, x, states, y = in_steps(name, dtype)
    after = lambda t: jax.tree.map(lambda a: on_device(a[t]), states)
    state = after(0)
    for start, stop in itertools.pairwise(itertools.accumulate(pieces, initial=0)):
        if stop > LONGEST:
            break
        state, out = prefill(state, x[start:stop])
        assert_close((state, out), (after(stop), on_device(y[start:stop])), tolerance)


@every_name
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=partitions)
def test_any_partition_in_float64(name, pieces, x64):
    check_partition(name, jnp.float64, pieces, 1e-11)


@every_name
@pytest.mark.slow
def test_partition_in_any_float32(name):
    test_partition_in_float32(name)


@pytest.mark.parametrize("name", ["s5", "s4d_shared", "hyena_implicit_3"])
def test_partition_in_float32(name):
    """64 steps add up roundings of 6e-8 each, in another order than the parallel forms do."""
    for pieces in ((LONGEST,), (13, 13, 13, 13)):
        check_partition(name, jnp.float32, pieces, 64 * 6e-8)
