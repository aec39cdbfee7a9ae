"""Byte-pair encoding that is learned from the corpus itself."""

import hashlib
from pathlib import Path

from s5eqx._typing import checked
from s5eqx.data._cache import cache_folder, one_at_a_time, written_whole
from s5eqx.data.documents import Documents
from s5eqx.data.tokenizer import END_OF_TEXT, Subwords, read_tokenizer


@checked
def train_bpe(
    documents: Documents, vocab_size: int, *, cache: str | Path | None = None, progress: bool = True
) -> Subwords:
    """A byte-level BPE tokenizer of `vocab_size` tokens, or fewer where the documents give no more.

    The first token is end-of-text, the next 256 are the bytes, so that every text can be encoded and decodes to itself.
    The same documents give the same tokenizer, which the cache keeps. Give it what the model is trained on, not what it
    is tested on.

    Source: Sennrich et al. (arXiv 1508.07909), with bytes for letters as in GPT-2.

    **Arguments:**

    - `vocab_size`: at least 257.
    - `cache`, `progress`: as for `tokenize`.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, the bytes and end-of-text; got {vocab_size}")
    key = hashlib.blake2b(f"{documents.fingerprint} {vocab_size}".encode(), digest_size=16).hexdigest()
    path = cache_folder(cache) / f"bpe-{key}.json"
    with one_at_a_time(path.with_suffix(".lock")):
        if not path.exists():
            text = _train(documents, vocab_size, progress)
            with written_whole(path) as file:
                file.write(text.encode())
    return read_tokenizer(path)


def _train(documents, vocab_size, progress):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(iter(documents), trainer, length=documents.at_most)
    return tokenizer.to_str()
