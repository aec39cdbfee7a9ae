"""Associative recall: the published layout, and examples that depend on a seed and a number alone."""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import recall_numpy

from s5eqx.data import AssocRecall
from s5eqx.data.hashing import HashSet, hash_tokens
from s5eqx.data.permutation import permuted

TASK = AssocRecall(num_test=100)
FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "s5" / "synthetic_data.npz"


@pytest.fixture(scope="module")
def published():
    with np.load(FIXTURES) as data:
        return dict(data)


def rows_of(batch):
    """Inputs and the answer, as the published lists have them."""
    return np.concatenate([np.asarray(batch.inputs), np.asarray(batch.targets)[:, -1:]], axis=1)


def some_rows(task, count):
    return rows_of(task.train(jnp.arange(count)))


# The published data.


@pytest.mark.parametrize(
    "case",
    ["assoc_recall_V10_L20_seed0", "assoc_recall_V12_L30_seed4_keys2", "assoc_recall_V20_L30_seed3_dot"],
)
def test_the_numpy_twin_is_the_published_generator(published, case):
    config = json.loads(str(published[f"{case}/config"]))
    rng = np.random.default_rng(config["seed"])
    rows = [
        recall_numpy.draw(rng, config["vocab_size"], config["input_seq_len"], config["num_keys"], config["allow_dot"])
        for _ in range(config["n"])
    ]
    np.testing.assert_array_equal(rows, published[f"{case}/ids"])


@pytest.mark.parametrize("case", ["pipeline_V10_L20_seed0", "pipeline_dups_V6_L4_seed1"])
def test_the_numpy_twin_makes_the_published_data_sets(published, case):
    config = json.loads(str(published[f"{case}/config"]))
    train, test = recall_numpy.pipeline(
        config["seed"],
        config["num_examples"],
        config["num_test_examples"],
        config["vocab_size"],
        config["input_seq_len"],
    )
    for name, (inputs, targets) in {"train": train, "test": test}.items():
        np.testing.assert_array_equal(inputs, published[f"{case}/{name}_inputs"])
        np.testing.assert_array_equal(targets, published[f"{case}/{name}_targets"])


@pytest.mark.parametrize("case", ["assoc_recall_V10_L20_seed0", "assoc_recall_V20_L30_seed3_dot"])
def test_vocabulary_and_split_are_the_published_ones(published, case):
    config = json.loads(str(published[f"{case}/config"]))
    task = AssocRecall(config["vocab_size"], config["input_seq_len"])
    assert list(task.vocabulary) == list(published[f"{case}/vocab"])
    assert list(task.vocabulary[1:-1]) == list(published[f"{case}/keys_values_split"])
    assert task.sequence_length == published[f"{case}/ids"].shape[1] - 1


# The layout of a sequence.


def assert_recall(task, row):
    """`row` is a list of pairs from one map, `=>`, a key that occurred and its value."""
    tokens = task.decode(row)
    plain = task.vocabulary[1:-1]
    keys, values = plain[: len(plain) // 2], plain[len(plain) // 2 :]
    *pairs, arrow, query, answer = tokens
    assert len(pairs) == 2 * (task.length // 2)
    assert arrow == "=>"
    shown = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        assert key in keys
        assert value in values
        assert shown.setdefault(key, value) == value
    assert shown[query] == answer


@pytest.mark.parametrize("vocab_size, length", [(10, 20), (5, 12), (13, 31)])
def test_every_sequence_is_a_recall(vocab_size, length):
    num_test = 1 if vocab_size == 5 else 100
    task = AssocRecall(vocab_size, length, num_test=num_test)
    for row in [*some_rows(task, 100), *rows_of(task.test(jnp.arange(num_test)))]:
        assert_recall(task, row)


def test_targets_are_the_next_tokens():
    batch = TASK.train(jnp.arange(100))
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    np.testing.assert_array_equal(batch.weights, 1.0)
    assert (batch.inputs.dtype, batch.weights.dtype) == (jnp.int32, jnp.float32)


def test_the_test_asks_for_the_answer_alone():
    batch = TASK.test(jnp.arange(1, 101))
    np.testing.assert_array_equal(batch.weights[:, :-1], 0.0)
    np.testing.assert_array_equal(batch.weights[:, -1], [1.0] * 99 + [0.0])


def test_the_test_has_no_sequence_twice():
    task = AssocRecall(vocab_size=6, length=4, num_test=19)  # of 20
    assert len(set(map(tuple, rows_of(task.test(jnp.arange(19)))))) == 19


def test_long_sequences_are_quick():
    task = AssocRecall(vocab_size=30, length=131_072, num_test=8)
    since = time.perf_counter()
    batch = jax.block_until_ready(jax.jit(task.train_batch, static_argnums=1)(0, 4))
    assert time.perf_counter() - since < 10.0
    assert batch.inputs.shape == (4, 131_074)
    assert_recall(task, rows_of(batch)[0])


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


# Purity.


def test_an_example_depends_on_seed_and_number_alone():
    together = some_rows(TASK, 100)
    alone = rows_of(TASK.train(jnp.array([23])))
    np.testing.assert_array_equal(alone[0], together[23])
    steps = jax.jit(jax.vmap(lambda step: TASK.train_batch(step, 8).inputs))(jnp.arange(3))
    np.testing.assert_array_equal(steps.reshape(24, -1), together[:24, :-1])
    other_test = AssocRecall(num_test=5)
    np.testing.assert_array_equal(some_rows(other_test, 100), together)


def test_seeds_and_splits_give_other_examples():
    rows = {tuple(row) for row in some_rows(TASK, 100)}
    others = [rows_of(TASK.test(jnp.arange(100))), some_rows(AssocRecall(seed=1, num_test=100), 100)]
    for other in others:
        assert not rows & set(map(tuple, other))


def test_double_precision_does_not_change_the_data(request):
    make = lambda: rows_of(AssocRecall(num_examples=50, num_test=30).train(jnp.arange(8)))
    expected = make()
    request.getfixturevalue("x64")
    np.testing.assert_array_equal(make(), expected)


def test_a_test_sequence_in_training_has_no_weight():
    task = AssocRecall(vocab_size=6, length=4, num_test=10)
    held_out = set(map(tuple, rows_of(task.test(jnp.arange(10)))))
    batch = task.train(jnp.arange(200))
    leaked = np.array([tuple(row) in held_out for row in rows_of(batch)])
    assert 0 < leaked.sum() < 200
    np.testing.assert_array_equal(batch.weights, np.broadcast_to(~leaked[:, None], batch.weights.shape))


# A training set of a given size.


def test_an_epoch_goes_through_the_set_once_in_a_fresh_order():
    task = AssocRecall(num_examples=60, num_test=10)
    first, second = rows_of(task.train(jnp.arange(120))).reshape(2, 60, -1)
    endless = some_rows(TASK, 100)[:60]
    as_set = lambda rows: sorted(map(tuple, rows))
    assert as_set(first) == as_set(second) == as_set(endless)
    assert (first != second).any(axis=1).sum() > 40
    assert (first != endless).any(axis=1).sum() > 40


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permuted_is_one_to_one(size, key):
    order = jax.jit(jax.vmap(lambda i: permuted(i, size, key=key)))(jnp.arange(size))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_permuted_sends_everything_everywhere():
    keys = jr.split(jr.key(3), 20_000)
    places = jax.jit(jax.vmap(lambda key: permuted(jnp.int32(4), 11, key=key)))(keys)
    assert_uniform(np.asarray(places), 0, 11)


# Hashes.


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65])
def test_a_hash_set_finds_its_members(size):
    rng = np.random.default_rng(size)
    pairs = rng.integers(0, 4, (size, 2)).astype(np.uint32)  # many share their high half
    contains = jax.jit(jax.vmap(HashSet(pairs).contains))
    asked = np.array([(a, b) for a in range(5) for b in range(5)], np.uint32)
    members = set(map(tuple, pairs.tolist()))
    np.testing.assert_array_equal(contains(jnp.asarray(asked)), [tuple(p) in members for p in asked.tolist()])


def test_hashes_differ_with_the_order_and_with_every_token():
    row = jnp.arange(50) % 7
    rows = [row, row[::-1], jnp.roll(row, 7), *(row.at[i].add(1) for i in range(50))]
    hashes = {tuple(np.asarray(hash_tokens(r)).tolist()) for r in rows}
    assert len(hashes) == len({tuple(np.asarray(r).tolist()) for r in rows})
    assert len({h[0] for h in hashes}) == len({h[1] for h in hashes}) == len(hashes)


# Bad input.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": 3}, "vocab_size must be at least 4"),
        ({"length": 1}, "length must be at least 2"),
        ({"num_examples": 0}, "num_examples must be at least 1"),
        ({"num_test": 0}, "num_test must be at least 1"),
        ({"vocab_size": 6, "length": 4, "num_test": 20}, "only 20 different"),
        ({"vocab_size": 4, "length": 100, "num_test": 1}, "only 1 different"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AssocRecall(**settings)
