"""Ctrl-C and SIGTERM as a question that a loop asks itself."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interruption:
    """Becomes true when the process is asked to stop."""

    def __init__(self):
        self._requested = False

    def __bool__(self) -> bool:
        return self._requested

    def request(self) -> None:
        self._requested = True


_open: list[Interruption] = []
"""Those of the main thread, each within the one before it."""


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Inside, the first Ctrl-C or SIGTERM only makes the yielded object true; a second one acts as before.

    Within another one that is true already, it is true from its start. The handlers from before are put back at the
    end. Outside the main thread Python cannot catch signals, and nothing is changed.
    """
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    signals = signal.SIGINT, signal.SIGTERM
    before = {number: signal.getsignal(number) for number in signals}
    if any(_open):
        asked.request()
    _open.append(asked)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, frame):
        asked.request()
        restore()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield asked
    finally:
        _open.pop()
        restore()
