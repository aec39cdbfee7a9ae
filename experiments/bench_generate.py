"""Generation: tokens a second and seconds against length, for models that differ in their mixer and in how it steps.

    python experiments/bench_generate.py --plot generation.png

Language models of one size (4 layers of width 64), batch 1, random weights:

- `hyena-s5`, `hyena, tiles` and `hyena, distilled` (its filters fitted by small state-space models, without refinement)
  by `generate`, whole calls after a prompt of 8 tokens; `attention`, with its cache of keys and values, too;
- `hyena, window`: the layer's own step, which goes over the window of past inputs, in a `lax.scan`;
- `hyena, eager`: each input is at once multiplied with the kernel and added to all outputs to come;
- `hyena, naive`: each token by a parallel pass over the sequence up to it.

The first three are timed as they run, interleaved in each round. Of the others, tokens are timed: attention over a
whole cache and the window take the same time anywhere; in the last two ways the time grows with the length, or with
what is left of it, so it is taken at powers of two up to the length and summed over all tokens, linear in between.
Every way is checked to give the tokens of `generate` (64 of them, greedily). Before that, a table of tiles, as sums of
products and as FFTs: `ops.online_conv.BLOCK` is where they cross. Five minutes on two cores. `--json FILE` keeps the
numbers, `--plot FILE.png` draws them.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from _timing import check_settings, over_lengths, where
from jax import lax

from s5eqx import nn, ops
from s5eqx.distill import distill_model
from s5eqx.generate import generate
from s5eqx.models import LanguageModel
from s5eqx.nn._tiles import get_row, in_tiles, lay_tape, set_row

PROMPT = np.arange(1, 9)
CHECKED = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Tokens to generate."""
    width: int = 64
    """Channels of the models."""
    layers: int = 4
    """Blocks of the models."""
    vocab_size: int = 64
    """Tokens of the vocabulary."""
    state_size: int = 64
    """Real states of an S5 layer."""
    order: int = 16
    """Complex states a channel of a distilled filter."""
    repeats: int = 5
    """Rounds a median is taken over."""
    json: Path | None = None
    """File to write all numbers to."""
    plot: Path | None = None
    """File to draw the numbers in."""
    seed: int = 0
    """Seed of the weights."""


def model(settings, mixer):
    return LanguageModel(
        settings.vocab_size,
        settings.width,
        mixer,
        num_layers=settings.layers,
        mlp_width=4 * settings.width,
        key=jr.key(settings.seed),
    )


def seconds_of(program, repeats=3):
    """The median over calls of a compiled program."""
    jax.block_until_ready(program())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def summed(seconds_at, length):
    """The sum over n = 1 ... length of a time that is known at powers of two, linear in between."""
    sizes = sorted(seconds_at)
    return float(np.interp(np.arange(1, length + 1), sizes, [seconds_at[n] for n in sizes]).sum())


def greedy(logits):
    return jnp.argmax(logits).astype(jnp.int32)


@eqx.filter_jit
def by_window(model, state, token, steps):
    """The layers' own steps."""

    def step(carry, _):
        state, token = carry
        state, logits = model.step(state, token)
        return (state, greedy(logits)), greedy(logits)

    return lax.scan(step, (state, token), length=steps)[1]


@eqx.filter_jit
def by_pushing(model, state, token, steps, left):
    """Each input goes to all of the `left` outputs to come; the first row of `pending` is the next one's."""
    state, pending, kernel = lay_tape(model, state, token, left)
    taps = jnp.pad(kernel[:, 1:], ((0, 0), (0, 1))).T

    def step(carry, _):
        state, pending, token = carry
        state, logits = in_tiles(model, set_row(state, pending[0]), token, None)
        pending = jnp.concatenate([pending[1:], jnp.zeros_like(pending[:1])]) + taps * get_row(state)
        return (state, pending, greedy(logits)), greedy(logits)

    return lax.scan(step, (state, pending.T, token), length=steps)[1]


@eqx.filter_jit
def by_whole_passes(model, tokens, start, stop):
    """The parallel pass over all of `tokens` for each of those that it fills in."""
    step = lambda i, tokens: tokens.at[i].set(greedy(model(tokens)[i - 1]))
    return lax.fori_loop(start, stop, step, tokens)


def measure(settings, length):
    """Seconds to generate `length` tokens, by name."""
    longest = length + len(PROMPT)
    width, key = settings.width, jr.key(settings.seed)
    hyena = nn.materialise(model(settings, lambda key: nn.hyena(width, longest, key=key)))
    distilled, _ = distill_model(hyena, settings.order, steps=0)
    models = {
        "hyena-s5": model(settings, lambda key: nn.hyena_s5(width, settings.state_size, key=key)),
        "hyena, tiles": hyena,
        "hyena, distilled": distilled,
    }
    attention = model(settings, lambda key: nn.Attention(width, 4, max_length=longest, key=key))
    rounds = {name: [] for name in models}
    for one in models.values():
        generate(one, PROMPT, length, key=key)
    for _ in range(settings.repeats):
        for name, one in models.items():
            start = time.perf_counter()
            generate(one, PROMPT, length, key=key)
            rounds[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times) for name, times in rounds.items()}

    some = min(256, length)
    seconds["attention"] = seconds_of(lambda: generate(attention, PROMPT, some, key=key).tokens) * length / some
    state = jax.jit(lambda tokens: hyena.prefill(hyena.init_state(), tokens)[0])(PROMPT[:-1])
    token = jnp.asarray(PROMPT[-1])
    sizes = [1 << n for n in range(length.bit_length())]
    tokens = jnp.zeros(longest, jnp.int32).at[: len(PROMPT)].set(PROMPT)
    seconds["hyena, window"] = seconds_of(lambda: by_window(hyena, state, token, CHECKED)) * length / CHECKED
    a_push = {n: seconds_of(lambda n=n: by_pushing(hyena, state, token, CHECKED, n)) / CHECKED for n in sizes}
    seconds["hyena, eager"] = summed(a_push, length)
    a_pass = {n: seconds_of(lambda n=n: by_whole_passes(hyena, tokens[:n], n - 1, n)) for n in sizes}
    seconds["hyena, naive"] = summed(a_pass, length)

    expected = generate(hyena, PROMPT, CHECKED, key=key).tokens
    whole = by_whole_passes(hyena, tokens[: len(PROMPT) + CHECKED], len(PROMPT), len(PROMPT) + CHECKED)
    for given in (
        by_window(hyena, state, token, CHECKED),
        by_pushing(hyena, state, token, CHECKED, CHECKED),
        whole[len(PROMPT) :],
    ):
        np.testing.assert_array_equal(given, expected)
    return seconds


def measure_tiles(channels, sizes=(16, 32, 64, 128, 256)):
    """Seconds of a tile of each size, as sums of products and as FFTs."""
    direct, fft = jax.jit(ops.tile_in_block), jax.jit(ops.tile_of_blocks)

    def both(size):
        kernel = jr.normal(jr.key(0), (2 * size, channels))
        spectrum = ops.tile_spectrum(kernel.T, size)
        ways = (lambda: direct(kernel[None], kernel, size - 1), lambda: fft(kernel.T[None], spectrum, size))
        return dict(zip(("direct", "fft"), (seconds_of(way, 20) for way in ways), strict=True))

    return {size: both(size) for size in sizes}


def report(rows):
    """Tables of seconds and of microseconds a token."""
    names = list(rows[0]["seconds"])
    head = "| tokens | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1)
    print(f"\nseconds\n\n{head}")
    for row in rows:
        print(f"| {row['length']:,} | " + " | ".join(f"{row['seconds'][name]:.3g}" for name in names) + " |")
    print(f"\ntokens a second\n\n{head}")
    for row in rows:
        print(
            f"| {row['length']:,} | "
            + " | ".join(f"{row['length'] / row['seconds'][name]:,.0f}" for name in names)
            + " |"
        )
    first, last = rows[0], rows[-1]
    a_token = lambda row, name: row["seconds"][name] / row["length"]
    print(f"\ntime a token at {last['length']:,} tokens over that at {first['length']:,}:")
    for name in names:
        print(f"  {name:<18}{a_token(last, name) / a_token(first, name):8.2f}")
    for name in ("hyena, naive", "hyena, eager", "hyena, window"):
        print(f"tiles against {name} at {last['length']:,}: {a_token(last, name) / a_token(last, 'hyena, tiles'):.0f}x")


def report_tiles(rows, channels):
    print(f"\nmicroseconds a tile, {channels} channels\n\n| slots | " + " | ".join(map(str, rows)) + " |")
    print("|" + "---|" * (len(rows) + 1))
    for name in ("direct", "fft"):
        print(f"| {name} | " + " | ".join(f"{1e6 * row[name]:.0f}" for row in rows.values()) + " |")


def draw(rows, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lengths = [row["length"] for row in rows]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for name in rows[0]["seconds"]:
        seconds = np.array([row["seconds"][name] for row in rows])
        panels[0].loglog(lengths, seconds, "o-", label=name)
        panels[1].loglog(lengths, lengths / seconds, "o-", label=name)
    for axes, title in zip(panels, ("seconds", "tokens a second"), strict=True):
        over_lengths(axes, lengths, xlabel="tokens generated", title=title)
    panels[0].legend()
    figure.savefig(file, dpi=150)


def main(settings: Settings):
    check_settings(settings, seed=0)
    print(f"{where()}")
    channels = settings.layers * settings.width
    tiles, rows = measure_tiles(channels), []
    report_tiles(tiles, channels)
    for length in settings.lengths:
        rows.append({"length": length, "seconds": measure(settings, length)})
        print(json.dumps(rows[-1]), flush=True)
    report(rows)
    if settings.json:
        settings.json.write_text(json.dumps({"where": where(), "tiles": tiles, "rows": rows}, indent=1) + "\n")
    if settings.plot:
        draw(rows, settings.plot)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
