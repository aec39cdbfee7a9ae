"""Tests run stricter than users do: shapes are checked, dtypes are never promoted silently, x64 is on request."""

import contextlib
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import jax.random as jr
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # the time of the tests is the time of XLA's compiler


@pytest.fixture
def key():
    return jr.key(2208)


@pytest.fixture
def x64():
    """Runs one test in double precision."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True)) if hasattr(jax, "enable_x64") else stack.enter_context(
            jax.experimental.enable_x64()
        )
        yield
