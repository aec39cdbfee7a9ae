"""Agreement between the processes of one run, which `jax.distributed` has joined. One process agrees with itself.

All processes must come to every function here, in the same order.
"""

import json
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

Value = TypeVar("Value")


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def in_any_process(flag: bool) -> bool:
    """Whether the flag is raised in at least one process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def done_by_all(act: Callable[[], Value]) -> Value:
    """What `act` returns in this process. If it raises in one process, all raise."""
    try:
        value, error = act(), None
    except Exception as raised:  # and raised again below, when all know
        value, error = None, raised
    if in_any_process(error is not None):
        raise error or OSError("another process could not do it")
    return cast(Value, value)


def done_by_first(act: Callable[[], str]) -> str:
    """What `act` returns in the first process, which alone calls it. If it raises there, all processes raise."""
    if jax.process_count() == 1:
        return act()
    page, error = {}, None
    if is_first():
        try:
            page = {"value": act()}
        except (OSError, ValueError) as raised:
            page, error = {"error": str(raised)}, raised
    page = json.loads(_from_first(json.dumps(page).encode()))
    if "error" in page:
        raise error or ValueError(page["error"])
    return page["value"]


def _from_first(message: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    buffer = np.zeros(size, np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(message, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(buffer))
