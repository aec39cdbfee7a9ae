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
which must stay below 1e-3; at batch 1 what each part of `s5eqx` takes by itself, forward and backward; and tokens a
second in generation. About ten minutes on two cores. `--json FILE` keeps the numbers, `--plot FILE.png` draws the steps
at batch 1, `--tuned` sets the allocator as in `_timing.TUNED`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import _as_written
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from _timing import TUNED, check_settings, in_a_process_of_its_own, interleaved_medians, over_lengths, where
from bench_layer import real_products

from s5eqx.data import AssocRecall
from s5eqx.models import LanguageModel
from s5eqx.nn import S5, AbstractCausalMixer, HalfGLU2, ShortConv, hyena_s5, layer_norm, linear
from s5eqx.train import DefaultGroups, Trainer, WarmupCosine, next_token

LR, WEIGHT_DECAY, SCHEDULE = 1e-3, 0.1, WarmupCosine(100_000, 1000)
POLICY = DefaultGroups(LR, SCHEDULE, weight_decay=WEIGHT_DECAY)


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
    json: Path | None = None
    """File to write all numbers to."""
    plot: Path | None = None
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


def s5_by(recurrence):
    """S5 whose `u -> y` is `recurrence(u, Lambda_bar, B_bar, C, D)`."""
    return lambda layer, u: layer.activation(recurrence(u, *layer.discretised(), layer.D))


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
    "layers as written": ({S5: s5_by(_as_written.recurrence), ShortConv: convolution_as_written}, None),
    "GEMM + scan": ({S5: s5_by(real_products)}, None),
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
        sizes = {"batch_size": batch_size, "steps_per_dispatch": steps}
        return Trainer(partial(build, vocab_size, parts), task, POLICY, loss=partial(next_token, chunk=chunk), **sizes)

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
    if batch_size == 1:
        row["parts"] = profile(task, programs["s5eqx"], repeats)
    return row


def jitted(function, *inputs):
    """`function` on these inputs, as a program. Their arrays alone pass, since a call takes time for each module."""
    arrays, rest = eqx.partition(inputs, eqx.is_array)
    leaves, tree = jax.tree.flatten(arrays)

    def run(leaves):
        result = function(*eqx.combine(jax.tree.unflatten(tree, leaves), rest))
        return jax.tree.leaves(eqx.filter(result, eqx.is_array))

    return partial(jax.jit(run), leaves)


def forward_and_backward(function, *inputs):
    """The results, and the gradients of all inputs, with a cotangent that XLA does not know."""

    def run(g, *inputs):
        results, pull = eqx.filter_vjp(function, *inputs)
        return results, pull(g)

    g = jax.tree.map(lambda y: jnp.ones(y.shape, y.dtype), eqx.filter_eval_shape(function, *inputs))
    return jitted(run, g, *inputs)


def profile(task, step, repeats):
    """How many of each part the step of `s5eqx` has, and the seconds of one; the step itself is the first."""
    model, batch = build(task.vocab_size, {}, jr.key(0)), task.train_batch(jnp.int32(0), 1)
    blocks = model.backbone.blocks
    block, ends = blocks[0], eqx.tree_at(lambda model: model.backbone, model, None)
    mixer, (s5,) = block.mixer, block.mixer.bank.operators()
    core = eqx.tree_at(lambda s5: s5.activation, s5, eqx.nn.Identity())
    x = model.embed(batch.inputs[0])
    z = linear(mixer.in_proj, x)
    params = eqx.filter(model, eqx.is_inexact_array)
    optimiser = POLICY.optimiser(model)

    def projections(in_proj, out_proj, x, y):
        return linear(in_proj, x), linear(out_proj, y)

    def gates(z, y):
        x_0, x_1, v = jnp.split(z, 3, axis=-1)
        return x_1 * v, x_0 * y

    def loss(ends, batch):
        return next_token(lambda tokens, key: ends.unembed(ends.embed(tokens)), batch)

    def update(grads, state, params):
        updates, state = optimiser.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    layer, n = lambda layer, x: layer(x), len(blocks)
    programs = {
        "step": (1, step),
        "norms": (2 * n + 1, forward_and_backward(layer_norm, block.norm1, x)),
        "projections in and out": (n, forward_and_backward(projections, mixer.in_proj, mixer.out_proj, x, x)),
        "short convolutions": (n, forward_and_backward(layer, mixer.short_conv, z)),
        "S5 without activation": (n, forward_and_backward(layer, core, x)),
        "activations of S5": (n, forward_and_backward(layer, s5.activation, x)),
        "gates before and after": (n, forward_and_backward(gates, z, x)),
        "MLPs": (n, forward_and_backward(layer, block.mlp, x)),
        "embedding, head, loss": (1, forward_and_backward(loss, ends, batch)),
        "optimiser": (1, jitted(update, params, optimiser.init(params), params)),
        "data": (1, jitted(task.train_batch, jnp.int32(0), 1)),
    }
    seconds = interleaved_medians({name: run for name, (_, run) in programs.items()}, repeats)
    return {name: {"number": number, "seconds": seconds[name]} for name, (number, _) in programs.items()}


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


def report_parts(parts):
    seconds = {f"{part['number']} {name}": part["number"] * part["seconds"] for name, part in parts.items()}
    step, *others = seconds.values()
    # May be negative: by itself a part writes all its results, while in the step XLA fuses it with its neighbours.
    seconds["the rest"] = step - sum(others)
    print("\ns5eqx and its parts, each by itself")
    for name, s in seconds.items():
        print(f"{name:<26}{1e3 * s:>9.2f} ms{s / step:>7.0%}")


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
        if "parts" in row:
            report_parts(row["parts"])
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
        over_lengths(axes, lengths, xlabel="length in tokens", title=f"batch 1: {title}")
    panels[0].legend()
    figure.savefig(file, dpi=150)


def main(settings: Settings):
    check_settings(settings, lengths=4)  # of fewer tokens there are too few sequences for a test set
    if settings.child:
        print(json.dumps(measure(settings)))
        return
    print(f"{where()}\nallocator: " + (f"GLIBC_TUNABLES={TUNED}" if settings.tuned else "as it comes"))
    arguments = [*sys.argv[1:], "--child"]
    result = in_a_process_of_its_own(sys.argv[0], arguments, tuned=settings.tuned)
    report(result)
    if settings.json:
        settings.json.write_text(json.dumps({"where": where(), **result}, indent=1))
    if settings.plot:
        draw(result, settings.plot)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
