"""The script that generates: as text, as numbers, by a tokenizer."""

import importlib
import io
import itertools
import json
import sys

import jax.random as jr
import numpy as np
import pytest
import tyro
from scripts import ROOT, run

from s5eqx import nn
from s5eqx.data import Documents, train_bpe
from s5eqx.generate import generate
from s5eqx.interop import save
from s5eqx.models import LanguageModel
from s5eqx.samplers import Chain, Temperature, TopK


@pytest.fixture
def asked(monkeypatch, capsys):
    """Calls `generate.py`, or another function in place of its `stream`; returns what it prints and its last line."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    script = importlib.import_module("generate")

    def ask(*words, stream=script.stream):
        monkeypatch.setattr(script, "stream", stream)
        script.main(tyro.cli(script.Settings, args=[str(word) for word in words]))
        output, errors = capsys.readouterr()
        return output, json.loads(errors.splitlines()[-1])

    return ask


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A model of bytes with random weights, and its file."""
    mixer = lambda key: nn.ShortConv(8, 3, key=key)
    model = LanguageModel(256, 8, mixer, num_layers=1, mlp_width=8, key=jr.key(1))
    file = tmp_path_factory.mktemp("speaker") / "model.safetensors"
    save(file, model)
    return model, file


def test_generate_writes_what_the_model_generates(speaker, asked, monkeypatch):
    model, file = speaker
    words = "--num-tokens", 40, "--temperature", 0.7, "--top-k", 50, "--seed", 3
    prompt = np.array([*"Hé".encode()])
    sampler = Chain(Temperature(0.7), TopK(50))
    tokens, log_probs, _ = generate(model, prompt, 40, key=jr.key(3), sampler=sampler)

    text, summary = asked(file, "Hé", *words)
    assert text == bytes(tokens.tolist()).decode(errors="replace") + "\n"
    assert summary["tokens"] == 40 and summary["tokens_per_second"] > 0
    assert summary["log_prob"] == pytest.approx(np.mean(log_probs))
    assert summary["settings"]["top_k"] == 50

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"72 195\n169 ")))
    numbers, _ = asked(file, "-", "--ids", *words, "--every", 8)
    assert numbers == " ".join(map(str, tokens)) + "\n"
    numbers, _ = asked(file, "72 195 169", "--ids", *words, "--stop", tokens[5])
    assert [int(n) for n in numbers.split()] == tokens[: list(tokens).index(tokens[5]) + 1].tolist()


def test_generate_writes_whole_characters_until_ctrl_c(speaker, asked, monkeypatch):
    written = []

    def stream(*given, **options):
        for token in [*"né".encode(), 258, *"日本".encode()[:-1]]:
            written.append(sys.stdout.getvalue())
            yield token, -0.5
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    _, summary = asked(speaker[1], "x", stream=stream)
    assert written == ["", "n", "n", "né", "né<258>", "né<258>", "né<258>", "né<258>日", "né<258>日"]
    assert sys.stdout.getvalue() == "né<258>日\ufffd\n"
    assert summary["tokens"] == 9 and summary["log_prob"] == -0.5


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A tokenizer of the bytes and some words, and its file."""
    documents = Documents("these", "these", lambda: iter(["né a 日本 model of the state, the state of a model"] * 9))
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = train_bpe(documents, 262, cache=folder, progress=False)
    tokenizer.save(folder / "tokenizer.json")
    return tokenizer, folder / "tokenizer.json"


def test_generate_reads_and_writes_by_a_tokenizer(reader, asked, monkeypatch, tmp_path):
    tokenizer, file = reader
    model = LanguageModel(300, 8, lambda key: nn.ShortConv(8, 3, key=key), num_layers=1, mlp_width=8, key=jr.key(1))
    save(tmp_path / "model", model)
    prompt, *parts = tokenizer.encode(["Hé, the model", " né state 日本", "日"])
    given, written = [], []

    def stream(model, prompt, num_tokens, **options):
        given.append(prompt.tolist())
        for token in [*parts[0].tolist(), 299, 0, *parts[1][:-1].tolist()]:
            written.append(sys.stdout.getvalue())
            yield token, -0.5

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    asked(tmp_path / "model", "Hé, the model", "--tokenizer", file, stream=stream)
    assert given == [prompt.tolist()] and len(prompt) < len("Hé, the model".encode())
    assert sys.stdout.getvalue() == " né state 日本<299><|endoftext|>\ufffd\n"
    pieces = [after[len(before) :] for before, after in itertools.pairwise(written)]
    assert "".join(pieces) == " né state 日本<299><|endoftext|>" and "\ufffd" not in "".join(written)
    assert max(map(len, pieces[:-2])) < 8, "it comes in pieces"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "words, complaint",
    [
        (["nowhere.safetensors", "x"], "nowhere.safetensors is no file"),
        (["{tmp}/layer", "x"], "must hold a language model, it holds a ShortConv"),
        (["{tmp}/small", "x"], "has 4 tokens; use --ids"),
        (["{tmp}/small", "1 4", "--ids"], r"must lie in \[0, 4\); got 4"),
        (["{tmp}/small", "1", "--ids", "--stop", "9"], r"must lie in \[0, 4\); got 9"),
        (["{tmp}/small", "1 a", "--ids"], "must be integers"),
        (["{tmp}/small", " ", "--ids"], "at least one token, got none"),
        (["{tmp}/small", "1", "--ids", "--greedy", "--top-k", "3"], "greedy draws nothing"),
        (["{tmp}/small", "1", "--ids", "--top-p", "0"], "p must lie in"),
        (["{tmp}/small", "x", "--tokenizer", "{tokenizer}"], "must have at most the 4 tokens of the model"),
        (["{tmp}/small", "x", "--tokenizer", "no.json"], "no file is no.json"),
        (["{tmp}/small", "1", "--ids", "--tokenizer", "{tokenizer}"], "leave out one of the two"),
    ],
)
def test_generate_refuses(words, complaint, asked, reader, tmp_path):
    mixer = lambda key: nn.ShortConv(8, 3, key=key)
    save(tmp_path / "small", LanguageModel(4, 8, mixer, num_layers=1, mlp_width=8, key=jr.key(1)))
    save(tmp_path / "layer", mixer(jr.key(1)))
    with pytest.raises(ValueError, match=complaint):
        asked(*[word.format(tmp=tmp_path, tokenizer=reader[1]) for word in words])


def test_generate_complains_in_one_line(tmp_path):
    code, output, errors = run(ROOT / "experiments/generate.py", "nowhere", "x", folder=tmp_path)
    assert code != 0 and not output and errors == "error: load reads a file that `save` wrote; nowhere is no file.\n"
