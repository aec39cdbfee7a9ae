"""Windows of text: which tokens a batch holds, and how files become a task."""

import tracemalloc

import numpy as np
import pytest
from texts import TEXTS, by_hand, documents

from s5eqx.data import Bytes, Splits, Text, load_text, read_corpus

# Windows.


def a_text(count=1000, length=16, evaluated=None, **options):
    tokens = (np.arange(count) * 7919 % 65_521).astype(np.uint16)
    return Text(tokens, tokens if evaluated is None else evaluated, length=length, **options)


def positions(text, batch):
    """Where in `a_text` the windows of a batch begin; each must be a piece of it."""
    windows = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
    np.testing.assert_array_equal(batch.targets, windows[:, 1:])
    starts = np.array([np.flatnonzero(text.training == first)[0] for first in windows[:, 0]])
    np.testing.assert_array_equal(windows, text.training[starts[:, None] + np.arange(text.sequence_length + 1)])
    return starts


def test_an_example_is_always_the_same():
    """As it was when this test was written, in any process, whatever was asked for before."""
    text = a_text(seed=3)
    assert text.num_windows == 61
    indices = np.array([0, 1, 60, 61, 62, 6_100_000_000])
    expected = [58, 586, 666, 504, 904, 851]
    np.testing.assert_array_equal(positions(text, text.train(indices)), expected)
    for i, start in reversed(list(zip(indices, expected, strict=True))):
        assert positions(text, text.train(np.array([i]))) == start
    assert text.train(indices).inputs.dtype == np.int32
    assert np.any(positions(text, a_text(seed=4).train(indices)) != expected)


@pytest.mark.smoke
@pytest.mark.parametrize("count", [17, 31, 32, 33, 1000])
def test_an_epoch_goes_through_every_window_once(count):
    text, orders, offsets = a_text(count, seed=1), [], set()
    for epoch in range(12):
        batch = text.train(epoch * text.num_windows + np.arange(text.num_windows))
        starts = positions(text, batch)
        assert np.all(batch.weights == 1) and batch.resets is None
        np.testing.assert_array_equal(np.diff(np.sort(starts)), 16)
        assert starts.min() < 16 and count - (starts.max() + 17) < 32
        orders.append(tuple(starts - starts.min()))
        offsets.add(starts.min())
    if count == 1000:
        assert len(set(orders)) == 12 and len(offsets) > 4
    assert len(offsets) > 1 or count == 17


@pytest.mark.parametrize("count", [2, 16, 17, 18, 49, 100])
def test_evaluation_predicts_every_token_but_the_first_once(count):
    tokens = np.arange(100, 100 + count, dtype=np.uint32)
    text = a_text(evaluated=tokens)
    batch = text.test(np.arange(text.num_test + 3))
    np.testing.assert_array_equal(batch.targets[batch.weights == 1], tokens[1:])
    np.testing.assert_array_equal(batch.inputs[batch.weights == 1], tokens[:-1])
    assert np.all(batch.weights[-3:] == 0) and np.sum(batch.weights) == count - 1
    assert np.all(np.any(batch.weights[:-3] > 0, axis=1))
    np.testing.assert_array_equal(text.test(np.array([0])).inputs, batch.inputs[:1])


def test_the_same_on_another_split():
    text = a_text(seed=5, reset_at=2)
    other = text.on(np.arange(7, dtype=np.uint16), split="test")
    assert (text.split, text.num_test, other.split, other.num_test) == ("validation", 63, "test", 1)
    first, second = (t.train(np.arange(9)) for t in (text, other))
    np.testing.assert_array_equal(first.inputs, second.inputs)
    assert np.argmax(other.test(np.array([0])).resets) == 2


@pytest.mark.smoke
def test_a_document_begins_with_the_end_of_the_one_before():
    tokens = np.array([5, 6, 9, 7, 9, 9, 8, 5, 9], np.uint16)
    text = Text(tokens, tokens, length=4, reset_at=9)
    batch = text.test(np.arange(2))
    np.testing.assert_array_equal(batch.inputs, [[5, 6, 9, 7], [9, 9, 8, 5]])
    np.testing.assert_array_equal(batch.resets, [[False, False, True, False], [True, True, False, False]])
    assert np.all(batch.weights == 1), "the end of a document is predicted all the same"
    batch = text.train(np.arange(30))
    np.testing.assert_array_equal(batch.resets, batch.inputs == 9)


def test_only_the_tokens_of_a_batch_are_read(tmp_path):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(2**27)
    tokens = np.memmap(path, np.uint16, mode="r")
    text = Text(tokens, tokens, length=2**16)
    tracemalloc.start()
    text.train(np.arange(3)), text.test(np.arange(3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


TOKENS = np.arange(100, dtype=np.uint16)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (
            lambda: Text(TOKENS[:0], TOKENS, length=4),
            r"must have 5 tokens at least.*it has 0\. Give more text or a smal",
        ),
        (lambda: Text(TOKENS[:16], TOKENS, length=16), "must have 17 tokens at least.*it has 16"),
        (lambda: Text(TOKENS, TOKENS[:1], length=16), "the validation part must have 2 tokens at least.*it has 1"),
        (lambda: Text(TOKENS, TOKENS, length=0), "length must be at least 1"),
        (lambda: Text(TOKENS, TOKENS, length=4, seed=-1), "seed must be an integer from 0"),
        (lambda: Text(TOKENS, TOKENS, length=4, vocab_size=99), r"training part must have tokens in \[0, 99\).*has 99"),
        (lambda: Text(TOKENS, np.array([0, -1]), length=4, vocab_size=100), "validation part must.*it has -1"),
        (lambda: a_text().train(np.array([-1])), "counted from 0; got -1"),
        (lambda: a_text().test(np.array([3, -2])), "counted from 0; got -2"),
    ],
)
def test_refused_windows(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_all_tokens_of_the_vocabulary_are_allowed():
    assert Text(TOKENS, TOKENS, length=99, vocab_size=100).num_windows == 1


# From files to tasks.


@pytest.mark.smoke
def test_files_to_tasks(tmp_path, capfd):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02}.txt").write_text(text, encoding="utf-8")
    corpus = read_corpus(str(tmp_path / "*.txt"))
    text = load_text(corpus, Bytes(), length=32, seed=2, packed=True, cache=tmp_path / "cache", progress=False)
    assert (text.task.split, text.test.split) == ("validation", "test")
    for part, task in {"validation": text.task, "test": text.test}.items():
        np.testing.assert_array_equal(task.evaluated, by_hand(list(getattr(corpus, part)), Bytes()))
        batch = task.test(np.arange(task.num_test))
        assert np.sum(batch.weights) == len(text.tokens[part].array) - 1
        assert np.sum(batch.targets[batch.weights > 0] == 256) == text.tokens[part].documents == 2
    np.testing.assert_array_equal(text.task.training, by_hand(list(corpus.train), Bytes()))
    batches = [task.train(np.arange(40)) for task in text[:2]]
    np.testing.assert_array_equal(batches[0].inputs, batches[1].inputs)
    assert np.any(batches[0].resets)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "texts, options, complaint",
    [
        ([TEXTS[:9]] * 3, {"vocab_size": 256}, "vocab_size must be at least 257, the tokenizer's; it is 256"),
        ([["a few"], ["b"], ["c"]], {}, "must have 33 tokens at least.*it has 6"),
        ([TEXTS[:9], [], ["c"]], {}, "the validation part must have 2 tokens at least.*it has 0"),
        ([TEXTS[:9], ["b"], []], {}, "the test part must have 2 tokens at least.*it has 0"),
    ],
)
def test_refused_corpora(tmp_path, texts, options, complaint):
    corpus = Splits(*(documents(*part) for part in texts))
    with pytest.raises(ValueError, match=complaint):
        load_text(corpus, Bytes(), length=32, cache=tmp_path, progress=False, **options)
