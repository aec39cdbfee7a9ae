"""A trace of a few dispatches, to look at where their time goes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax


class Profile:
    """Traces dispatches with `jax.profiler`, for TensorBoard's profile page of `folder`.

    The first dispatch, which compiles, is left out.

    **Arguments:**

    - `dispatches`: how many to trace; 0 for none.
    """

    def __init__(self, folder: Path | None, dispatches: int):
        if dispatches and folder is None:
            raise ValueError(f"profile={dispatches} writes into the folder of a run, and needs one; got run=None")
        self._folder, self._last, self._seen, self._traces = str(folder), dispatches, 0, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_):
        self._stop()

    @contextlib.contextmanager
    def dispatch(self) -> Iterator[None]:
        """Around each dispatch, with the wait for its end."""
        if self._last and self._seen == 1:
            jax.profiler.start_trace(self._folder)
            self._traces = True
        yield
        if self._seen == self._last:
            self._stop()
        self._seen += 1

    def _stop(self) -> None:
        if self._traces:
            self._traces = False
            jax.profiler.stop_trace()
