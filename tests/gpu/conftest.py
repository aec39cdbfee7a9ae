"""The tests of this folder run on the first CUDA device, compiled as users' programs are."""

import jax
import pytest


@pytest.fixture(autouse=True)
def on_the_gpu():
    with jax.default_device(jax.devices("cuda")[0]):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
