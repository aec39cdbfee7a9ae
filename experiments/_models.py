"""The models of the synthetic tasks: their settings, every mixer, and what is built of them."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.random as jr

from s5eqx import nn
from s5eqx.data import LabelledBatch, SeriesBatch
from s5eqx.data.synthetics import AbstractLabelTask, AbstractSeriesTask, AbstractSynthetic, AbstractTokenTask
from s5eqx.interop import load
from s5eqx.models import AbstractInit, Classifier, DefaultInit, LanguageModel, Regressor, S5Init, SequenceEncoder
from s5eqx.train import (
    DefaultGroups,
    PublishedCosine,
    PublishedGroups,
    Target,
    Trainer,
    WarmupCosine,
    label,
    next_token,
    squared_error,
)

Mixer = Literal[
    "hyena-s5",
    "hyena",
    "h3",
    "s5",
    "s4d",
    "long-conv",
    "attention",
    "lru",
    "rg-lru",
    "bidirectional-s5",
    "bidirectional-s4d",
]

WINDOWS = ("hyena", "long-conv", "attention")
"""Mixers whose state is the past itself, which would be kept once a piece."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    mixer: Mixer = "hyena-s5"
    """The sequence mixer of every block."""
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
    num_heads: int = 1
    """Attention heads; each turns all of its channels by the position."""
    embed_dropout: float = 0.0
    """Probability to drop an entry of the embedding, in models of tokens that predict the next."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    num_examples: int | None = None
    """Size of the training set; None for endless fresh data."""
    num_test: int = 4000
    """Unseen test examples, all different."""
    test_lengths: tuple[int, ...] = ()
    """Other lengths that the trained model is tested at; layers with a longest length are built for the longest."""
    batch_size: int = 16
    """Examples a step."""
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
    start: str | None = None
    """Weights to begin with, the model.safetensors of a run with the same model; None for initial ones."""
    stop_at: float | None = None
    """Stop when the test has this accuracy; None for never."""
    chunk: int | None = None
    """Steps of a piece, its state carried into the next, by which long sequences take little memory; None for whole.
    Mixers whose state is a window of the past take sequences whole."""
    steps_per_dispatch: int = 100
    """Steps between two returns to Python; divides `steps` and the three intervals below."""
    eval_every: int = 500
    """Steps between evaluations."""
    log_every: int = 100
    """Steps between points of the training curves."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    eval_batch_size: int = 500
    """Test examples evaluated at once."""
    seed: int = 0
    """Chooses the data and the initial weights."""

    @property
    def data(self) -> dict[str, Any]:
        """What every synthetic task takes."""
        return {"seed": self.seed, "num_examples": self.num_examples, "num_test": self.num_test}

    @property
    def pace(self) -> dict[str, Any]:
        """How long `fit` trains, and when it looks up."""
        return {name: getattr(self, name) for name in ("steps", "eval_every", "log_every", "checkpoint_every")}

    @property
    def target(self) -> Target | None:
        """When `fit` may stop early."""
        return None if self.stop_at is None else Target(self.stop_at)


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings, TrainSettings):
    """What every script of a synthetic task has."""


def recurrent(layer: Callable, s: Settings, key):
    """An S5 in one direction or both."""
    layer_key, activation_key = jr.split(key)
    return layer(
        s.width,
        s.state_size,
        num_blocks=s.num_blocks,
        dt_min=s.dt_min,
        dt_max=s.dt_max,
        activation=nn.HalfGLU2(s.width, key=activation_key),
        key=layer_key,
    )


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


def attention(s: Settings, max_length: int, key):
    if s.num_heads < 1 or s.width % s.num_heads:
        raise ValueError(f"num_heads must divide width={s.width}, got {s.num_heads}")
    rotary = nn.Rotary(s.width // s.num_heads)
    return nn.Attention(s.width, s.num_heads, max_length=max_length, rotary=rotary, key=key)


def mixer(s: Settings, max_length: int) -> Callable:
    """The factory `key -> mixer` that the settings name, for sequences of up to `max_length`."""
    times: dict[str, Any] = {"dt_min": s.dt_min, "dt_max": s.dt_max}
    factories: dict[Mixer, Callable] = {
        "hyena-s5": partial(hyena_s5, s),
        "hyena": lambda key: nn.hyena(s.width, max_length, order=s.order, key=key),
        "h3": lambda key: nn.h3(s.width, s.state_size, **times, key=key),
        "s5": partial(recurrent, nn.S5, s),
        "s4d": lambda key: nn.S4D(s.width, s.state_size, **times, key=key),
        "long-conv": lambda key: nn.LongConv(s.width, max_length, init=nn.GeometricDecay(), key=key),
        "attention": partial(attention, s, max_length),
        "lru": partial(lru, s),
        "rg-lru": lambda key: nn.RGLRU(s.width, key=key),
        "bidirectional-s5": partial(recurrent, nn.BidirectionalS5, s),
        "bidirectional-s4d": lambda key: nn.BidirectionalS4D(s.width, s.state_size, **times, key=key),
    }
    return factories[s.mixer]


def build(s: Settings, task: AbstractSynthetic, max_length: int) -> Callable:
    """The model that suits the task, as a function of a key: of next tokens, of a class, or of numbers at each step."""
    layers: dict[str, Any] = {"num_layers": s.num_layers, "mlp_width": s.mlp_width}
    init: AbstractInit = S5Init() if s.published else DefaultInit()

    def encoder(inputs, key):
        return SequenceEncoder(inputs, mixer(s, max_length), **layers, init=init, key=key)

    def model(key):
        in_key, body_key, out_key = jr.split(key, 3)
        if isinstance(task, AbstractLabelTask):
            body = encoder(eqx.nn.Embedding(task.vocab_size, s.width, key=in_key), body_key)
            return Classifier(body, task.num_classes, init=init, key=out_key)
        if isinstance(task, AbstractSeriesTask):
            body = encoder(eqx.nn.Linear(task.num_features, s.width, key=in_key), body_key)
            return Regressor(body, task.num_outputs, init=init, key=out_key)
        assert isinstance(task, AbstractTokenTask)
        return LanguageModel(
            task.vocab_size,
            s.width,
            mixer(s, max_length),
            **layers,
            embed_dropout=s.embed_dropout,
            init=init,
            key=key,
        )

    return model


def started(file: str, build: Callable) -> Callable:
    """As `build`, with the weights in the file."""
    model = load(Path(file))
    sizes = lambda tree: [
        (jax.tree_util.keystr(path), a.shape) for path, a in jax.tree_util.tree_leaves_with_path(tree)
    ]
    given = sizes(eqx.filter(model, eqx.is_array))
    wanted = sizes(
        eqx.filter(eqx.filter_eval_shape(build, jr.key(0)), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    )
    for one, other in itertools.zip_longest(wanted, given, fillvalue=("nothing", ())):
        if one != other:
            raise ValueError(
                f"start must hold the model that the settings describe, with {one[0]} {one[1]}, but {file} has "
                f"{other[0]} {other[1]}; give the settings of its run"
            )

    def begin(key):  # numbers and functions are those of the settings: a saved model drops nothing
        return eqx.combine(eqx.filter(model, eqx.is_array), eqx.filter(build(key), eqx.is_array, inverse=True))

    return begin


def groups(s: TrainSettings):
    if s.published:
        return PublishedGroups(s.lr, s.lr, PublishedCosine(s.steps, s.warmup), weight_decay=s.weight_decay)
    return DefaultGroups(s.lr, WarmupCosine(s.steps, s.warmup), weight_decay=s.weight_decay)


def trainer(s: Settings, task: AbstractSynthetic, max_length: int) -> Trainer:
    """What trains that model on the task."""
    losses: dict[type, Callable] = {LabelledBatch: label, SeriesBatch: squared_error}
    model = build(s, task, max_length)
    return Trainer(
        model if s.start is None else started(s.start, model),
        task,
        groups(s),
        batch_size=s.batch_size,
        steps_per_dispatch=s.steps_per_dispatch,
        eval_batch_size=s.eval_batch_size,
        seed=s.seed,
        loss=losses.get(task.batch, partial(next_token, chunk=None if s.mixer in WINDOWS else s.chunk)),
    )
