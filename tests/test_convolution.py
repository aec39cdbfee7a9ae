"""The long convolution as it comes, against a loop; `test_butterfly_conv.py` has the other ways."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, quick_jit

from s5eqx import ops


@pytest.mark.parametrize(
    "length, taps, past", [(0, 3, 0), (1, 1, 0), (9, 4, 0), (5, 12, 0), (7, 5, 2), (7, 5, 11), (0, 5, 4)]
)
def test_causal_convolution(length, taps, past, x64):
    rng = np.random.default_rng(0)
    k, inputs = rng.standard_normal((taps, 2)), rng.standard_normal((3, past + length, 2))
    y = np.zeros((3, past + length, 2))
    for t in range(past + length):
        for j in range(min(t + 1, taps)):
            y[:, t] += k[j] * inputs[:, t - j]
    before = inputs[:, :past] if past else None
    got = quick_jit(lambda: ops.causal_convolution(inputs[:, past:], k, before))()
    np.testing.assert_allclose(got, y[:, past:], atol=1e-12)


@pytest.mark.smoke
def test_dtypes():
    """Computed in that of the kernel, float32 at least; returned in that of the input."""
    rng = np.random.default_rng(1)
    u, k = (on_device(rng.standard_normal((6, 2)), jnp.bfloat16) for _ in range(2))
    convolve = quick_jit(ops.causal_convolution)
    y, exact = convolve(u, k), convolve(*(np.asarray(z, np.float32) for z in (u, k)))
    assert y.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.asarray(exact).astype(jnp.bfloat16))
