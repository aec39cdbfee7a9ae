"""Induction heads: a trigger comes again, say what followed it. By default with Hyena-S5.

    python experiments/induction.py                                   # L=30, vocabulary 20: a minute on a laptop CPU
    python experiments/induction.py --mixer attention --seeds 3       # another mixer, mean and deviation
    python experiments/induction.py --num-triggers 3 --copy-length 4  # several triggers, longer copies
    python experiments/induction.py --test-lengths 60 120 1000        # and how well it does on longer sequences
    python experiments/induction.py --no-answer-only                  # a loss on all tokens, as published: much slower
    python experiments/induction.py 30-20 --help                      # every setting, with that preset's values

Expected: at least 99 % on 4,000 unseen sequences. Published for two layers of width 32 and a fixed training set of
5,000, with the loss on all tokens (arXiv 2212.14052): H3 and attention 100 %, S4D 35.6 %; chance is 1 in 18. It trains
on endless fresh data.

The run's folder has the same files as that of `assoc_recall.py`.
"""

import time

START = time.perf_counter()

import dataclasses
from typing import Annotated

import tyro
from _models import Settings as Common
from _training import main

from s5eqx.data.synthetics import InductionHeads


@dataclasses.dataclass(frozen=True)
class Settings(Common):
    vocab_size: Annotated[int, tyro.conf.arg(aliases=["--vocab"])] = 20
    """Tokens: plain ones, `.` and `=>`."""
    length: int = 30
    """Tokens before the last trigger."""
    copy_length: int = 1
    """Tokens that follow a trigger, and that are to be said."""
    num_triggers: int = 1
    """Places that are drawn for triggers."""
    answer_only: bool = True
    """Train on the copy alone, and not on the random tokens before it, as the published task does."""


PRESETS = {
    "30-20": Settings(batch_size=32, steps=3000),
    "1024-40": Settings(length=1024, vocab_size=40, steps_per_dispatch=10, eval_batch_size=50, num_test=500),
}


def task(s: Settings, length: int) -> InductionHeads:
    return InductionHeads(s.vocab_size, length, s.copy_length, s.num_triggers, s.answer_only, **s.data)


if __name__ == "__main__":
    main(PRESETS, task, "length", __doc__, began=START)
