"""Sequences as a whole, and at irregular times: ListOps by a classifier, a pendulum by a regressor; generated data.

    python experiments/classify.py                          # ListOps of up to 32 tokens, S5 in both directions: minutes
    python experiments/classify.py --mixer attention        # another mixer
    python experiments/classify.py list-ops-2048            # as long as those of the Long Range Arena, on a GPU
    python experiments/classify.py pendulum                 # the angle from noisy pictures taken at irregular times
    python experiments/classify.py pendulum --no-intervals  # without being told the times
    python experiments/classify.py pendulum --help          # every setting, with that preset's values

ListOps asks for the value of an expression such as `[MAX 4 3 [MIN 2 3 ] 1 ]`: accuracy, 10 classes. The pendulum asks
for sine and cosine of its angle at each picture: mean squared error, 0.5 for who always says 0. Only `s5` and
`bidirectional-s5` take the intervals between pictures; the others need `--no-intervals`.

The run's folder has the same files as that of `assoc_recall.py`.
"""

import time

START = time.perf_counter()

import dataclasses
from typing import Literal

import tyro
from _models import Settings as Common
from _training import main

from s5eqx.data.synthetics import AbstractSynthetic, ListOps, Pendulum


@dataclasses.dataclass(frozen=True)
class Settings(Common):
    chunk: tyro.conf.Suppress[None] = None
    embed_dropout: tyro.conf.Suppress[float] = 0.0
    task: Literal["list-ops", "pendulum"] = "list-ops"
    """What is to be told of a sequence."""
    length: int = 32
    """Tokens of the longest expression, or pictures of the pendulum."""
    max_depth: int = 3
    """Expressions within each other."""
    max_args: int = 4
    """Arguments of an expression."""
    num_times: int = 100
    """Times at which a picture may be taken, 0.05 s from each other."""
    size: int = 24
    """Pixels of a picture along each side."""
    intervals: bool = True
    """Tell the model the times between pictures."""


PRESETS = {
    "list-ops": Settings(
        mixer="bidirectional-s5", num_layers=4, state_size=64, num_blocks=4, dt_min=1e-3, batch_size=32, eval_every=1000
    ),
    "list-ops-2048": Settings(
        mixer="bidirectional-s5",
        length=2048,
        max_depth=10,
        max_args=10,
        width=128,
        num_layers=8,
        mlp_width=256,
        state_size=128,
        num_blocks=8,
        dt_min=1e-3,
        batch_size=50,
        lr=1e-3,
        steps=80_000,
        warmup=2000,
        num_test=2000,
        steps_per_dispatch=10,
        eval_every=2000,
        eval_batch_size=50,
    ),
    "pendulum": Settings(
        task="pendulum",
        length=50,
        mixer="bidirectional-s5",
        num_layers=4,
        state_size=64,
        num_blocks=4,
        dt_min=1e-3,
        lr=3e-3,
        num_test=1000,
        steps=2000,
        warmup=200,
        steps_per_dispatch=20,
        eval_batch_size=100,
    ),
}


def task(s: Settings, length: int) -> AbstractSynthetic:
    if s.task == "list-ops":
        return ListOps(length, s.max_depth, s.max_args, **s.data)
    if s.intervals and s.mixer not in ("s5", "bidirectional-s5"):
        raise ValueError(f"only s5 and bidirectional-s5 take intervals, got {s.mixer}; add --no-intervals")
    return Pendulum(s.num_times, length, s.size, intervals=s.intervals, **s.data)


if __name__ == "__main__":
    main(PRESETS, task, "length", __doc__, began=START)
