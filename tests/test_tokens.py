"""Tokenisers, and the cache of tokens."""

import json
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import TEXTS, by_hand, documents

from s5eqx.data import AbstractTokenizer, Bytes, Documents, Subwords, read_tokenizer, tokenize, train_bpe

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(documents(*TEXTS), 300, cache=tmp_path_factory.mktemp("bpe"), progress=False)


def unreadable(like):
    """The same documents to the cache, which must not be read again."""

    def read():
        raise AssertionError("read again")

    return Documents(like.name, like.fingerprint, read)


# Tokenisers.


@given(st.lists(st.text(max_size=20), max_size=2))
@settings(max_examples=30, deadline=None)
def test_texts_survive(bpe, texts):
    for tokenizer in (Bytes(), bpe):
        for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
            assert tokenizer.decode(tokens) == text
            assert np.all(tokens < tokenizer.vocab_size) and np.all(tokens != tokenizer.end_of_text)


def test_end_of_text_comes_from_no_text(bpe, tmp_path):
    import tokenizers

    bpe.save(tmp_path / "tokenizer.json")
    ordinary = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ordinary.add_tokens(["[END]"])
    for tokenizer in (Bytes(), bpe, Subwords(ordinary, end_of_text="[END]")):
        spelled = tokenizer.decode([tokenizer.end_of_text])
        [tokens] = tokenizer.encode([f"a{spelled}b"])
        assert len(tokens) > 3 and tokenizer.end_of_text not in tokens
        joined = [*tokens, tokenizer.end_of_text, *tokens, tokenizer.end_of_text]
        assert tokenizer.decode(joined) == f"a{spelled}b{spelled}" * 2


def test_bytes():
    tokenizer = Bytes()
    assert tokenizer.vocab_size == 257
    [tokens] = tokenizer.encode(["hé"])
    np.testing.assert_array_equal(tokens, [104, 195, 169])
    assert tokenizer.decode([195, 256, 104]) == f"\ufffd{END}h" and tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match=r"in \[0, 257\) to be decoded; got 257"):
        tokenizer.decode([3, 257])


@pytest.mark.smoke
def test_bpe_is_learned_once_and_saved(bpe, tmp_path):
    assert bpe.vocab_size == 300 and len(bpe.encode(TEXTS[:1])[0]) < len(TEXTS[0]) / 2
    again = train_bpe(documents(*TEXTS), 300, cache=tmp_path, progress=False)
    assert again.fingerprint == bpe.fingerprint
    kept = train_bpe(unreadable(documents(*TEXTS)), 300, cache=tmp_path, progress=False)
    assert kept.fingerprint == bpe.fingerprint
    other = train_bpe(documents(*TEXTS), 299, cache=tmp_path, progress=False)
    assert other.vocab_size == 299 and other.fingerprint != bpe.fingerprint
    bpe.save(tmp_path / "tokenizer.json")
    assert read_tokenizer(tmp_path / "tokenizer.json").fingerprint == bpe.fingerprint
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_bpe(documents(*TEXTS), 256, cache=tmp_path)


def word_level(tmp_path, *special):
    """A tokenizer.json of words that cuts, pads and frames what it is given."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[S]": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="[S] $A", special_tokens=[("[S]", 4)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_a_tokenizer_of_another_kind(tmp_path):
    path = word_level(tmp_path, "[S]")
    with pytest.raises(ValueError, match=r"has no '<\|endoftext\|>'; name it by end_of_text=.* are: '\[S\]'"):
        read_tokenizer(path)
    tokenizer = read_tokenizer(path, end_of_text="[S]")
    assert [list(tokens) for tokens in tokenizer.encode(["a b b a", "", "b c"])] == [[1, 2, 2, 1], [], [2, 0]]
    with pytest.raises(ValueError, match=r"no text may give the end-of-text token '\[S\]', and one spells it out"):
        tokenizer.encode(["a", "b [S]"])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, 4)
    assert read_tokenizer(path, end_of_text="a").fingerprint != tokenizer.fingerprint


def test_refused_tokenizers(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json of the"):
        read_tokenizer(tmp_path / "tokenizer.json")
    for missing in "none.json", "a/b/c":
        with pytest.raises(ValueError, match="no file is"):
            read_tokenizer(missing)


@pytest.mark.smoke
def test_a_tokenizer_of_the_hub(bpe, tmp_path, monkeypatch):
    import huggingface_hub

    bpe.save(tmp_path / "found.json")
    asked = []
    download = lambda name, file, **how: asked.append((name, file, how)) or str(tmp_path / "found.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_tokenizer("gpt2").fingerprint == bpe.fingerprint
    assert asked == [("gpt2", "tokenizer.json", {"local_files_only": True})]


# The cache.


class Wide(AbstractTokenizer):
    """The code points of a text, of which there are too many for 16 bits."""

    vocab_size, end_of_text, fingerprint = 2**17, 2**17 - 1, "wide"

    def encode(self, texts):
        return [np.array([ord(letter) for letter in text], np.int64) for text in texts]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@pytest.mark.smoke
@pytest.mark.parametrize("tokenizer, dtype", [(Bytes(), np.uint16), (Wide(), np.uint32)])
def test_documents_are_tokenised_once(tmp_path, monkeypatch, tokenizer, dtype, capfd):
    monkeypatch.setattr("s5eqx.data.tokens._BATCH", 100)
    texts = [*TEXTS, "", "😀" * 300]
    found = tokenize(documents(*texts), tokenizer, cache=tmp_path / "new" / "folder")
    assert isinstance(found.array, np.memmap) and found.array.dtype == dtype
    np.testing.assert_array_equal(found.array, by_hand([*TEXTS, texts[-1]], tokenizer))
    assert (found.documents, found.bytes) == (41, sum(len(text.encode()) for text in texts))
    assert found.bits_per_byte(np.log(2)) == len(found.array) / found.bytes
    [note] = (tmp_path / "new" / "folder").glob("*.json")
    note = json.loads(note.read_bytes())
    assert note["counts"] == {"documents": 41, "tokens": len(found.array), "bytes": found.bytes}
    assert note["documents"] == documents(*texts).fingerprint and note["tokenizer"] == tokenizer.fingerprint
    out, err = capfd.readouterr()
    assert not out and "41 documents" in err and "tokenise these" in err
    again = tokenize(unreadable(documents(*texts)), tokenizer, cache=tmp_path / "new" / "folder", progress=False)
    np.testing.assert_array_equal(again.array, found.array)
    assert again[1:] == found[1:]


def test_other_documents_and_other_tokenisers_have_other_files(tmp_path, bpe, monkeypatch, capfd):
    monkeypatch.setenv("S5EQX_CACHE", str(tmp_path))
    for texts in ("a b",), ("a", "b"):
        for tokenizer in (Bytes(), Wide(), bpe):
            found = tokenize(documents(*texts), tokenizer, progress=False)
            np.testing.assert_array_equal(found.array, by_hand(texts, tokenizer))
    assert len(list(tmp_path.glob("*.bin"))) == 6
    assert capfd.readouterr() == ("", "")


def test_a_writer_that_dies_leaves_nothing(tmp_path):
    def read():
        yield from TEXTS[:20]
        if not alive:
            raise KeyboardInterrupt
        yield from TEXTS[20:]

    alive = False
    given = Documents("these", "id", read)
    with pytest.raises(KeyboardInterrupt):
        tokenize(given, Bytes(), cache=tmp_path, progress=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    # One that is killed leaves a part, or the tokens without the note that comes last.
    alive = True
    found = tokenize(given, Bytes(), cache=tmp_path, progress=False)
    [path] = tmp_path.glob("*.bin")
    path.with_suffix(".json").unlink()
    path.write_bytes(b"half")
    left = [path.with_name(f".{path.name}.{name}.part") for name in ("young", "old")]
    for part in left:
        part.write_bytes(b"half")
    os.utime(left[1], (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = tokenize(given, Bytes(), cache=tmp_path, progress=False)
    np.testing.assert_array_equal(again.array, by_hand(TEXTS, Bytes()))
    assert len(found.array) == len(again.array)
    assert [part.exists() for part in left] == [True, False], "another process may still be at work on the young one"


def test_an_altered_file_is_made_again(tmp_path):
    tokenize(documents(*TEXTS), Bytes(), cache=tmp_path, progress=False)
    [path] = tmp_path.glob("*.bin")
    whole = path.read_bytes()
    for altered in whole[:-2], whole + b"1", b"":
        path.write_bytes(altered)
        with pytest.warns(UserWarning, match=r"tokens-.*\.bin does not have the length .* made again"):
            found = tokenize(documents(*TEXTS), Bytes(), cache=tmp_path, progress=False)
        np.testing.assert_array_equal(found.array, by_hand(TEXTS, Bytes()))
    assert path.read_bytes() == whole


def test_two_at_once(tmp_path):
    """Whoever comes second waits, and reads what the first has made."""
    ready, reads, results = threading.Barrier(2), [], {}

    def read():
        reads.append(1)
        for text in TEXTS:
            threading.Event().wait(0.002)
            yield text

    def run(name):
        ready.wait()
        results[name] = tokenize(Documents("these", "id", read), Bytes(), cache=tmp_path, progress=False)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(reads) == 1
    for name in "ab":
        np.testing.assert_array_equal(results[name].array, by_hand(TEXTS, Bytes()))


def test_two_at_once_without_locks(tmp_path, monkeypatch):
    """One writes the whole file while the other is in the middle of it."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    found = []

    def read(outer):
        for number, text in enumerate(TEXTS):
            if outer and number == 20:
                inner = Documents("these", "id", lambda: read(False))
                found.append(tokenize(inner, Bytes(), cache=tmp_path, progress=False))
            yield text

    found.append(tokenize(Documents("these", "id", lambda: read(True)), Bytes(), cache=tmp_path, progress=False))
    for tokens in found:
        np.testing.assert_array_equal(tokens.array, by_hand(TEXTS, Bytes()))
    assert len(found) == 2 and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_another_process_learns_the_same_and_imports_late(bpe, tmp_path):
    program = f"""
import sys
from s5eqx.data import Documents, train_bpe
assert not {{"datasets", "tokenizers", "tqdm", "huggingface_hub"}} & set(sys.modules), "imported too early"
texts = {TEXTS!r}
print(train_bpe(Documents("", "", lambda: iter(texts)), 300, cache={str(tmp_path)!r}, progress=False).fingerprint)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == bpe.fingerprint
