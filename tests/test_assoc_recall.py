"""Associative recall: its distributions; and the random orders and the hashes on which every generated task rests."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import examples

from s5eqx.data import AssocRecall
from s5eqx.data.hashing import HashSet, hash_tokens
from s5eqx.data.permutation import permuted


def some_rows(task, count):
    """Inputs and the answer, as the published lists have them."""
    rows = examples(task, count, jr.key(0))
    return np.concatenate([rows["inputs"], rows["targets"][:, -1:]], axis=1)


# The distributions.


def assert_uniform(drawn, low, high):
    """The counts of low, ..., high - 1 lie within 5 standard deviations of equal ones."""
    counts = np.bincount(drawn, minlength=high)[low:high]
    assert counts.sum() == len(drawn)
    share = 1 / (high - low)
    spread = np.sqrt(len(drawn) * share * (1 - share))
    assert np.abs(counts - len(drawn) * share).max() < 5 * spread, counts


@pytest.mark.parametrize("vocab_size", [10, 13])
def test_keys_and_values_are_uniform(vocab_size):
    task = AssocRecall(vocab_size, 20, num_test=10)
    rows = some_rows(task, 20_000)
    assert_uniform(rows[:, 0], 1, 1 + task.num_keys)
    assert_uniform(rows[:, 1], 1 + task.num_keys, vocab_size - 1)
    assert_uniform(rows[:, 18], 1, 1 + task.num_keys)
    other = rows[rows[:, 0] != rows[:, 2]]  # two keys have independent values
    joint = (other[:, 1] - 1 - task.num_keys) * task.num_values + other[:, 3] - 1 - task.num_keys
    assert_uniform(joint, 0, task.num_values**2)


def test_the_query_is_uniform_among_the_keys_that_occurred():
    task = AssocRecall(vocab_size=10, length=8, num_test=10)
    rows = some_rows(task, 20_000)
    shown = [sorted(set(row[:-3:2])) for row in rows]
    for size in (2, 3, 4):
        ranks = [keys.index(row[-2]) for keys, row in zip(shown, rows, strict=True) if len(keys) == size]
        assert len(ranks) > 500
        assert_uniform(np.array(ranks), 0, size)


# Random orders.


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permuted_is_one_to_one(size, key):
    order = jax.jit(jax.vmap(lambda i: permuted(i, size, key=key)))(np.arange(size, dtype=np.int32))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.smoke
def test_permuted_sends_everything_everywhere():
    place = lambda key: permuted(jnp.int32(4), 11, key=key)
    places = jax.jit(lambda: jax.vmap(place)(jr.split(jr.key(3), 20_000)))()
    assert_uniform(np.asarray(places), 0, 11)


# Hashes.


@pytest.mark.smoke
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65])
def test_a_hash_set_finds_its_members(size):
    rng = np.random.default_rng(size)
    pairs = rng.integers(0, 4, (size, 2)).astype(np.uint32)  # many share their high half
    contains = jax.jit(jax.vmap(HashSet(pairs).contains))
    asked = np.array([(a, b) for a in range(5) for b in range(5)], np.uint32)
    members = set(map(tuple, pairs.tolist()))
    np.testing.assert_array_equal(contains(asked), [tuple(p) in members for p in asked.tolist()])


def test_hashes_differ_with_the_order_and_with_every_token():
    row = np.arange(50, dtype=np.int32) % 7
    rows = np.stack([row, row[::-1], np.roll(row, 7), *(row + np.eye(50, dtype=np.int32))])
    hashes = set(map(tuple, np.asarray(jax.jit(jax.vmap(hash_tokens))(rows)).tolist()))
    assert len(hashes) == len(set(map(tuple, rows.tolist())))
    assert len({h[0] for h in hashes}) == len({h[1] for h in hashes}) == len(hashes)
