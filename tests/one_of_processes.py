"""One of several processes that train together: `python tests/one_of_processes.py <port> <number> <count>`.

Prints, as JSON, the losses; where `count` is 1, those of one process with one device.
"""

import json
import os
import sys

import xla_flags

os.environ["XLA_FLAGS"] = xla_flags.QUICK
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import tiny

from s5eqx.data import AbstractCorpus, Batch
from s5eqx.train import make_mesh


class Counting(AbstractCorpus):
    """Row i counts up from i; remembers which rows were asked for."""

    num_test, sequence_length = 6, 12

    def __init__(self):
        self.asked = set()

    def train(self, indices):
        self.asked |= {*indices.tolist()}
        rows = (indices[:, None] + np.arange(13)) % 10
        return Batch(rows[:, :-1], rows[:, 1:], np.ones((len(rows), 12), np.float32))

    test = train


def main(port: int, number: int, count: int):
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    jax.config.update("jax_disable_most_optimizations", True)
    corpus, losses = Counting(), []
    mesh = make_mesh() if count > 1 else None
    for task in (tiny.TASK, corpus):
        trainer = tiny.trainer(task=task, mesh=mesh)
        leaves, metrics = trainer.run(trainer.init(), trainer.batches(0))
        losses += [*np.asarray(metrics["loss"]).tolist(), trainer.evaluate(leaves)["loss"]]
    print(json.dumps({"losses": losses, "asked": sorted(corpus.asked)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
