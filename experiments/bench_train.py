"""A training step of Hyena-S5 against the same step written the usual way, and generation.

    python experiments/bench_train.py --plot step.png

All programs have the same weights, data and optimiser, and run the same number of steps in a `lax.scan`:

- `as written`: the research code's step in plain JAX, `_as_written.py`. At batch 1 most of its time is the weights'
  gradient of its grouped convolution, which XLA runs badly on CPU; so there is also
- `layers as written`: this library's model with S5 and short convolution as in research code, in a better layout;
- `GEMM + scan`: this library's model with an S5 of real matrix products around the scan kernel;
- `s5eqx`: the model as it is;
- `in pieces`: the same, trained by `next_token(..., chunk=...)`.

Reports, interleaved in one run: time, temporaries (XLA's memory analysis) and seconds to compile of a step at batch 4
on the recall task and at batch 1 on long sequences; the largest relative difference of the losses from `as written`,
which must stay below 1e-3; and tokens a second in generation. About ten minutes on two cores. `--json FILE` keeps
the numbers, `--plot FILE.png` draws the steps at batch 1, `--tuned` sets the allocator as in `_timing.TUNED`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import _as_written
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from _timing import TUNED, in_a_process_of_its_own, interleaved_medians, where

from s5eqx import ops
from s5eqx.data import AssocRecall
from s5eqx.models import LanguageModel
from s5eqx.nn import S5, AbstractCausalMixer, HalfGLU2, ShortConv, hyena_s5
from s5eqx.train import DefaultGroups, Trainer, WarmupCosine, next_token

LR, WEIGHT_DECAY, SCHEDULE = 1e-3, 0.1, WarmupCosine(100_000, 1000)


@dataclasses.dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Lengths, in tokens, of the steps at batch 1."""
    chunk: int = 2048
    """Length, in tokens, of the longest piece of `in pieces`."""
    repeats: int = 5
    """Rounds a median is taken over."""
    tokens: int = 2000
    """Tokens generated in one measurement."""
    tuned: bool = False
    """Run with the allocator settings of `_timing.TUNED`."""
    json: str | None = None
    """File to write all numbers to."""
    plot: str | None = None
    """File to draw the steps at batch 1 in."""
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
    Lambda_bar, B_bar, C = layer.discretised()
    return layer.activation(_as_written.apply_ssm(u, Lambda_bar, B_bar, C / 2, layer.D))


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


def s5_unfused(layer, u):
    Lambda_bar, B_bar, C = layer.discretised()
    pairs = lambda z: jnp.stack([z.real, z.imag], axis=-1)
    w_in, w_out = pairs(B_bar).swapaxes(0, 1).reshape(len(C), -1), pairs(C.conj()).reshape(len(C), -1).T
    x = ops.diagonal_scan_pairs(pairs(Lambda_bar), (u @ w_in).reshape(len(u), -1, 2))
    return layer.activation(x.reshape(len(u), -1) @ w_out + layer.D * u)


def replaced(model, parts):
    """The same model with the layers of the types in `parts` replaced by their twins."""
    is_part = lambda node: type(node) in parts
    return jax.tree.map(lambda n: Twin(n, parts[type(n)]) if is_part(n) else n, model, is_leaf=is_part)


def build(vocab_size, parts, key):
    mixer = partial(
        hyena_s5, 64, 32, num_blocks=16, dt_min=1e-4, activation=lambda width, key: HalfGLU2(width, key=key)
    )
    model = LanguageModel(vocab_size, 64, lambda key: mixer(key=key), num_layers=2, mlp_width=256, key=key)
    return replaced(model, parts)


MODELS = {
    "layers as written": ({S5: s5_as_written, ShortConv: convolution_as_written}, None),
    "GEMM + scan": ({S5: s5_unfused}, None),
    "s5eqx": ({}, None),
}


def training(length, vocab_size, batch_size, steps, chunk, repeats):
    """Seconds a step, bytes of temporaries, seconds to compile and error of the loss, each by program."""
    task = AssocRecall(vocab_size, length, num_test=500)
    models = MODELS if chunk is None else {**MODELS, "in pieces": ({}, chunk)}
    row = {"length": length, "batch": batch_size, "seconds": {}, "temporaries": {}, "compile": {}, "loss_error": {}}
    programs, losses = {}, {}

    def add(name, run, state, loss_of):
        start = time.perf_counter()
        compiled = jax.jit(run).lower(state).compile()
        row["compile"][name] = time.perf_counter() - start
        row["temporaries"][name] = compiled.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]
        programs[name] = partial(compiled, state)
        losses[name] = np.asarray(loss_of(programs[name]()[1]))
        row["loss_error"][name] = float(np.max(np.abs(losses[name] / losses["as written"] - 1)))
        np.testing.assert_allclose(losses[name], losses["as written"], rtol=1e-3)

    def trainer(parts, chunk):
        loss, policy = partial(next_token, chunk=chunk), DefaultGroups(LR, SCHEDULE, weight_decay=WEIGHT_DECAY)
        sizes = {"batch_size": batch_size, "steps_per_dispatch": steps}
        return Trainer(partial(build, vocab_size, parts), task, policy, loss=loss, **sizes)

    ours = trainer({}, None)
    weights = _as_written.weights(ours.unflatten(ours.init()).model)
    state, run = _as_written.training(
        weights, task, SCHEDULE(LR), weight_decay=WEIGHT_DECAY, batch_size=batch_size, steps=steps
    )
    add("as written", run, state, lambda losses: losses)
    for name, options in models.items():
        ours = trainer(*options)
        add(name, lambda leaves, ours=ours: ours.run(leaves), ours.init(), lambda metrics: metrics["loss"])
    row["seconds"] = {name: s / steps for name, s in interleaved_medians(programs, repeats).items()}
    return row


def generation(tokens, repeats):
    """Seconds of `tokens` greedy tokens, called from Python one by one and inside one `lax.scan`."""
    model = build(10, {}, jr.key(0))

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
    rows = [training(20, 10, 4, 50, None, settings.repeats)]
    rows += [training(length, 30, 1, 1, settings.chunk, settings.repeats) for length in settings.lengths]
    rate = {name: settings.tokens / s for name, s in generation(settings.tokens, settings.repeats).items()}
    return {"training": rows, "tokens_per_second": rate}


def report(result):
    for row in result["training"]:
        print(f"\nbatch {row['batch']}, L={row['length']:,}")
        print(f"{'':<20}{'step':>12}{'speed':>8}{'temporaries':>16}{'part':>7}{'compile':>10}{'loss error':>12}")
        time_there, bytes_there = row["seconds"]["as written"], row["temporaries"]["as written"]
        for name, seconds in row["seconds"].items():
            temporaries = row["temporaries"][name]
            print(
                f"{name:<20}{1e3 * seconds:>9.2f} ms{time_there / seconds:>7.1f}x{temporaries / 2**20:>12.1f} MiB"
                f"{temporaries / bytes_there:>7.2f}{row['compile'][name]:>8.1f} s{row['loss_error'][name]:>12.0e}"
            )
    rate = result["tokens_per_second"]
    print(f"\ngeneration: {rate['from Python']:,.0f} tokens/s from Python, {rate['lax.scan']:,.0f} inside lax.scan")


def draw(result, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["training"] if row["batch"] == 1]
    lengths = [row["length"] for row in rows]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    columns = ("seconds", "temporaries"), (1e3, 2**-20), ("time of a step, ms", "temporaries of a step, MiB")
    for axes, what, scale, title in zip(panels, *columns, strict=True):
        for name in rows[0][what]:
            axes.loglog(lengths, [scale * row[what][name] for row in rows], "o-", label=name)
        axes.set(xlabel="length in tokens", title=f"batch 1: {title}")
        axes.xaxis.minorticks_off()
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(file, dpi=150)


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
    if settings.plot:
        draw(result, settings.plot)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
