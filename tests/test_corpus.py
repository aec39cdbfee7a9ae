"""Corpora: documents of files and of the hub, how repetitions leave them, and how they are split."""

import itertools
import json
import types

import pytest
from texts import TEXTS, documents

from s5eqx.data import cut, read_corpus, read_tokenizer, unique_paragraphs

# Documents.


def test_blank_documents_are_none():
    assert list(documents("a", "", " \n\t", "b ")) == ["a", "b "]


@pytest.mark.smoke
def test_paragraphs_are_kept_where_they_first_occur():
    given = documents("One.\n\nTwo,\nlines.\n \n  Three.", "Two,\nlines.\n\n\n\nFour.  \n\nFour.\n", "One.\n", "one.")
    found = unique_paragraphs(given)
    assert list(found) == ["One.\n\nTwo,\nlines.\n\n  Three.", "Four.  ", "one."]
    assert list(found) == list(found), "each time anew"
    assert found.fingerprint != given.fingerprint


def test_documents_are_cut_by_number():
    shares = {"validation": 0.05, "test": 0.1}
    parts = {name: list(part) for name, part in cut(documents(*TEXTS), shares).items()}
    assert {name: len(part) for name, part in parts.items()} == {"validation": 2, "test": 4, "train": 34}
    assert sorted(itertools.chain(*parts.values())) == sorted(TEXTS)
    assert all(part == [text for text in TEXTS if text in part] for part in parts.values())
    assert [TEXTS.index(text) for text in parts["test"]] == [2, 11, 20, 21]
    # By number and seed alone: neither the texts nor the length of the blank ones matter.
    again = cut(documents("", *[text.upper() for text in TEXTS], " "), shares)
    assert list(again["test"]) == [text.upper() for text in parts["test"]]
    other = cut(documents(*TEXTS), shares, seed=1)
    assert list(other["test"]) != parts["test"]
    fingerprints = {part.fingerprint for parts in (again, other) for part in parts.values()}
    assert len(fingerprints) == 6


def test_every_part_has_a_document():
    parts = cut(documents("a", "b", "c"), {"validation": 0.05, "test": 0.05})
    assert sorted(itertools.chain(*parts.values())) == ["a", "b", "c"] and all(list(part) for part in parts.values())
    for few in (), ("a", "b"):
        with pytest.raises(ValueError, match=f"for each of validation, test, train; it has {len(few)} with text"):
            list(cut(documents(*few), {"validation": 0.05, "test": 0.05})["train"])
    for shares in {"a": 0.0}, {"a": 0.5, "b": 0.5}:
        with pytest.raises(ValueError, match="shares must be above 0"):
            cut(documents(*TEXTS), shares)


# Local files.


@pytest.fixture
def folder(tmp_path):
    """The same texts as many files, as one `.parquet` and as one `.jsonl`; a name that looks like a pattern."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "deep").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "deep" / f"[{i:02}].txt").write_text(text, encoding="utf-8")
    table = pyarrow.table({"number": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet")
    lines = [json.dumps({"other": "", "text": text}) + "\n" for text in TEXTS]
    (tmp_path / "all.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.mark.smoke
@pytest.mark.parametrize("pattern", ["deep/*.txt", "**/*.txt", "all.parquet", "all.jsonl"])
def test_local_files(folder, pattern):
    corpus = read_corpus(str(folder / pattern))
    expected = cut(documents(*TEXTS), {"validation": 0.05, "test": 0.05})
    for name, part in corpus._asdict().items():
        assert list(part) == list(expected[name])
    assert [len(list(part)) for part in corpus] == [36, 2, 2]


def test_the_fingerprint_of_files_is_of_what_they_hold(folder, tmp_path):
    name = lambda pattern, **options: read_corpus(str(pattern), **options).train.fingerprint
    before = name(folder / "deep/*.txt")
    (folder / "deep").rename(folder / "moved")
    assert name(folder / "moved/*.txt") == before
    file = folder / "moved/[03].txt"
    file.write_text(file.read_text(encoding="utf-8").replace("3", "4", 1), encoding="utf-8")
    assert name(folder / "moved/*.txt") != before
    jsonl = folder / "all.jsonl"
    assert len({name(jsonl), name(jsonl, column="other"), name(jsonl, seed=1), name(jsonl, unique=True)}) == 4


def test_another_column_and_repetitions(folder):
    lines = [json.dumps({"text": None, "body": f"{i}.\n\nAgain."}) + "\n" for i in range(9)]
    (folder / "body.jsonl").write_text("".join(lines))
    parts = read_corpus(str(folder / "body.jsonl"), column="body", unique=True)
    assert sorted(itertools.chain(*parts)) == ["0.\n\nAgain.", *(f"{i}." for i in range(1, 9))]


@pytest.mark.parametrize(
    "name, content, options, complaint",
    [
        ("bad.txt", b"caf\xe9 au lait", {}, r"must be UTF-8, and .*bad\.txt is not"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', {}, r"bad\.jsonl' cannot be read as json"),
        ("bad.parquet", b"PAR0", {}, r"bad\.parquet' cannot be read as parquet"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', {}, "must hold a text; .* has one of None"),
        ("numbers.jsonl", b'{"text": 1}\n', {}, "must hold a text; .* has one of 1"),
        ("other.jsonl", b'{"body": "a", "n": 1}\n', {}, "has no column 'text'; name one of its columns: body, n"),
        ("one.txt", b"a", {}, "it has 1 with text. Give more files"),
        ("empty.txt", b"", {}, "it has 0 with text. Give more files"),
        ("file.csv", b"", {}, r"must all be \.txt, \.parquet, \.jsonl, of one kind; .* matches \.csv"),
        ("*", b"", {}, r"of one kind; .* matches no suffix, \.jsonl, \.parquet"),
        ("none/*.txt", None, {}, "no file matches .*none.* write a pattern such as"),
        ("one.txt", b"a", {"config": "raw"}, "config and revision are for corpora of the hub"),
    ],
)
def test_refused_files(folder, name, content, options, complaint):
    if content is not None:
        (folder / name.replace("*", "file")).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        list(read_corpus(str(folder / name), **options).train)


# The hub, which no test asks.


@pytest.fixture
def hub(monkeypatch):
    """A hub with the corpora `held`; `reachable` can be set to False."""
    import datasets
    import huggingface_hub

    hub = types.SimpleNamespace(reachable=True, held={}, offline=[], asked=[])

    def repo_info(self, name, **_):
        hub.asked.append(name)
        if not hub.reachable:
            raise RuntimeError("no such host")

    def load_dataset(name, config, revision):
        hub.offline.append(datasets.config.HF_HUB_OFFLINE)
        if (name, config) not in hub.held:
            raise datasets.exceptions.DatasetNotFoundError("nothing of that name")
        splits = hub.held[name, config]
        return datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()})

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


@pytest.mark.smoke
def test_a_corpus_of_the_hub_keeps_its_splits(hub):
    hub.held["acme/wiki", "raw"] = {"test": ["", " = A = \n"], "train": ["", " b \n", "", " c \n"], "validation": ["d"]}
    corpus = read_corpus("acme/wiki", config="raw")
    assert [list(part) for part in corpus] == [[" b \n", " c \n"], ["d"], [" = A = \n"]]
    assert len({part.fingerprint for part in corpus}) == 3
    with pytest.raises(ValueError, match="must not be split yet; acme/wiki comes as"):
        read_corpus("acme/wiki", config="raw", unique=True)
    assert hub.offline == [False, False]


def test_missing_splits_are_cut_from_the_first(hub):
    hub.held["books", None] = {"train": TEXTS, "validation": ["v"]}
    corpus = read_corpus("books")
    assert [len(list(part)) for part in corpus] == [38, 1, 2] and list(corpus.validation) == ["v"]
    hub.held["books", None] = {"validation": TEXTS}
    with pytest.raises(ValueError, match="must have a split called train; books has validation"):
        read_corpus("books")
    with pytest.raises(ValueError, match="acme/none cannot be loaded: nothing of that name"):
        read_corpus("acme/none")


def test_without_a_network(hub):
    import datasets

    hub.reachable = False
    with pytest.raises(
        ConnectionError, match=r"cannot be reached .*no such host.*corpus acme/none.*--data 'path/\*.txt'"
    ):
        read_corpus("acme/none")
    hub.held["acme/kept", None] = {"train": TEXTS}
    assert len(list(read_corpus("acme/kept").train)) == 36
    with pytest.raises(ConnectionError, match="which revision"):
        read_corpus("acme/kept", revision="v2")
    assert hub.offline == [True, True] and datasets.config.HF_HUB_OFFLINE is False
    with pytest.raises(ConnectionError, match=r"tokenizer 'acme/none'.*cannot be reached.*tokenizer\.json"):
        read_tokenizer("acme/none")


def test_the_hub_refuses_a_name():
    with pytest.raises(ValueError, match="does not give the dataset 'acme/a--b'"):
        read_corpus("acme/a--b")
