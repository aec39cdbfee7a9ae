"""Associative recall: shown key-value pairs, give the value of one key. By default with Hyena-S5.

    python experiments/assoc_recall.py                          # preset 20-10: a minute on a laptop CPU
    python experiments/assoc_recall.py --mixer h3 --seeds 3     # another mixer in the same model, mean and deviation
    python experiments/assoc_recall.py 128-20                   # L=128, vocabulary 20: four minutes
    python experiments/assoc_recall.py 2048-30                  # L=2,048, vocabulary 30: an hour
    python experiments/assoc_recall.py 131k-30 --run runs/long  # 131,072 tokens, vocabulary 30, on a GPU
    python experiments/assoc_recall.py 20-10 --test-lengths 40 80 160  # and how well it does on longer lists
    python experiments/assoc_recall.py 20-10 --help             # every setting, with that preset's values

Presets that end in `-published` are the S5 branch's recipes, `-published-hyena` those of its Hyena: 4,000 training
examples, 50,000 steps. The others train on endless fresh data, which is easier. `131k-40` is the larger vocabulary.

Expected of 20-10: at least 99 % on 4,000 unseen sequences; of 128-20 likewise. Published for 131k-30: 97.2 % (ten
seeds, S5 branch); for L=2,048 and vocabulary 30: Hyena 85 %, Transformer 82 % (arXiv 2302.10866).

Everything goes to the run's folder: TensorBoard curves, checkpoints, `curve.png`, `result.json`, and the
trained model, `model.safetensors`, which `generate.py` asks. The last line of standard output is the result.
"""

import time

START = time.perf_counter()

import dataclasses
from typing import Annotated

import tyro
from _models import Settings as Common
from _training import main

from s5eqx.data import AssocRecall


@dataclasses.dataclass(frozen=True)
class Settings(Common):
    vocab_size: Annotated[int, tyro.conf.arg(aliases=["--vocab"])] = 10
    """Tokens: keys, values, `.` and `=>`."""
    length: int = 20
    """Tokens of key-value pairs; the sequence has two more."""
    key_length: int = 1
    """Tokens of a key."""
    allow_dot: bool = False
    """Also ask for keys that did not occur; the answer is `.`."""


PUBLISHED = Settings(num_examples=4000, num_test=500, batch_size=4, lr=1e-3, steps=50_000, warmup=5000, published=True)
LONG = Settings(
    length=2048,
    vocab_size=30,
    state_size=64,
    num_blocks=32,
    num_test=500,
    batch_size=4,
    steps=32_000,
    steps_per_dispatch=10,
    eval_every=1000,
    log_every=50,
    checkpoint_every=1000,
    eval_batch_size=20,
)
FAR = {
    "length": 131_072,
    "batch_size": 16,
    "chunk": 8192,
    "log_every": 10,
    "checkpoint_every": 100,
    "eval_batch_size": 4,
}
PRESETS = {
    "20-10": Settings(),
    "20-10-published": PUBLISHED,
    "128-20": Settings(length=128, vocab_size=20, state_size=128, num_blocks=4, dt_min=1e-3, steps_per_dispatch=50),
    "2048-30": LONG,
    "131k-30": dataclasses.replace(LONG, **FAR, steps=5000, warmup=100, eval_every=100),
    "131k-40": dataclasses.replace(LONG, **FAR, steps=5000, warmup=100, eval_every=100, vocab_size=40),
}
for vocab_size in (30, 40):
    far = dataclasses.replace(PUBLISHED, **FAR, vocab_size=vocab_size, steps_per_dispatch=10)
    PRESETS[f"131k-{vocab_size}-published"] = far
    PRESETS[f"131k-{vocab_size}-published-hyena"] = dataclasses.replace(
        far, mixer="hyena", lr=5e-4, embed_dropout=0.1, chunk=None
    )


def task(s: Settings, length: int) -> AssocRecall:
    return AssocRecall(s.vocab_size, length, key_length=s.key_length, allow_dot=s.allow_dot, **s.data)


if __name__ == "__main__":
    main(PRESETS, task, "length", __doc__, began=START)
