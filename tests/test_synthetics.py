"""The generated tasks: what they show and ask, how likely each example is, and that it depends on a seed and a number
alone. What they should do is told again here, in plain Python on tokens, by their docstrings."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import string
import time
from collections import Counter

import jax
import numpy as np
import pytest
import synthetics_numpy

from s5eqx.data.synthetics import (
    Addition,
    AssocRecall,
    Counting,
    InductionHeads,
    LinearFunctions,
    Majority,
    SelectiveCopying,
)

SEVERAL_KEYS = AssocRecall(13, 31, key_length=2, allow_dot=True, num_test=50)
SEVERAL_TRIGGERS = InductionHeads(24, 30, copy_length=2, num_triggers=3, num_test=50)
TASKS = [
    AssocRecall(num_test=50),
    SEVERAL_KEYS,
    InductionHeads(num_test=50),
    SEVERAL_TRIGGERS,
    Majority(num_test=50),
    Counting(num_test=50),
    SelectiveCopying(length=20, num_test=50),
    Addition(9, num_test=50),
]
SERIES = LinearFunctions(num_test=50)
TINY = [  # with fewer examples than are drawn here; half of them make the test
    AssocRecall(6, 4, num_test=10),
    AssocRecall(6, 6, key_length=2, allow_dot=True, num_test=112),
    InductionHeads(4, 5, num_test=24),
    InductionHeads(4, 7, copy_length=2, num_triggers=2, num_test=128),
    Majority(3, 6, num_test=90),
    Counting(7, 4, num_test=126),
    SelectiveCopying(5, 5, 2, num_test=45),
    Addition(1, num_test=50),
]
ALIKE = [*(TASKS[i] for i in (0, 2, 3, 4, 5, 6)), TINY[0], TINY[2]]
"""Tasks that have a twin among the others, with more keys or triggers, or fewer examples: among the slow tests."""
DRAWN = 20_000


def each(*tasks):
    """Runs a test on each task; one worker process has all that is about it."""
    number = lambda value: "-".join(map(str, [v for v in value if v is not None]))
    name = lambda task: f"{type(task).__name__}-{number(dataclasses.astuple(task)[3:])}"
    marks = lambda task: [pytest.mark.xdist_group(name(task)), *[pytest.mark.slow] * (task in ALIKE)]
    return pytest.mark.parametrize("task", [pytest.param(task, id=name(task), marks=marks(task)) for task in tasks])


@functools.cache
def drawn(task):
    """The first training examples."""
    return jax.device_get(task.train(np.arange(DRAWN, dtype=np.int32)))


@functools.cache
def held_out(task):
    """The test examples, and one beyond."""
    return jax.device_get(task.test(np.arange(task.num_test + 1, dtype=np.int32)))


# What the docstrings say: the length of the answer, and the answer to what is shown, whose form is checked.


def answer_length(task):
    match task:
        case InductionHeads():
            return task.copy_length
        case SelectiveCopying():
            return task.num_copied
        case Addition():
            return task.digits + 1
    return 1


def plain(task):
    return sorted(map(str, range(task.vocab_size - 2)))


def keys_and_values(task):
    half = (task.vocab_size - 2) // 2
    return plain(task)[:half], plain(task)[half:]


def recalled(task, shown):
    (keys, values), size = keys_and_values(task), task.key_length
    *pairs, arrow = shown[:-size]
    query = tuple(shown[-size:])
    assert len(pairs) == task.length // (size + 1) * (size + 1) and arrow == "=>"
    value_of = {}
    for start in range(0, len(pairs), size + 1):
        *key, value = pairs[start : start + size + 1]
        assert set(key) <= set(keys) and value in values
        assert value_of.setdefault(tuple(key), value) == value
    assert query in value_of or (task.allow_dot and set(query) <= set(keys))
    return [value_of.get(query, ".")]


def induced(task, shown):
    *tokens, last = shown
    assert len(tokens) == task.length and last == "=>"
    places = [i for i, token in enumerate(tokens) if token == "=>"]
    copies = [tokens[i + 1 : i + 1 + task.copy_length] for i in places]
    assert 1 <= len(places) <= task.num_triggers and places[-1] < task.length - 1 - task.copy_length
    assert all(copy == copies[0] for copy in copies) and "=>" not in copies[0]
    assert set(tokens) <= {*plain(task), "=>"}
    return copies[0]


def in_majority(task, shown):
    [(token, count)] = Counter(shown).most_common(1)
    assert len(shown) == task.length and count == task.length // 2 + 1
    assert set(shown) <= set(map(str, range(task.vocab_size)))
    return [token]


def most(task):
    return min(task.vocab_size // 2, task.length)


def counted(task, shown):
    assert len(shown) == task.length and 1 <= shown.count(shown[-1]) <= most(task)
    assert set(shown) <= set(string.ascii_lowercase[: task.vocab_size - most(task)])
    return [str(shown.count(shown[-1]))]


def copied(task, shown):
    *tokens, arrow = shown
    kept = [token for token in tokens if token != "."]
    assert len(tokens) == task.length and arrow == "=>"
    assert len(kept) == task.num_copied and set(kept) <= set(plain(task))
    return kept


def added(task, shown):
    first, second = "".join(shown[: task.digits]), "".join(shown[task.digits :])
    assert len(first) == len(second) == task.digits
    return list(f"{int(first) + int(second):0{task.digits + 1}}")


ANSWER = {
    AssocRecall: recalled,
    InductionHeads: induced,
    Majority: in_majority,
    Counting: counted,
    SelectiveCopying: copied,
    Addition: added,
}


def in_tokens(task, inputs, targets):
    """What each example shows before the first token of its answer, and its answer."""
    tokens, n = np.array(task.vocabulary), answer_length(task)
    shown = np.asarray(inputs)[:, : inputs.shape[1] - n + 1]
    return tokens[shown].tolist(), tokens[np.asarray(targets)[:, -n:]].tolist()


def tokens_of(task):
    return in_tokens(task, drawn(task).inputs, drawn(task).targets)


def assert_answered(task, inputs, targets):
    shown, answers = in_tokens(task, inputs, targets)
    assert [ANSWER[type(task)](task, row) for row in shown] == answers


# The published data.

NAMES = {"train_x": "train_inputs", "train_y": "train_targets", "test_x": "test_inputs", "test_y": "test_targets"}


def read_published():
    """Options, token sequences and vocabularies by case."""
    cases, folder = {}, pathlib.Path(__file__).parent / "fixtures"
    with np.load(folder / "s5" / "synthetic_data.npz") as file:
        for path in file:
            case, name = path.split("/")
            cases.setdefault(case, {})[name] = file[path]
    for case in cases.values():
        case["config"] = json.loads(str(case["config"]))
    for path in sorted((folder / "safari").glob("data_*.npz")):
        with np.load(path) as file:
            cases[path.stem] = {NAMES.get(name, name): file[name] for name in file}
        cases[path.stem]["config"] = json.loads(str(cases[path.stem]["meta"]))["config"]
    return cases


PUBLISHED = read_published()
SETS = [case for case in PUBLISHED if "train_inputs" in PUBLISHED[case]]
LISTS = [case for case in PUBLISHED if "ids" in PUBLISHED[case]]


def task_of(config):
    sizes = config["vocab_size"], config["input_seq_len"]
    if config["copy_method"] == "assoc_recall":
        options = {"key_length": config.get("num_keys", 1), "allow_dot": config.get("allow_dot", False)}
        return AssocRecall(*sizes, **options, num_test=1)
    return InductionHeads(*sizes, config.get("induction_len", 1), config.get("induction_num_triggers", 1), num_test=1)


def test_nothing_that_is_published_is_left_out():
    assert (len(LISTS), len(SETS), len(PUBLISHED)) == (5, 6, 11)


@pytest.mark.parametrize("case", LISTS)
def test_the_twin_draws_the_published_lists(case):
    options = dict(PUBLISHED[case]["config"])
    rng, count = np.random.default_rng(options.pop("seed")), options.pop("n")
    rows = [synthetics_numpy.draw(rng, **options) for _ in range(count)]
    np.testing.assert_array_equal(rows, PUBLISHED[case]["ids"])


@pytest.mark.parametrize("case", SETS)
def test_the_twin_makes_the_published_data_sets(case):
    for name, made in zip(NAMES.values(), synthetics_numpy.pipeline(**PUBLISHED[case]["config"]), strict=True):
        np.testing.assert_array_equal(made, PUBLISHED[case][name], err_msg=name)


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_tasks_are_the_published_ones(case):
    data, task = PUBLISHED[case], task_of(PUBLISHED[case]["config"])
    assert list(task.vocabulary) == synthetics_numpy.vocabulary(task.vocab_size)
    if "vocab" in data:
        assert list(task.vocabulary) == list(data["vocab"])
    if "keys_values_split" in data:
        assert plain(task) == list(data["keys_values_split"])
    if case in LISTS:
        pairs = [(data["ids"][:, :-1], data["ids"][:, 1:])]
    else:
        pairs = [(data[f"{split}_inputs"], data[f"{split}_targets"]) for split in ("train", "test")]
        for counts, (_, targets) in zip([task.trained(), task.asked()], pairs, strict=True):
            np.testing.assert_array_equal(np.broadcast_to(counts, targets.shape), targets != -100)
    for inputs, targets in pairs:
        assert inputs.shape[1] == task.sequence_length
        assert_answered(task, inputs, targets)


# What is shown and asked.


@pytest.mark.smoke
@pytest.mark.parametrize(
    "task, tokens",
    [
        (SelectiveCopying(14), [".", "0", "1", "10", "11", *"23456789", "=>"]),
        (Majority(12), [*"0123456789", "10", "11"]),
        (Counting(9), [*"1234", *"abcde"]),
        (Counting(54, 2, num_test=1), ["1", "2", *string.ascii_lowercase, *[f"{a}1" for a in string.ascii_lowercase]]),
        (Addition(), [*"0123456789"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_vocabularies(task, tokens):
    assert list(task.vocabulary) == tokens
    assert task.decode(range(task.vocab_size)) == tokens


@each(*TINY, *TASKS)
def test_the_answer_follows_from_what_is_shown(task):
    assert len(set(task.vocabulary)) == len(task.vocabulary) == task.vocab_size
    for batch in drawn(task), held_out(task):
        inputs, targets = batch.inputs[:500], batch.targets[:500]
        assert inputs.dtype == targets.dtype == np.int32 and batch.weights.dtype == np.float32
        assert inputs.shape == targets.shape == batch.weights[:500].shape == (len(inputs), task.sequence_length)
        assert_answered(task, inputs, targets)
        known = task.length if isinstance(task, SelectiveCopying) else task.sequence_length - 1
        np.testing.assert_array_equal(inputs[:, 1 : known + 1], targets[:, :known])
        assert (inputs[:, known + 1 :] == task.vocab_size - 1).all()  # copying is not shown what it should have said


@each(*TINY, *TASKS, SERIES)
def test_what_counts(task):
    """A test example in training does not, nor a number beyond the test, which holds no example twice."""
    place = np.arange(task.sequence_length)
    asked = place >= task.sequence_length - answer_length(task)
    trained = asked
    if isinstance(task, AssocRecall | InductionHeads):
        trained = place >= 0
    elif isinstance(task, LinearFunctions):
        trained = place % 2 == 0
    test = [row.tobytes() for row in held_out(task).inputs[:-1]]
    assert len(set(test)) == task.num_test
    np.testing.assert_array_equal(held_out(task).weights[:-1], np.broadcast_to(asked, (task.num_test, len(place))))
    np.testing.assert_array_equal(held_out(task).weights[-1], 0)
    fresh = np.array([row.tobytes() not in set(test) for row in drawn(task).inputs])
    assert fresh.mean() > 0.99 or (task in TINY and 0.1 < fresh.mean() < 0.9)
    np.testing.assert_array_equal(drawn(task).weights, fresh[:, None] & trained)


@pytest.mark.smoke
def test_linear_functions():
    n, d = SERIES.num_pairs, SERIES.dimension
    steps, targets = drawn(SERIES).inputs.astype(np.float64), drawn(SERIES).targets.astype(np.float64)
    x, shown = steps[:, ::2, :-1], steps[:, 1::2, -1:]
    assert x.shape == (DRAWN, n + 1, d) and shown.shape == (DRAWN, n, 1)
    assert steps.shape[1:] == (SERIES.sequence_length, SERIES.num_features)
    assert targets.shape[1:] == (SERIES.sequence_length, SERIES.num_outputs)
    assert not steps[:, ::2, -1].any() and not steps[:, 1::2, :-1].any()
    given = x[:, :-1].mT
    w = np.linalg.solve(given @ given.mT, given @ shown) * math.sqrt(d)  # by least squares
    np.testing.assert_allclose(targets[:, ::2], x @ w / math.sqrt(d), rtol=0, atol=1e-5)
    for normal in x[:, 0], x[:, -1], w[..., 0]:
        spread = 5 / math.sqrt(DRAWN)
        np.testing.assert_allclose(normal.mean(axis=0), 0, atol=spread)
        np.testing.assert_allclose(normal.T @ normal / DRAWN, np.eye(d), atol=spread * math.sqrt(2))
    f = targets[:, -1, 0]
    assert abs(np.mean(f**2) - 1) < 5 * math.sqrt((2 + 6 / d) / DRAWN)  # whose fourth moment is 3 + 6 / d
    assert SERIES.num_distinct() == math.inf


# How likely each example is.


def assert_likely(counts, chances):
    """What was counted lies within 5 standard deviations of what is expected, each number and their chi-squared."""
    counts, chances = np.asarray(counts), np.asarray(chances) / np.sum(chances)
    expected = counts.sum() * chances
    assert expected.min() > 20
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - chances))).all(), (counts, expected)
    chi_squared, freedom = np.sum((counts - expected) ** 2 / expected), len(counts) - 1
    assert chi_squared <= freedom + 5 * math.sqrt(2 * freedom), (counts, expected)


def filled(length, places, these, others):
    these, others = iter(these), iter(others)
    return [next(these) if i in places else next(others) for i in range(length)]


def recalls(task):
    (keys, values), size = keys_and_values(task), task.key_length
    keys = list(itertools.product(keys, repeat=size))
    for of_keys in itertools.product(values, repeat=len(keys)):
        value_of = dict(zip(keys, of_keys, strict=True))
        for shown in itertools.product(keys, repeat=task.length // (size + 1)):
            pairs = [token for key in shown for token in (*key, value_of[key])]
            queries = keys if task.allow_dot else set(shown)
            for query in queries:
                yield (*pairs, "=>", *query, value_of[query] if query in shown else "."), 1 / len(queries)


def triggers(task):
    """Where they stand."""
    places = range(task.length - 1 - task.copy_length)
    for place in places:
        yield (place,), 1 / len(places)
    for several in itertools.product(places, repeat=task.num_triggers):
        kept = []
        for place in sorted(several):
            if not kept or place > kept[-1] + task.copy_length:
                kept.append(place)
        yield tuple(kept), 1 / len(places) ** task.num_triggers


def inductions(task):
    for tokens in itertools.product(plain(task), repeat=task.length):
        for places, chance in chances(triggers, task).items():
            copy = tokens[places[0] + 1 : places[0] + 1 + task.copy_length]
            row = list(tokens)
            for place in places:
                row[place : place + 1 + task.copy_length] = ["=>", *copy]
            yield (*row, "=>", *copy), chance


def majorities(task):
    tokens, L = list(map(str, range(task.vocab_size))), task.length
    for token in tokens:
        others = [other for other in tokens if other != token]
        for places in itertools.combinations(range(L), L // 2 + 1):
            for rest in itertools.product(others, repeat=L - len(places)):
                yield (*filled(L, places, [token] * L, rest), token), 1


def countings(task):
    symbols, before = string.ascii_lowercase[: task.vocab_size - most(task)], task.length - 1
    for symbol, n in itertools.product(symbols, range(most(task))):
        others = [other for other in symbols if other != symbol]
        fillings = list(itertools.product(others, repeat=before - n))
        for places, rest in itertools.product(itertools.combinations(range(before), n), fillings):
            row = filled(before, places, [symbol] * n, rest)
            yield (*row, symbol, str(n + 1)), 1 / (math.comb(before, n) * len(fillings))


def copyings(task):
    L, n = task.length, task.num_copied
    for places in itertools.combinations(range(L), n):
        for tokens in itertools.product(plain(task), repeat=n):
            yield (*filled(L, places, tokens, "." * L), "=>", *tokens), 1


def additions(task):
    for digits in itertools.product("0123456789", repeat=2 * task.digits):
        yield (*digits, *added(task, digits)), 1


EXAMPLES = {
    AssocRecall: recalls,
    InductionHeads: inductions,
    Majority: majorities,
    Counting: countings,
    SelectiveCopying: copyings,
    Addition: additions,
}


@functools.cache
def chances(outcomes, task):
    """How likely each outcome is, but for one factor."""
    chances = Counter()
    for outcome, chance in outcomes(task):
        chances[outcome] += chance
    return chances


@each(*TINY)
def test_every_example_is_as_likely_as_it_should_be(task):
    expected = chances(EXAMPLES[type(task)], task)
    counts = Counter((*shown, *answer) for shown, answer in zip(*tokens_of(task), strict=True))
    assert counts.keys() <= expected.keys()
    assert_likely([counts[row] for row in expected], list(expected.values()))
    if isinstance(task, InductionHeads) and task.num_triggers > 1:
        assert task.num_distinct() <= len(expected)
    else:
        assert task.num_distinct() == len(expected)


def answers(task):
    """How likely each token is to be the last one of the answer."""
    match task:
        case AssocRecall():
            (keys, values), size = keys_and_values(task), task.key_length
            unseen = (1 - len(keys) ** -size) ** (task.length // (size + 1)) if task.allow_dot else 0
            return {**dict.fromkeys(values, (1 - unseen) / len(values)), **({".": unseen} if unseen else {})}
        case InductionHeads() | SelectiveCopying():
            return dict.fromkeys(plain(task), 1)
        case Majority():
            return dict.fromkeys(task.vocabulary, 1)
        case Counting():
            return dict.fromkeys(map(str, range(1, most(task) + 1)), 1)
    return dict.fromkeys("0123456789", 1)


@each(*TASKS)
def test_answers_are_as_likely_as_they_should_be(task):
    expected = answers(task)
    counts = Counter(answer[-1] for answer in tokens_of(task)[1])
    assert counts.keys() <= expected.keys()
    assert_likely([counts[token] for token in expected], list(expected.values()))


@each(*[task for task in TASKS if isinstance(task, InductionHeads)])
def test_triggers_stand_where_they_should(task):
    """Half of the sequences have one, the others as many as fit."""
    is_trigger = drawn(task).inputs[:, : task.length] == task.vocabulary.index("=>")
    expected = chances(triggers, task)
    for count, seen in (len, is_trigger.sum(axis=1)), (min, is_trigger.argmax(axis=1)):
        law = Counter()
        for places, chance in expected.items():
            law[count(places)] += chance
        assert_likely(np.bincount(seen, minlength=max(law) + 1)[list(law)], list(law.values()))


@each(*[task for task in TASKS if isinstance(task, Majority | Counting | SelectiveCopying)])
def test_what_counts_stands_everywhere(task):
    inputs = drawn(task).inputs
    match task:
        case Majority():
            here = inputs == drawn(task).targets[:, -1:]
        case Counting():
            here = inputs[:, :-1] == inputs[:, -1:]
        case _:
            here = inputs[:, : task.length] != task.vocabulary.index(".")
    assert_likely(here.sum(axis=0), np.ones(here.shape[1]))


# What an example depends on.


def assert_same(batch, other, numbers):
    """The examples of `batch` are those of `other` with these numbers; sums of real numbers may round differently."""
    for name in "inputs", "targets", "weights":
        given, wanted = np.asarray(getattr(batch, name)), getattr(other, name)[numbers]
        assert (given.shape, given.dtype) == (wanted.shape, wanted.dtype)
        near = 1e-6 if wanted.dtype == np.float32 else 0
        assert (np.abs(given - wanted) <= near + near * np.abs(wanted)).all(), name


@pytest.mark.slow
@each(*(task for task in TASKS if task is not SEVERAL_KEYS))
def test_an_example_of_any_task_depends_on_its_number_alone(task, request):
    test_an_example_depends_on_its_number_alone(task, request)


@each(SEVERAL_KEYS, SERIES)
def test_an_example_depends_on_its_number_alone(task, request):
    numbers = np.random.default_rng(0).integers(0, DRAWN, DRAWN, np.int32)
    assert_same(task.train(numbers), drawn(task), numbers)
    assert (drawn(task).inputs[:50] != held_out(task).inputs[:50]).reshape(50, -1).any(axis=1).all()
    request.getfixturevalue("x64")
    assert_same(dataclasses.replace(task).train_batch(3, 4), drawn(task), np.arange(12, 16))


@each(Majority(num_test=50))
def test_seeds_give_other_examples_and_the_size_of_the_test_does_not(task):
    first, numbers = drawn(task), np.arange(24, dtype=np.int32)
    assert_same(dataclasses.replace(task, num_test=7).train(numbers[5:6]), first, numbers[5:6])
    steps = jax.jit(jax.vmap(lambda step: task.train_batch(step, 8)))(np.arange(3, dtype=np.int32))
    assert_same(jax.tree.map(lambda x: x.reshape(24, *x.shape[2:]), steps), first, numbers)
    other = dataclasses.replace(task, seed=1).train(numbers)
    assert (np.asarray(other.inputs) != first.inputs[:24]).reshape(24, -1).any(axis=1).all()


@each(dataclasses.replace(SEVERAL_KEYS, num_examples=60))
def test_an_epoch_goes_through_the_set_once_in_a_fresh_order(task):
    first, second = np.asarray(task.train(np.arange(120, dtype=np.int32)).inputs).reshape(2, 60, -1)
    endless = drawn(dataclasses.replace(task, num_examples=None)).inputs[:60].reshape(60, -1)
    as_set = lambda rows: sorted(map(tuple, rows.tolist()))
    assert as_set(first) == as_set(second) == as_set(endless)
    assert (first != second).any(axis=1).sum() > 40
    assert (first != endless).any(axis=1).sum() > 40


@pytest.mark.slow
@each(dataclasses.replace(SERIES, num_examples=60))
def test_an_epoch_of_series_goes_through_the_set_once_in_a_fresh_order(task):
    test_an_epoch_goes_through_the_set_once_in_a_fresh_order(task)


# Any length.

LONG = 131_072


@pytest.mark.slow
@each(
    AssocRecall(30, LONG, num_test=2),
    InductionHeads(20, LONG, copy_length=3, num_triggers=4, num_test=2),
    Majority(10, LONG, num_test=2),
    Counting(10, LONG, num_test=2),
    SelectiveCopying(16, LONG, num_copied=400, num_test=2),
)
def test_long_sequences_are_quick(task):
    since = time.perf_counter()
    batch = jax.device_get(task.train(np.arange(2, dtype=np.int32)))
    assert time.perf_counter() - since < 60, "compilation included, on a busy machine"
    assert LONG - 2 < batch.inputs.shape[1] < LONG + 401
    assert_answered(task, batch.inputs, batch.targets)


# Bad input.


@pytest.mark.parametrize(
    "task, settings, message",
    [
        (AssocRecall, {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        (InductionHeads, {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        (SelectiveCopying, {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        (Counting, {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        (Majority, {"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
        (AssocRecall, {"length": 1}, "length must be at least 2 tokens, got 1"),
        (AssocRecall, {"length": 3, "key_length": 3}, "length must be at least 4 tokens, got 3"),
        (AssocRecall, {"vocab_size": 4, "length": 100, "num_test": 1}, "only 1 different examples"),
        (AssocRecall, {"key_length": 0}, "key_length must be at least 1 token, got 0"),
        (AssocRecall, {"key_length": 7, "length": 30}, "at most 8192; keys of key_length=7 out of 4 tokens are more"),
        (AssocRecall, {"vocab_size": 22, "key_length": 10_000, "length": 20_000}, "at most 8192"),
        (Majority, {"seed": -1}, "a seed is a number of 32 bits, 0 to 4294967295, got -1"),
        (Majority, {"seed": 2**32}, "a seed is a number of 32 bits"),
        (InductionHeads, {"length": 4, "copy_length": 3}, "length must be at least 5 tokens, got 4"),
        (InductionHeads, {"copy_length": 0}, "must be at least 1, got 0 and 1"),
        (InductionHeads, {"num_triggers": 0}, "must be at least 1, got 1 and 0"),
        (Majority, {"length": 2}, "length must be at least 3 tokens, got 2"),
        (Counting, {"length": 1}, "length must be at least 2 tokens, got 1"),
        (SelectiveCopying, {"length": 3}, "num_copied must lie between 1 and length=3, got 4"),
        (SelectiveCopying, {"num_copied": 0}, "num_copied must lie between 1 and length=64, got 0"),
        (Addition, {"digits": 0}, "digits must lie between 1 and 9, got 0"),
        (Addition, {"digits": 10}, "digits must lie between 1 and 9, got 10"),
        (LinearFunctions, {"dimension": 0}, "dimension and num_pairs must be at least 1, got 0 and 20"),
        (LinearFunctions, {"num_pairs": 0}, "dimension and num_pairs must be at least 1, got 5 and 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(task, settings, message):
    with pytest.raises(ValueError, match=message):
        task(**settings)


@each(*TINY, SERIES)
def test_sizes_that_cannot_be_are_refused(task):
    resized = functools.partial(dataclasses.replace, task)
    with pytest.raises(ValueError, match="num_examples must be at least 1, or None for endless data, got 0"):
        resized(num_examples=0)
    with pytest.raises(ValueError, match="num_test must be at least 1, got 0"):
        resized(num_test=0)
    if task is SERIES:
        return
    distinct = task.num_distinct()
    assert resized(num_test=distinct - 1, num_examples=1)
    with pytest.raises(ValueError, match=rf"only {distinct} different examples of {type(task).__name__}\(.*fewer"):
        resized(num_test=distinct)
    with pytest.raises(ValueError, match=f"num_examples=2 and num_test={distinct - 1} .* the {distinct} that"):
        resized(num_test=distinct - 1, num_examples=2)
