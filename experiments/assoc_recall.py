"""Associative recall: shown key-value pairs, give the value of one key. By default with Hyena-S5.

    python experiments/assoc_recall.py                          # preset 20-10: a minute on a laptop CPU
    python experiments/assoc_recall.py --mixer h3               # another mixer in the same model
    python experiments/assoc_recall.py 20-10-published          # the S5 branch's recipe for the same task
    python experiments/assoc_recall.py 131k-30 --run runs/long  # 131,072 tokens, vocabulary 30, on a GPU
    python experiments/assoc_recall.py 20-10 --help             # every setting, with that preset's values

Expected of 20-10: at least 99 % on 4,000 unseen sequences. It trains on endless fresh data, which is
easier than the published fixed set of 4,000. Published for 131k-30: 97.2 % (ten seeds, S5 branch).

Everything goes to the run's folder: TensorBoard curves, checkpoints, `curve.png`, `result.json`, and the
trained model, `model.safetensors`, which `generate.py` asks. The last line of standard output is the result.
"""

import time

START = time.perf_counter()

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from _command import Place, parse

from s5eqx import nn
from s5eqx.data import AssocRecall
from s5eqx.interop import save
from s5eqx.models import DefaultInit, LanguageModel, S5Init
from s5eqx.train import (
    DefaultGroups,
    PublishedCosine,
    PublishedGroups,
    Trainer,
    WarmupCosine,
    commit,
    fit,
    open_run,
    resume_command,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    mixer: Literal["hyena-s5", "hyena", "h3", "s4d", "long-conv", "attention", "lru", "rg-lru"] = "hyena-s5"
    """The sequence mixer of every block."""
    vocab_size: int = 10
    """Tokens: keys, values, `.` and `=>`."""
    length: int = 20
    """Tokens of key-value pairs; the sequence has two more."""
    num_examples: int | None = None
    """Size of the training set; None for endless fresh data."""
    num_test: int = 4000
    """Unseen test sequences."""
    width: int = 64
    """Channels of the model."""
    num_layers: int = 2
    """Blocks of mixer and MLP."""
    mlp_width: int = 256
    """Hidden channels of each MLP."""
    order: int = 2
    """Gates of a Hyena layer; it has one long operator less."""
    state_size: int = 32
    """Real states: of each S5 and LRU, half as many complex ones; of each channel of S4D and H3."""
    num_blocks: int = 16
    """HiPPO blocks that the states of an S5 start from."""
    dt_min: float = 1e-4
    """Least initial time step of a state-space model, in units of the input interval."""
    dt_max: float = 0.1
    """Largest initial time step of a state-space model, in units of the input interval."""
    batch_size: int = 16
    """Sequences a step."""
    lr: float = 2e-3
    """Peak learning rate, a step."""
    weight_decay: float = 0.1
    """AdamW's decay of the decaying group, a unit of learning rate."""
    steps: int = 6000
    """Training steps."""
    warmup: int = 300
    """Steps of linear warm-up, before a cosine to zero."""
    published: bool = False
    """Initialisation, groups and schedule of the S5 branch in place of the library's."""
    steps_per_dispatch: int = 100
    """Steps between two returns to Python; divides `steps` and the three intervals below."""
    eval_every: int = 500
    """Steps between evaluations."""
    log_every: int = 100
    """Steps between points of the training curves."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    eval_batch_size: int = 500
    """Test sequences evaluated at once."""
    seed: int = 0
    """Chooses the data and the initial weights."""


PUBLISHED = Settings(num_examples=4000, num_test=500, batch_size=4, lr=1e-3, steps=50_000, warmup=5000, published=True)
LONG = dataclasses.replace(
    PUBLISHED, length=131_072, batch_size=16, steps_per_dispatch=1, log_every=10, eval_batch_size=2
)
PRESETS = {
    "20-10": Settings(),
    "20-10-published": PUBLISHED,
    "131k-30": dataclasses.replace(LONG, vocab_size=30),
    "131k-40": dataclasses.replace(LONG, vocab_size=40),
}


def hyena_s5(s: Settings, key):
    return nn.hyena_s5(
        s.width,
        s.state_size,
        order=s.order,
        num_blocks=s.num_blocks,
        dt_min=s.dt_min,
        dt_max=s.dt_max,
        C_init=nn.ComplexNormal() if s.published else nn.TruncatedNormal(),
        activation=nn.HalfGLU2,
        key=key,
    )


def lru(s: Settings, key):
    layer_key, activation_key = jr.split(key)
    return nn.LRU(s.width, s.state_size // 2, activation=nn.HalfGLU2(s.width, key=activation_key), key=layer_key)


def max_length(s: Settings):
    return s.length + 2


MIXERS = {
    "hyena-s5": hyena_s5,
    "hyena": lambda s, key: nn.hyena(s.width, max_length(s), order=s.order, key=key),
    "h3": lambda s, key: nn.h3(s.width, s.state_size, dt_min=s.dt_min, dt_max=s.dt_max, key=key),
    "s4d": lambda s, key: nn.S4D(s.width, s.state_size, dt_min=s.dt_min, dt_max=s.dt_max, key=key),
    "long-conv": lambda s, key: nn.LongConv(s.width, max_length(s), init=nn.GeometricDecay(), key=key),
    "attention": lambda s, key: nn.Attention(s.width, max_length=max_length(s), rotary=nn.Rotary(s.width), key=key),
    "lru": lru,
    "rg-lru": lambda s, key: nn.RGLRU(s.width, key=key),
}


def build(s: Settings):
    def model(key):
        return LanguageModel(
            s.vocab_size,
            s.width,
            lambda key: MIXERS[s.mixer](s, key),
            num_layers=s.num_layers,
            mlp_width=s.mlp_width,
            init=S5Init() if s.published else DefaultInit(),
            key=key,
        )

    return model


def groups(s: Settings):
    if s.published:
        return PublishedGroups(s.lr, s.lr, PublishedCosine(s.steps, s.warmup), weight_decay=s.weight_decay)
    return DefaultGroups(s.lr, WarmupCosine(s.steps, s.warmup), weight_decay=s.weight_decay)


def show(model, task, number=3):
    """Prints a few recalled examples: the prompt, what is expected, what the model says."""
    batch, prefill = task.test(jnp.arange(number)), eqx.filter_jit(model.prefill)
    for prompt, answer in zip(batch.inputs, batch.targets[:, -1], strict=True):
        _, logits = prefill(model.init_state(), prompt)
        words, expected, got = (
            task.decode(prompt),
            task.decode([answer])[0],
            task.decode([jnp.argmax(logits[-1])])[0],
        )
        shown = " ".join(words if len(words) < 40 else [*words[:12], "...", *words[-12:]])
        print(f"{shown}   expected {expected}, got {got}")


def draw(history, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("train/accuracy", "training, all positions"), ("test/accuracy", "test, the answer")):
        points = [(record["step"], record[name]) for record in history if name in record]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(file, dpi=120)


def main(preset: str, s: Settings, place: Place):
    task = AssocRecall(s.vocab_size, s.length, s.seed, s.num_examples, s.num_test)
    trainer = Trainer(
        build(s),
        task,
        groups(s),
        batch_size=s.batch_size,
        steps_per_dispatch=s.steps_per_dispatch,
        eval_batch_size=s.eval_batch_size,
        seed=s.seed,
    )
    run = open_run(
        {"preset": preset, **dataclasses.asdict(s)},
        folder=place.run,
        stem=f"assoc_recall-{preset}-{s.mixer}",
        resume=place.resume,
        overwrite=place.overwrite,
    )
    print(f"run in {run.folder}, curves with: tensorboard --logdir {run.folder}")
    result = fit(
        trainer,
        steps=s.steps,
        eval_every=s.eval_every,
        log_every=s.log_every,
        checkpoint_every=s.checkpoint_every,
        run=run,
        seconds_before=time.perf_counter() - START,
    )
    if result.interrupted:
        print(f"stopped at step {result.step}; continue with:\n{resume_command(run.folder, sys.argv)}")
        return
    leaves = trainer.flatten(result.state)
    test = trainer.evaluate(leaves)
    show(result.state.model, task)
    draw(result.history, run.folder / "curve.png")
    summary = {
        "test_accuracy": test["accuracy"],
        "test_accuracy_first_500": trainer.evaluate(leaves, 500)["accuracy"],
        "test_loss": test["loss"],
        "steps": result.step,
        "seconds": round(time.perf_counter() - START, 2),
        "seconds_to_99": result.seconds_to(0.99),
        "steps_per_second": round(result.steps_per_second, 1),
        "commit": commit(Path(__file__)),
        "versions": run.versions,
        "settings": run.settings,
    }
    save(run.folder / "model.safetensors", result.state.model)
    (run.folder / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    name, settings, place = parse(PRESETS, Place(), __doc__, sys.argv)
    try:
        main(name, settings, place)
    except ValueError as error:
        sys.exit(f"error: {error}")
