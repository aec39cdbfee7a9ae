"""Tokenisers: texts to numbers and back."""

import abc
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s5eqx._typing import Array, Integer, checked
from s5eqx.data._hub import hub_tokenizer

if TYPE_CHECKING:
    import tokenizers  # imported where it is used: the library does without it

END_OF_TEXT = "<|endoftext|>"


class AbstractTokenizer(abc.ABC):
    """Texts to tokens `0` to `vocab_size - 1`, one of which stands for the end of a text and for nothing else.

    No text gives `end_of_text`, not even one that spells it out: what is spelled out becomes letters. Whoever joins
    texts puts `end_of_text` after each. `fingerprint` differs where the tokens of some text do.
    """

    vocab_size: int
    end_of_text: int
    fingerprint: str

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Integer[np.ndarray, " _"]]:
        """The tokens of each text."""

    @abc.abstractmethod
    def decode(self, tokens: Integer[Array, " L"] | Sequence[Any]) -> str:
        """The text of tokens, for reading. `end_of_text` is spelled out."""


class Bytes(AbstractTokenizer):
    """The bytes of a text's UTF-8, and 256 for its end. Bytes that are no UTF-8 decode to `\\ufffd`."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = "bytes"

    @checked
    def encode(self, texts: Sequence[str]) -> list[Integer[np.ndarray, " _"]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    @checked
    def decode(self, tokens: Integer[Array, " L"] | Sequence[Any]) -> str:
        tokens = _inside(tokens, self.vocab_size)
        texts = np.split(tokens, np.flatnonzero(tokens == self.end_of_text))
        # All texts but the first begin with the end of the one before.
        parts = [texts[0], *(text[1:] for text in texts[1:])]
        return END_OF_TEXT.join(part.astype(np.uint8).tobytes().decode(errors="replace") for part in parts)


class Subwords(AbstractTokenizer):
    """A tokenizer of the `tokenizers` library, without the special tokens that it might add around a text.

    A text is encoded whole, at about 200 bytes of memory a token while it is.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", *, end_of_text: str = END_OF_TEXT):
        """`end_of_text` is the token that ends a text, as the vocabulary spells it."""
        token = tokenizer.token_to_id(end_of_text)
        if token is None:
            added = tokenizer.get_added_tokens_decoder().values()
            special = ", ".join(repr(other.content) for other in added if other.special)
            raise ValueError(
                f"a tokenizer must have a token that ends a text, and this one has no {end_of_text!r}; name it by "
                f"end_of_text=... Its special tokens are: {special or 'none'}."
            )
        own = type(tokenizer).from_str(tokenizer.to_str())
        own.no_padding()
        own.no_truncation()
        own.add_special_tokens([end_of_text])
        own.encode_special_tokens = True  # that is, as the letters that a text spells them with
        self.vocab_size = max(own.get_vocab().values()) + 1
        self.end_of_text = token
        self.fingerprint = hashlib.blake2b(f"{own.to_str()} {token}".encode(), digest_size=16).hexdigest()
        self._tokenizer = own

    @checked
    def encode(self, texts: Sequence[str]) -> list[Integer[np.ndarray, " _"]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        if any(np.any(tokens == self.end_of_text) for tokens in found):
            raise ValueError(
                f"no text may give the end-of-text token {self._tokenizer.id_to_token(self.end_of_text)!r}, and one "
                "spells it out, which this tokenizer cannot read as letters. Change the text, or name another token."
            )
        return found

    @checked
    def decode(self, tokens: Integer[Array, " L"] | Sequence[Any]) -> str:
        tokens = _inside(tokens, self.vocab_size)
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`."""
        self._tokenizer.save(str(path))


@checked
def read_tokenizer(source: str | Path, *, end_of_text: str = END_OF_TEXT) -> Subwords:
    """The tokenizer of a `tokenizer.json`, or of a model on the Hugging Face hub: `gpt2` has 50,257 tokens.

    **Raises:** `ValueError` for what is not there or is no tokenizer, `ConnectionError` where the hub is out of reach
    and the tokenizer is not in its cache.
    """
    from tokenizers import Tokenizer

    path = Path(source).expanduser()
    if not path.is_file():
        if path.suffix == ".json" or len(path.parts) > 2:
            raise ValueError(
                f"a tokenizer is a file tokenizer.json or the name of a model on the hub; no file is {path}"
            )
        path = hub_tokenizer(str(source))
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as problem:  # the library raises nothing more special
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {problem}") from problem
    return Subwords(tokenizer, end_of_text=end_of_text)


def _inside(tokens, vocab_size):
    tokens = np.asarray(tokens, np.int64)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise ValueError(f"tokens must lie in [0, {vocab_size}) to be decoded; got {outside[0]}")
    return tokens
