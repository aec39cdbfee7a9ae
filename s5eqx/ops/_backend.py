"""Which implementation of an operation runs: a context, and part of jit's cache key."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

from jax.experimental.xla_metadata import set_xla_metadata

from s5eqx._typing import checked

Backend = Literal["auto", "native", "jax"]

_backend: contextvars.ContextVar[Backend] = contextvars.ContextVar("s5eqx_backend", default="auto")


def current_backend() -> Backend:
    """The backend that an operation traced now will carry as a parameter."""
    return _backend.get()


@contextlib.contextmanager
@checked
def use_backend(backend: Backend) -> Iterator[None]:
    """Chooses the implementation of all operations traced inside the `with` block.

    - `"auto"` (the default): the native kernel where it is live on the device, else plain JAX.
    - `"native"`: the native kernel; compiling for a device that has none is an error.
    - `"jax"`: plain JAX.

    A jitted function called under another backend is compiled anew, never served from the cache. The backward
    pass runs on the backend that was in force when the forward pass was traced.
    """
    token = _backend.set(backend)
    try:
        with set_xla_metadata(s5eqx_backend=backend):  # what makes the choice part of jit's cache key
            yield
    finally:
        _backend.reset(token)
