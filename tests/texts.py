"""A small corpus, and what becomes of it done by hand."""

import numpy as np

from s5eqx.data import Documents

TEXTS = [f"Document {i}.\n\nIt says \u201chello\u201d {i % 7} times, é!\n" for i in range(40)]


def documents(*texts):
    return Documents("these", repr(texts), lambda: iter(texts))


def by_hand(texts, tokenizer):
    """The tokens of texts, each with its end."""
    return np.concatenate([np.append(tokenizer.encode([text])[0], tokenizer.end_of_text) for text in texts])
