"""ListOps: an evaluator in plain Python agrees, what is drawn keeps within its limits, and lengths are spread."""

import dataclasses
import itertools
import statistics

import numpy as np
import pytest
from helpers import examples

from s5eqx.data.synthetics import ListOps

OPERATIONS = {"[MIN": min, "[MAX": max, "[MED": lambda a: int(statistics.median(a)), "[SM": lambda a: sum(a) % 10}
EXAMPLE = "[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]"
SMALL = ListOps(max_length=30, num_test=20)


def evaluated(head, tokens, seen):
    """The value and the depth of the expression or digit that begins with `head` and goes on with those of `tokens`, an
    iterator, that it needs. `seen` gets the operator and the number of arguments of all expressions."""
    if head.isdigit():
        return int(head), 0
    arguments = [evaluated(token, tokens, seen) for token in iter(lambda: next(tokens, None), "]")]
    values, depths = zip(*arguments, strict=True)
    seen.append((head, len(values)))
    return OPERATIONS[head](values), 1 + max(depths)


def assert_expressions(task, inputs, targets, lengths, weights=None):
    """All rows are one expression each, within the limits, then padding. Gives what `evaluated` has seen."""
    seen = []
    for row, target, length in zip(inputs, targets, lengths, strict=True):
        tokens = iter(task.decode(row[:length]))
        value, depth = evaluated(next(tokens), tokens, seen)
        assert next(tokens, None) is None
        assert value == target
        assert 1 <= depth <= task.max_depth
        assert not row[length:].any()
    assert all(2 <= count <= task.max_args for _, count in seen)
    return seen


def numbers(*bounds):
    return np.arange(*bounds, dtype=np.int32)


def arrays(batch):
    return {name: np.asarray(array) for name, array in vars(batch).items()}


# The expressions.


@pytest.mark.smoke
def test_the_example_of_the_docstring():
    tokens = EXAMPLE.split()
    assert EXAMPLE in ListOps.__doc__
    assert evaluated(tokens[0], iter(tokens[1:]), []) == (5, 2)
    assert SMALL.decode([SMALL.vocabulary.index(token) for token in tokens]) == tokens
    assert len(SMALL.vocabulary) == len(set(SMALL.vocabulary)) == SMALL.vocab_size


@pytest.mark.parametrize(
    "max_length, max_depth, max_args, count",
    [(4, 1, 2, 100), (5, 10, 10, 200), (16, 2, 3, 200), (300, 20, 4, 50)],
)
def test_every_example_is_an_expression_and_its_value(max_length, max_depth, max_args, count, key):
    task = ListOps(max_length, max_depth, max_args, num_test=20)
    rows = examples(task, count, key)
    seen = assert_expressions(task, **rows)
    assert {operator for operator, _ in seen} == set(OPERATIONS)
    assert {size for _, size in seen} == set(range(2, min(max_args, max_length - 2) + 1))
    assert {size % 2 for operator, size in seen if operator == "[MED"} == ({0, 1} if max_args > 2 else {0})
    assert rows["lengths"].max() >= max_length - 2


def test_long_expressions_fill_their_length(key):
    task = ListOps()
    rows = examples(task, 64, key)
    seen = assert_expressions(task, **rows)
    assert set(seen) == set(itertools.product(OPERATIONS, range(2, 11)))
    assert rows["inputs"].shape == (64, 2048) == (64, task.sequence_length)
    assert (rows["lengths"] > 1024).mean() > 0.8
    assert np.std(rows["lengths"]) > 200


@pytest.mark.smoke
def test_lengths_and_values_are_spread(key):
    rows = examples(ListOps(max_length=100), 2000, key)
    quarters = np.histogram(rows["lengths"], bins=[50, 63, 76, 88, 101])[0]
    assert quarters.sum() > 0.95 * 2000
    assert quarters.min() > 0.15 * 2000
    assert rows["lengths"].max() >= 98
    shares = np.bincount(rows["targets"]) / 2000
    assert len(shares) == ListOps.num_classes
    assert shares.min() > 0.05
    assert shares.max() < 0.2


# Purity, and the two sets.


@pytest.mark.slow
def test_an_example_depends_on_seed_and_number_alone():
    together, others = arrays(SMALL.train(numbers(20))), arrays(SMALL.train(numbers(19, 39)))
    for name in together:
        np.testing.assert_array_equal(others[name][0], together[name][19])
    rows = {tuple(row) for row in together["inputs"]}
    for other in [SMALL.test(numbers(20)), dataclasses.replace(SMALL, seed=1).train(numbers(20))]:
        assert not rows & {tuple(row) for row in np.asarray(other.inputs)}


def test_double_precision_does_not_change_the_data(request, key):
    expected = examples(SMALL, 8, key)
    request.getfixturevalue("x64")
    given = examples(ListOps(max_length=30), 8, key)
    for name in expected:
        assert given[name].dtype == expected[name].dtype == np.int32
        np.testing.assert_array_equal(given[name], expected[name])


def test_the_test_has_all_but_one_and_training_does_without_them():
    task = ListOps(max_length=4, num_test=399)  # of 400
    tested = arrays(task.test(numbers(401)))
    held_out = {tuple(row) for row in tested["inputs"][:399]}
    assert len(held_out) == 399
    np.testing.assert_array_equal(tested["weights"], [1.0] * 399 + [0.0] * 2)
    trained = arrays(task.train(numbers(4000)))
    assert trained["weights"].dtype == np.float32
    np.testing.assert_array_equal(trained["weights"], [tuple(row) not in held_out for row in trained["inputs"]])
    assert 0 < trained["weights"].sum() < 40


def num_expressions(max_length, max_depth, max_args):
    """How many expressions there are, by their length."""
    arguments = np.zeros(max_length + 1, object)
    arguments[1] = 10
    for _ in range(max_depth):
        lists = arguments
        expressions = np.zeros_like(arguments)
        for _ in range(2, max_args + 1):
            lists = np.convolve(lists, arguments)[: max_length + 1]
            expressions[2:] += 4 * lists[:-2]
        arguments = expressions.copy()
        arguments[1] = 10
    return sum(expressions)


@pytest.mark.parametrize("sizes", [(4, 3, 2), (7, 2, 2), (12, 3, 10), (12, 1, 10), (60, 10, 2), (60, 10, 30)])
def test_there_are_as_many_examples_as_are_counted(sizes):
    counted = ListOps(*sizes, num_test=10).num_distinct()
    assert counted <= num_expressions(*sizes)
    if sizes[1] == 1 or sizes[0] == 4:
        assert counted == num_expressions(*sizes)


# Bad input.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_length": 3}, "max_length must be at least 4 tokens, got 3"),
        ({"max_depth": 0}, "max_depth must be at least 1"),
        ({"max_args": 1}, "max_args must be at least 2, got 1"),
        ({"num_test": 0}, "num_test must be at least 1"),
        ({"max_length": 4, "num_test": 400}, "only 400 different"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ListOps(**settings)
