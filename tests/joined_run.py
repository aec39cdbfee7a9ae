"""One of two processes that train together, stop and resume: `python tests/joined_run.py PORT NUMBER FOLDER`.

Prints, as JSON, what this process saw.
"""

import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import xla_flags

os.environ["XLA_FLAGS"] = xla_flags.QUICK
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import tiny

from s5eqx.train import Checkpoints, fit, make_mesh, open_run

EVERY = {"eval_every": 10, "log_every": 5, "checkpoint_every": 5}


def refused(folder):
    try:
        open_run({}, folder=folder)
    except ValueError as error:
        return str(error)


def digest(leaves):
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def main(port: int, number: int, folder: Path):
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    jax.config.update("jax_disable_most_optimizations", True)
    trainer = tiny.trainer(mesh=make_mesh())
    train, steps = trainer.run, []

    def run(leaves, batches):
        steps.append(len(steps))
        if steps[-1] == 1 and number == 1:
            signal.raise_signal(signal.SIGTERM)  # to one of the two
        return train(leaves, batches)

    trainer.run = run
    begun = open_run({}, parent=folder)
    stopped = fit(trainer, steps=20, run=begun, **EVERY)

    if number == 1:  # which alone cannot read the newest checkpoint
        read = Checkpoints._arrays
        fails = lambda self, step, like: read(self, step, like) if step < 10 else 1 / 0
        Checkpoints._arrays = fails
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = fit(trainer, steps=15, run=open_run({}, folder=begun.folder, resume=True), **EVERY)
    found = {
        "folder": str(begun.folder),
        "stopped": [stopped.interrupted, stopped.step],
        "refused": refused(begun.folder),
        "damaged": [str(warning.message) for warning in caught if "is damaged" in str(warning.message)],
        "steps": [record["step"] for record in resumed.history],
        "leaves": digest(trainer.flatten(resumed.state)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
