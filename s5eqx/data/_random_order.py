"""Random orders of many things that are the same with every release of numpy."""

import functools

import numpy as np

from s5eqx._typing import Integer

SPLIT, EPOCH, OFFSET = range(3)
"""The streams of random numbers that a corpus's seed holds."""


def random_bits(seed: int, stream: int, number: int, count: int) -> Integer[np.ndarray, " n"]:
    """64-bit draws `0` to `count - 1` of one of many independent sequences.

    numpy promises that a bit generator's raw output stays as it is; it does not for the draws of a `Generator`.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, got {seed}")
    key = np.array([seed, number], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def random_order(seed: int, stream: int, number: int, count: int) -> Integer[np.ndarray, " n"]:
    """`range(count)` in a random order."""
    return np.argsort(random_bits(seed, stream, number, count), kind="stable")


def in_epochs(seed: int, indices: Integer[np.ndarray, " B"], count: int) -> Integer[np.ndarray, " B"]:
    """Which of `count` examples a stream has at these places; every epoch has all of them in an order of its own."""
    epochs, places = np.divmod(np.asarray(indices, np.int64), count)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _order_of_epoch(seed, int(epoch), count)[places[here]]
    return rows


@functools.lru_cache(maxsize=4)
def _order_of_epoch(seed, epoch, count):
    return random_order(seed, EPOCH, epoch, count)
