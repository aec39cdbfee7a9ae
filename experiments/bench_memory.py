"""Memory of a training step of a language model: XLA's temporaries, compiled for this machine and not run.

    python experiments/bench_memory.py                           # hyena-s5-125m, 16 sequences of 1,024 tokens
    python experiments/bench_memory.py transformer-125m --batch-size 8 --length 2048

The score and its gradient, of the whole model and of a model without layers, which is the loss by itself; with the
logits of all steps at once, and with those of `--logits-chunk` steps. Parameters, gradients and the optimiser's state
come on top. Prints a table in Markdown. Two minutes.
"""

import argparse
import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _language_models import PRESETS, Settings, build

from s5eqx.data import Batch
from s5eqx.train import next_token
from s5eqx.train.gradient import Scorer


class NoLayers(eqx.Module):
    """The embedding, and the logits that it makes of itself."""

    embedding: jax.Array

    def hidden(self, x, *, key):
        return self.embedding[x]

    def unembed(self, h):
        return jnp.matmul(h, self.embedding.T, preferred_element_type=jnp.float32)

    def __call__(self, x, *, key):
        return self.unembed(self.hidden(x, key=key))


def temporaries(model, s: Settings, logits_chunk: int | None, dtype=None) -> float:
    """Of the score and the gradient of a batch, in MiB."""

    def loss(model, batch, *, key):
        return next_token(model, batch, key=key, logits_chunk=logits_chunk)

    scorer = Scorer(loss, mesh=None, compute_dtype=dtype)
    shape: Any = partial(jax.ShapeDtypeStruct, (s.batch_size, s.length))
    batch = Batch(shape(jnp.int32), shape(jnp.int32), shape(jnp.float32))
    keys = jax.eval_shape(lambda: jr.split(jr.key(0), s.batch_size))
    arrays, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    gradient = lambda arrays, batch, keys: scorer.gradient(eqx.combine(arrays, rest), batch, keys, parts=1)
    analysis: Any = jax.jit(gradient).lower(arrays, batch, keys).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def main(s: Settings, vocab_size: int, chunk: int):
    model, again = (
        eqx.filter_eval_shape(build(dataclasses.replace(s, remat=remat), vocab_size), jr.key(0))
        for remat in (False, True)
    )
    bare = eqx.filter_eval_shape(NoLayers, jax.ShapeDtypeStruct((vocab_size, s.width), jnp.float32))
    print(f"batch {s.batch_size}, L = {s.length}, V = {vocab_size:,}\n")
    print(f"| temporaries, MiB | all logits at once | of {chunk} steps at once | |\n|---|---|---|---|")
    for name, whole, dtype in (
        ("the loss by itself", bare, None),
        ("the loss by itself, bfloat16", bare, jnp.bfloat16),
        ("the whole step", model, None),
        ("the whole step, bfloat16", model, jnp.bfloat16),
        ("the whole step, remat", again, None),
    ):
        naive, chunked = (temporaries(whole, s, n, dtype) for n in (None, chunk))
        print(f"| {name} | {naive:,.0f} | {chunked:,.0f} | {chunked / naive:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=PRESETS, default="hyena-s5-125m")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--logits-chunk", type=int, default=128)
    given = parser.parse_args()
    settings = dataclasses.replace(PRESETS[given.preset], batch_size=given.batch_size, length=given.length)
    main(settings, given.vocab_size, given.logits_chunk)
