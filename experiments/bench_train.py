"""Training and generation with Hyena-S5 against a twin with the same weights, written the usual way.

    python experiments/bench_train.py

The twin's S5 multiplies complex matrices and uses `jax.lax.associative_scan`, its short convolution is XLA's grouped
convolution; the rest, the training loop included, is shared. Reports, interleaved in one run: steps a second at batch
4 on the recall task, seconds and temporaries (XLA's memory analysis) of a step at batch 1 on long sequences, and tokens
a second in generation. Before anything is timed the two are checked to compute the same. About four minutes on two
cores. `--json FILE` keeps the numbers, `--tuned` sets the allocator as in `_timing.TUNED`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from _timing import TUNED, in_a_process_of_its_own, interleaved_medians, where

from s5eqx.data import AssocRecall
from s5eqx.models import LanguageModel
from s5eqx.nn import S5, AbstractCausalMixer, HalfGLU2, ShortConv, hyena_s5
from s5eqx.train import DefaultGroups, Trainer, WarmupCosine


@dataclasses.dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Lengths, in tokens, of the steps at batch 1."""
    repeats: int = 7
    """Rounds a median is taken over."""
    tokens: int = 2000
    """Tokens generated in one measurement."""
    tuned: bool = False
    """Run with the allocator settings of `_timing.TUNED`."""
    json: str | None = None
    """File to write all numbers to."""
    child: bool = False
    """Measure in this process and print JSON; the script calls itself so."""


class Twin(AbstractCausalMixer):
    """A layer whose parallel form is `parallel(layer, x)`; it streams as the layer does."""

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = False

    layer: AbstractCausalMixer
    parallel: Callable = eqx.field(static=True)

    def __call__(self, x, *, reset=None, key=None):
        return self.parallel(self.layer, x)

    def init_state(self):
        return self.layer.init_state()

    def prefill(self, state, x, *, reset=None, key=None):
        return self.layer.prefill(state, x, reset=reset, key=key)

    def step(self, state, x_t, *, reset=None, key=None):
        return self.layer.step(state, x_t, reset=reset, key=key)


def s5_as_written(layer, u):
    def combine(early, late):
        return early[0] * late[0], late[0] * early[1] + late[1]

    Lambda_bar, B_bar, C = layer.discretised()
    Bu = jax.vmap(lambda u_t: B_bar @ u_t.astype(B_bar.dtype))(u)
    _, x = jax.lax.associative_scan(combine, (jnp.broadcast_to(Lambda_bar, Bu.shape), Bu))
    return layer.activation(jax.vmap(lambda x_t: (C @ x_t).real)(x) + layer.D * u)


def convolution_as_written(layer, x):
    taps, width = layer.weight.shape
    y = jax.lax.conv_general_dilated(
        x.T[None],
        layer.weight.T[:, None],
        window_strides=(1,),
        padding=[(taps - 1, 0)],
        feature_group_count=width,
    )
    return y[0].T + layer.bias


def as_written(model):
    """The same model with every S5 and short convolution replaced by its twin."""
    parts = {S5: s5_as_written, ShortConv: convolution_as_written}
    is_part = lambda node: type(node) in parts
    return jax.tree.map(lambda n: Twin(n, parts[type(n)]) if is_part(n) else n, model, is_leaf=is_part)


def build(vocab_size, key):
    mixer = partial(
        hyena_s5, 64, 32, num_blocks=16, dt_min=1e-4, activation=lambda width, key: HalfGLU2(width, key=key)
    )
    return LanguageModel(vocab_size, 64, lambda key: mixer(key=key), num_layers=2, mlp_width=256, key=key)


BUILDERS = {"s5eqx": build, "as written": lambda vocab_size, key: as_written(build(vocab_size, key))}


def training(length, vocab_size, batch_size, steps, repeats):
    """Seconds and bytes of temporaries of one dispatch of `steps` steps."""
    programs, temporaries, losses = {}, {}, {}
    for name, builder in BUILDERS.items():
        task = AssocRecall(vocab_size, length, num_test=500)
        groups = DefaultGroups(1e-3, WarmupCosine(100_000, 1000))
        trainer = Trainer(partial(builder, vocab_size), task, groups, batch_size=batch_size, steps_per_dispatch=steps)
        run = jax.jit(lambda leaves, trainer=trainer: trainer.run(leaves)).lower(trainer.init()).compile()
        temporaries[name] = run.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]
        programs[name] = partial(run, trainer.init())
        losses[name] = np.asarray(programs[name]()[1]["loss"])
    np.testing.assert_allclose(*losses.values(), rtol=1e-3)
    return interleaved_medians(programs, repeats), temporaries


def generation(tokens, repeats):
    """Seconds of `tokens` greedy tokens, called from Python one by one and inside one `lax.scan`."""
    model = build(10, jr.key(0))

    def step(carry, _):
        state, token = carry
        state, logits = model.step(state, token)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (state, token), token

    one, many = (
        jax.jit(lambda carry: step(carry, None)[0]),
        jax.jit(lambda carry: jax.lax.scan(step, carry, length=tokens)),
    )
    start = (model.init_state(), jnp.int32(1))

    def from_python():
        carry = start
        for _ in range(tokens):
            carry = one(carry)
        return carry

    return interleaved_medians({"from Python": from_python, "lax.scan": partial(many, start)}, repeats)


def measure(settings):
    rows = []
    seconds, temporaries = training(20, 10, 4, 50, settings.repeats)
    rows.append({"what": "batch 4, L=20", "steps": 50, "seconds": seconds, "temporaries": temporaries})
    for length in settings.lengths:
        seconds, temporaries = training(length, 30, 1, 1, settings.repeats)
        rows.append({"what": f"batch 1, L={length}", "steps": 1, "seconds": seconds, "temporaries": temporaries})
    rate = {name: settings.tokens / s for name, s in generation(settings.tokens, settings.repeats).items()}
    return {"training": rows, "tokens_per_second": rate}


def report(result):
    columns = f"{'s5eqx':>12}{'as written':>12}{'speed':>8}{'temporaries':>16}{'as written':>12}{'ratio':>8}"
    print(f"{'training step':<20}{columns}")
    for row in result["training"]:
        ours, twin = (1e3 * row["seconds"][name] / row["steps"] for name in BUILDERS)
        bytes_ours, bytes_twin = (row["temporaries"][name] / 2**20 for name in BUILDERS)
        print(
            f"{row['what']:<20}{ours:>9.2f} ms{twin:>9.2f} ms{twin / ours:>7.1f}x"
            f"{bytes_ours:>12.1f} MiB{bytes_twin:>8.1f} MiB{bytes_ours / bytes_twin:>8.2f}"
        )
    rate = result["tokens_per_second"]
    print(f"generation: {rate['from Python']:,.0f} tokens/s from Python, {rate['lax.scan']:,.0f} inside lax.scan")


def main(settings: Settings):
    if settings.child:
        print(json.dumps(measure(settings)))
        return
    print(f"{where()}\nallocator: " + (f"GLIBC_TUNABLES={TUNED}" if settings.tuned else "as it comes"))
    arguments = [*sys.argv[1:], "--child"]
    result = in_a_process_of_its_own(sys.argv[0], arguments, tuned=settings.tuned)
    report(result)
    if settings.json:
        with open(settings.json, "w") as file:
            json.dump({"where": where(), **result}, file, indent=1)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
