"""Models and tasks that compile in no time, for tests of training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx.data import AssocRecall
from s5eqx.models import LanguageModel
from s5eqx.nn import HalfGLU2, hyena_s5
from s5eqx.train import DefaultGroups, Trainer, WarmupConstant


class Bigram(eqx.Module):
    """Logits of the next token from this one and the running mean of all before, with dropout."""

    embedding: jax.Array
    head: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, vocab_size, width, *, dropout=0.0, key):
        embedding_key, head_key = jr.split(key)
        self.embedding = jr.normal(embedding_key, (vocab_size, width))
        self.head = eqx.nn.Linear(2 * width, vocab_size, key=head_key)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, x, *, reset=None, key=None):
        h = self.embedding[x]
        count = jnp.arange(1, len(x) + 1, dtype=h.dtype)
        h = jnp.concatenate([h, jnp.cumsum(h, axis=0) / count[:, None]], axis=1)
        return jax.vmap(self.head)(self.dropout(h, key=key))


def bigram(key):
    return Bigram(10, 4, dropout=0.1, key=key)


def language_model(key):
    mixer = lambda key: hyena_s5(8, 8, num_blocks=2, activation=HalfGLU2, key=key)
    return LanguageModel(10, 8, mixer, num_layers=1, mlp_width=16, dropout=0.1, key=key)


TASK = AssocRecall(length=8, num_test=30)
GROUPS = DefaultGroups(lr=1e-2, schedule=WarmupConstant(2), clip_norm=1.0)


def trainer(build=bigram, *, task=TASK, policy=GROUPS, batch_size=4, steps_per_dispatch=5, **options):
    return Trainer(
        build,
        task,
        policy,
        batch_size=batch_size,
        steps_per_dispatch=steps_per_dispatch,
        eval_batch_size=20,
        **options,
    )
