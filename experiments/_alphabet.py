"""What a prompt is as tokens, and how tokens are written as they come: as numbers, as bytes, or by a tokenizer."""

import abc
import codecs

from s5eqx.data import AbstractTokenizer


class AbstractAlphabet(abc.ABC):
    """Reads prompts of bytes, and writes tokens one by one. What is not a whole character yet waits for the rest."""

    @abc.abstractmethod
    def read(self, prompt: bytes) -> list[int]:
        """The tokens of a prompt."""

    @abc.abstractmethod
    def write(self, token: int) -> str:
        """What can be shown now that this token has come."""

    @abc.abstractmethod
    def end(self) -> str:
        """What still waits."""


class Numbers(AbstractAlphabet):
    """Numbers of tokens with spaces between them."""

    def __init__(self):
        self._space = ""

    def read(self, prompt: bytes) -> list[int]:
        try:
            return [int(word) for word in prompt.split()]
        except ValueError as error:
            raise ValueError(f"with --ids a prompt must be integers with spaces between them: {error}") from error

    def write(self, token: int) -> str:
        text, self._space = f"{self._space}{token}", " "
        return text

    def end(self) -> str:
        return ""


class Utf8(AbstractAlphabet):
    """A token a byte; tokens beyond the bytes are written as numbers."""

    def __init__(self):
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self, prompt: bytes) -> list[int]:
        return list(prompt)

    def write(self, token: int) -> str:
        return self._decode(bytes([token])) if token < 256 else f"{self.end()}<{token}>"

    def end(self) -> str:
        return self._decode(b"", True)


class Words(AbstractAlphabet):
    """The tokens of a tokenizer; those that it does not have are written as numbers.

    What tokens mean can depend on those before them, so that each is decoded together with the ones shown last.
    """

    def __init__(self, tokenizer: AbstractTokenizer):
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def read(self, prompt: bytes) -> list[int]:
        try:
            self._shown = self._tokenizer.encode([prompt.decode()])[0].tolist()
        except UnicodeDecodeError as error:
            raise ValueError(f"with --tokenizer a prompt must be UTF-8: {error}") from error
        return self._shown

    def write(self, token: int) -> str:
        if token >= self._tokenizer.vocab_size:
            return f"{self.end()}<{token}>"
        self._waiting.append(token)
        text = self._new()
        return "" if text.endswith("\ufffd") else self._show(text)

    def end(self) -> str:
        return self._show(self._new())

    def _new(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(before) :]

    def _show(self, text: str) -> str:
        self._shown, self._waiting = self._waiting, []
        return text
