"""Training over eight virtual devices: prints, as JSON, how far it is from one device, and what XLA gathers.

A process of its own, since the number of devices is fixed when JAX starts: `python tests/many_devices.py`.
"""

import json
import os
import re

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tiny
from helpers import relative_error

from s5eqx.data import AssocRecall, Batch
from s5eqx.train import next_token
from s5eqx.train.gradient import Scorer
from s5eqx.train.mesh import make_mesh

jax.config.update("jax_disable_most_optimizations", True)

TASK = AssocRecall(length=30, num_test=30)  # 32 inputs: a piece of four for each of eight devices
STEPS = 8


def losses(build=tiny.language_model, **options):
    """The loss of each step and of the test, and the trainer."""
    trainer = tiny.trainer(build, task=TASK, batch_size=8, steps_per_dispatch=STEPS, **options)
    leaves, metrics = trainer.run(trainer.init())
    return np.append(metrics["loss"], trainer.evaluate(leaves)["loss"]), trainer


def largest(collective, trainer):
    """The numbers in the largest result of a kind of collective in the compiled dispatch."""
    text = trainer._run.lower(trainer.init(), None).compile().as_text()
    found = re.findall(rf"= ([^=]*) {collective}(?:-start)?\(", text)
    shapes = [shape for types in found for shape in re.findall(r"\[([\d,]*)\]", types)]
    return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes), default=0)


def steps():
    without_dropout = lambda key: eqx.nn.inference_mode(tiny.language_model(key))
    one = {True: losses()[0], False: losses(build=without_dropout)[0]}
    for data, sequence, accumulate in ((8, 1, 1), (4, 1, 2), (2, 4, 2), (1, 8, 1)):
        # Dropout is drawn for each piece of a sequence, so what splits the length is compared without.
        dropout = sequence == 1
        options = {} if dropout else {"build": without_dropout}
        given, trainer = losses(mesh=make_mesh(data, sequence), accumulate=accumulate, **options)
        yield (
            f"{data} x {sequence}",
            {
                "error": float(np.abs(given - one[dropout]).max()),
                "all-gather": largest("all-gather", trainer),
                "all-to-all": largest("all-to-all", trainer),
            },
        )


def long_sequence():
    """Loss and gradient of one sequence of 262,144 tokens, with resets, over eight devices and on one."""
    length = 2**18
    model = eqx.nn.inference_mode(tiny.language_model(jr.key(0)))
    tokens = jr.randint(jr.key(1), (1, length + 1), 0, 10)
    resets = jr.bernoulli(jr.key(2), 1e-4, (1, length))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((1, length)), resets)
    keys = jr.split(jr.key(3), 1)

    def gradient(mesh):
        scorer = Scorer(next_token, mesh=mesh, compute_dtype=None)
        score, gradient = eqx.filter_jit(scorer.gradient)(model, batch, keys, parts=1)
        return float(score.loss), gradient

    (loss, given), (expected_loss, expected) = gradient(make_mesh(1, 8)), gradient(None)
    errors = [
        float(relative_error(a, b)) for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
    ]
    return {"loss": abs(loss - expected_loss) / expected_loss, "gradient": max(errors), "leaves": len(errors)}


if __name__ == "__main__":
    print(json.dumps({**dict(steps()), "long": long_sequence()}))
