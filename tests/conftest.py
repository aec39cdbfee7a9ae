"""Tests run stricter than users do: shapes are checked, dtypes are never promoted silently, x64 is on request."""

import contextlib
import functools
import gc
import os
import shutil
from pathlib import Path

import xla_flags

# Two devices; and the compilers that take least time, which is most of the time of the tests.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",
        xla_flags.QUICK,
    ]
)

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the others would wait for work by counting

# What is compiled serves the next run too, and programs that tests start. A file that another process has just begun to
# write is as good as none.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / "build/compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"

import jax
import jax.random as jr
import pytest
from helpers import precisions

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # the time of the tests is the time of XLA's compiler
gc.set_threshold(50_000, 20, 100)  # seldom: what JAX remembers of all that it compiled is looked through each time


def pytest_sessionstart(session):
    """Begins anew once what is compiled holds a GiB."""
    compiled = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if not hasattr(session.config, "workerinput") and sum(file.stat().st_size for file in compiled.glob("*")) > 1 << 30:
        shutil.rmtree(compiled)


@functools.cache
def why_no_gpu():
    """Why the tests marked `gpu` cannot run here, or nothing."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        return "no CUDA device that jax can use"
    import s5eqx  # not above: the shape checker of the tests must be there first

    cuda = s5eqx.backends()[1]
    return None if cuda.live else f"the native CUDA kernels are not live: {cuda.detail}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests marked `gpu` are skipped without a CUDA device, before any of their fixtures; with S5EQX_REQUIRE_GPU=1
    they fail instead."""
    if item.get_closest_marker("gpu") and (why := why_no_gpu()):
        (pytest.fail if os.environ.get("S5EQX_REQUIRE_GPU") == "1" else pytest.skip)(why)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Forgets what JAX compiled, which holds more than a MiB a program, once that is a GiB, on Linux: larger processes
    are slower."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 1 << 30:
        jax.clear_caches()


@pytest.fixture(scope="session")
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


dtype = precisions("float64", "float32")  # the first has the tight bounds
