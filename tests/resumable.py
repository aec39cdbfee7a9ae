"""A tiny run as a process of its own, for tests that end it badly: `python tests/resumable.py FOLDER [--resume]`.

It writes JSON to standard output: its last record and a hash of its parameters. Two variables make a file system worse:
`HOLD=FILE` writes that file when a checkpoint is about to become complete and waits there for its end;
`ROOM=BYTES` lets no file grow beyond that size after the first checkpoint.
"""

import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import equinox as eqx
import jax
import numpy as np
import tiny

from s5eqx.train import Checkpoints, fit, open_run

jax.config.update("jax_disable_most_optimizations", True)


def hold(signal: Path):
    rename = os.rename

    def waiting(source, target, **options):
        if "checkpoint-tmp" in str(source):
            signal.touch()
            time.sleep(60)
        rename(source, target, **options)

    os.rename = os.replace = waiting


def leave_room(size: int):
    save = Checkpoints.save

    def limited(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    Checkpoints.save = limited


def main(folder: Path, *, resume: bool):
    if "HOLD" in os.environ:
        hold(Path(os.environ["HOLD"]))
    if "ROOM" in os.environ:
        leave_room(int(os.environ["ROOM"]))
    every = {"eval_every": 50, "log_every": 20, "checkpoint_every": 10}
    run = open_run({}, folder=folder, resume=resume)
    result = fit(tiny.trainer(), steps=400, run=run, progress=False, **every)
    weights = jax.tree.leaves(eqx.filter(result.state.model, eqx.is_array))
    digest = hashlib.sha256(b"".join(np.asarray(weight).tobytes() for weight in weights)).hexdigest()
    values = {k: v for k, v in result.history[-1].items() if k.split("/")[0] in ("step", "train", "test", "lr")}
    print(json.dumps({"last": values, "records": len(result.history), "weights": digest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), resume="--resume" in sys.argv)
