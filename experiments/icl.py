"""In-context learning of linear functions: from pairs x, f(x) infer f, and apply it. By default with Hyena-S5.

    python experiments/icl.py                              # 20 pairs, x in R^3: minutes on a laptop CPU
    python experiments/icl.py --mixer attention --seeds 3  # another mixer, mean and deviation
    python experiments/icl.py --dimension 8 --num-pairs 40
    python experiments/icl.py --test-lengths 10 40         # other numbers of pairs
    python experiments/icl.py 20-3 --help                  # every setting, with that preset's values

The result is a loss, the squared error of the last answer as a share of the variance: 1 for who always says 0, and 0
for least squares, once there are as many pairs as dimensions.

The run's folder has the same files as that of `assoc_recall.py`.
"""

import time

START = time.perf_counter()

import dataclasses

import tyro
from _models import Settings as Common
from _training import main

from s5eqx.data.synthetics import LinearFunctions


@dataclasses.dataclass(frozen=True)
class Settings(Common):
    chunk: tyro.conf.Suppress[None] = None
    embed_dropout: tyro.conf.Suppress[float] = 0.0
    dimension: int = 3
    """Entries of x."""
    num_pairs: int = 20
    """Pairs before the question."""


PRESETS = {"20-3": Settings(state_size=64, num_blocks=4, dt_min=1e-3, batch_size=32)}


def task(s: Settings, num_pairs: int) -> LinearFunctions:
    return LinearFunctions(s.dimension, num_pairs, **s.data)


if __name__ == "__main__":
    main(PRESETS, task, "num_pairs", __doc__, began=START)
