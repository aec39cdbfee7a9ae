"""Language modelling: windows of a long array of tokens."""

import functools

import numpy as np

from s5eqx._typing import Array, Int, Integer, checked
from s5eqx.data._random_order import EPOCH, OFFSET, random_bits, random_order
from s5eqx.data._task import AbstractCorpus, Batch


class Text(AbstractCorpus):
    """Windows of `length` tokens, each to be continued by the next token.

    In training, every epoch cuts the tokens anew into windows side by side, from an offset below `length` that is drawn
    for it, and goes through them in an order that is drawn for it. Fewer than 2 `length` tokens, at the two ends, are
    left out of an epoch.

    Evaluation goes through the whole of the other array, window by window without overlap, so that every token but the
    first is predicted once. What the last window lacks has weight 0. For WikiText-103 as `read_corpus` gives it, with
    the 50,257 tokens of `gpt2` and windows of 1,024, the exponential of the mean loss a token is then the perplexity of
    the literature. There the end-of-text after each line that is not empty is a token like others, and the first tokens
    of a window have little to go by.

    Example i is a function of the arrays, of `seed` and of i; only its own tokens are read, wherever the arrays lie.

    **Arguments:**

    - `training`, `evaluated`: tokens, in memory or mapped into it.
    - `length`: L, the number of inputs of a window.
    - `seed`: chooses offsets and orders.
    - `split`: what logs call the evaluated part.
    - `reset_at`: the end-of-text token, if documents in a window are not to see each other. Where it is an input, a new
      sequence is flagged, of which it is the first token; it is predicted all the same, by the document that it ends.
      `None`: a window is one sequence.
    - `vocab_size`: the model's V, if all tokens are to be looked at and to be refused from there on.
    """

    split: str

    @checked
    def __init__(
        self,
        training: Integer[np.ndarray, " n"],
        evaluated: Integer[np.ndarray, " m"],
        *,
        length: int,
        seed: int = 0,
        split: str = "validation",
        reset_at: int | None = None,
        vocab_size: int | None = None,
    ):
        if length < 1:
            raise ValueError(f"length must be at least 1 token, got {length}")
        if len(training) <= length:
            raise ValueError(
                f"the text to train on must have {length + 1} tokens at least, a window of length {length} and the "
                f"token after it; it has {len(training)}. Give more text or a smaller length."
            )
        if len(evaluated) < 2:
            raise ValueError(
                f"the text of the {split} part must have 2 tokens at least, one of them to be predicted; it has "
                f"{len(evaluated)}. Give more text."
            )
        if vocab_size is not None:
            _check_vocabulary("training", training, vocab_size)
            _check_vocabulary(split, evaluated, vocab_size)
        random_bits(seed, OFFSET, 0, 0)  # refuses a seed that is none
        self.training, self.evaluated = training, evaluated
        self.sequence_length, self.seed, self.split, self.reset_at = length, seed, split, reset_at
        # An epoch leaves out the rest of the division and one window more, and so has `length` places to begin at.
        self.num_windows = max(1, len(training) // length - 1)
        self.num_test = -(-(len(evaluated) - 1) // length)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def on(self, tokens: Integer[np.ndarray, " n"], *, split: str) -> "Text":
        """The same training data, evaluated on other tokens."""
        return Text(
            self.training, tokens, length=self.sequence_length, seed=self.seed, split=split, reset_at=self.reset_at
        )

    @checked
    def train(self, indices: Int[Array, " B"]) -> Batch:
        indices = _indices(indices)
        epochs, places = np.divmod(indices, self.num_windows)
        starts = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            offset, order = self._epoch(int(epoch))
            starts[here] = offset + self.sequence_length * order[places[here]]
        windows = np.lib.stride_tricks.sliding_window_view(self.training, self.sequence_length + 1)[starts]
        return self._batch(windows, np.ones((len(indices), self.sequence_length), np.float32))

    @checked
    def test(self, indices: Int[Array, " B"]) -> Batch:
        places = self.sequence_length * _indices(indices)[:, None] + np.arange(self.sequence_length + 1)
        weights = places[:, 1:] < len(self.evaluated)
        windows = self.evaluated[np.minimum(places, len(self.evaluated) - 1)]
        return self._batch(windows, weights.astype(np.float32))

    def _batch(self, windows, weights):
        tokens = np.asarray(windows, np.int32)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        resets = None if self.reset_at is None else inputs == self.reset_at
        return Batch(inputs, targets, weights, resets)

    def _draw_epoch(self, epoch):
        """Where the windows of an epoch begin: the first of them in the array, and their order."""
        offsets = min(self.sequence_length, len(self.training) - self.num_windows * self.sequence_length)
        offset = int(random_bits(self.seed, OFFSET, epoch, 1)[0] % np.uint64(offsets))
        return offset, random_order(self.seed, EPOCH, epoch, self.num_windows)


def _indices(indices):
    indices = np.asarray(indices, np.int64)
    if np.any(indices < 0):
        raise ValueError(f"examples are counted from 0; got {indices.min()}")
    return indices


def _check_vocabulary(name, tokens, vocab_size, chunk=2**24):
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        least, largest = int(piece.min()), int(piece.max())
        if least < 0 or largest >= vocab_size:
            raise ValueError(
                f"the {name} part must have tokens in [0, {vocab_size}), the model's vocabulary; it has "
                f"{least if least < 0 else largest}. Build the model with the tokenizer's vocab_size."
            )
