"""The language models of `wikitext103.py`: their settings, presets, and what is built of them."""

import dataclasses
from functools import partial
from typing import Literal

from s5eqx import nn
from s5eqx.models import DefaultInit, GPT2Init, LanguageModel, S5Init
from s5eqx.train import (
    AdamW,
    DefaultGroups,
    Muon,
    PublishedCosine,
    PublishedGroups,
    ScheduleFree,
    Soap,
    WarmupConstant,
    WarmupCosine,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    mixer: Literal["hyena-s5", "hyena", "transformer"] = "hyena-s5"
    """The sequence mixer of every block."""
    data: str = "Salesforce/wikitext"
    """A corpus of the Hugging Face hub, or a pattern of files: .txt (a file is a document), .parquet, .jsonl."""
    config: str | None = "wikitext-103-raw-v1"
    """Which of the corpora of that name on the hub; of no meaning for files."""
    column: str = "text"
    """Where rows have the text."""
    unique: bool = False
    """Leave out paragraphs that occurred before; for files."""
    tokenizer: str = "bpe-2048"
    """`bytes`, `bpe-N` (learned from the training part, N tokens), a tokenizer.json, or a model of the hub: `gpt2`."""
    packed: bool = False
    """Reset the state where a document begins; not for Hyena, which cannot forget."""
    width: int = 128
    """Channels of the model."""
    num_layers: int = 4
    """Blocks of mixer and MLP."""
    mlp_width: int = 512
    """Hidden channels of each MLP."""
    state_size: int = 64
    """Real states of each S5."""
    num_blocks: int = 4
    """HiPPO blocks that the states of an S5 start from."""
    conj_sym: bool = True
    """Keep one of each pair of conjugate states."""
    filter_width: int = 64
    """Width of the network that makes Hyena's filters."""
    num_heads: int = 4
    """Attention heads; each turns all of its channels by the position."""
    dropout: float = 0.0
    """Probability to drop an entry: inside Hyena's gates, or of the Transformer's branches."""
    embed_dropout: float = 0.0
    """Probability to drop an entry of the embedding."""
    length: int = 256
    """Tokens of a window."""
    batch_size: int = 16
    """Windows a step, on all devices together."""
    accumulate: int = 1
    """Compute a step in so many parts, to save memory."""
    optimizer: Literal["adamw", "muon", "soap", "schedule-free"] = "adamw"
    """Muon and SOAP train the dense layers, AdamW all the rest."""
    lr: float = 3e-3
    """Peak learning rate, a step."""
    recurrence_lr: float | None = None
    """Peak learning rate of the state-space models or filters; None for `lr`."""
    weight_decay: float = 0.1
    """Decay of the decaying group, a unit of learning rate."""
    clip_norm: float | None = 1.0
    """Longest gradient that passes unscaled; None for no clipping."""
    steps: int = 500
    """Training steps."""
    warmup: int = 50
    """Steps of linear warm-up, before a cosine to zero."""
    init: Literal["default", "gpt2", "s5"] = "default"
    """Initial weights: the library's, GPT-2's, or those of the S5 branch."""
    published: bool = False
    """Parameter groups, schedule and C of the S5 branch in place of the library's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the dense maths. Parameters, recurrences and losses stay in float32."""
    logits_chunk: int | None = 128
    """Steps whose logits are formed at once; None for all."""
    stack: bool = False
    """Compile one block for all."""
    remat: bool = False
    """Compute each block again in the backward pass, to save memory."""
    skip_nonfinite: int = 0
    """Pass over so many steps in a row whose loss or gradient is not finite."""
    steps_per_dispatch: int = 10
    """Steps between two returns to Python; divides `steps` and the three intervals below."""
    eval_every: int = 100
    """Steps between evaluations."""
    log_every: int = 20
    """Steps between points of the training curves."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    eval_batch_size: int = 16
    """Windows evaluated at once."""
    sample_tokens: int = 100
    """Length of the sample at each evaluation; 0 for none."""
    seed: int = 0
    """Chooses the order of the data and the initial weights."""


TINY = Settings()
LARGE = Settings(
    tokenizer="gpt2",
    width=768,
    num_layers=12,
    mlp_width=3072,
    length=1024,
    batch_size=32,
    stack=True,
    steps_per_dispatch=1,
    eval_every=1000,
    log_every=50,
    checkpoint_every=1000,
)
PUBLISHED = dataclasses.replace(
    LARGE,
    dropout=0.15,
    embed_dropout=0.2,
    lr=1e-3,
    recurrence_lr=8e-4,
    weight_decay=0.25,
    clip_norm=None,
    steps=115_000,
    warmup=1000,
    init="s5",
    published=True,
)
PRESETS = {
    "tiny": TINY,
    # Of as many parameters, to one in a thousand.
    "tiny-transformer": dataclasses.replace(TINY, mixer="transformer", mlp_width=584),
    "hyena-s5-125m": dataclasses.replace(PUBLISHED, state_size=128, num_blocks=32, conj_sym=False),
    "hyena-125m": dataclasses.replace(PUBLISHED, mixer="hyena", filter_width=128),
    "transformer-125m": dataclasses.replace(
        LARGE,
        mixer="transformer",
        init="gpt2",
        num_heads=12,
        dropout=0.1,
        embed_dropout=0.1,
        batch_size=512,
        accumulate=32,
        lr=6e-4,
        steps=22_500,
        warmup=225,
        eval_every=225,
        checkpoint_every=225,
        log_every=5,
    ),
}


def hyena_s5(s: Settings, key):
    return nn.hyena_s5(
        s.width,
        s.state_size,
        num_blocks=s.num_blocks,
        conj_sym=s.conj_sym,
        C_init=nn.ComplexNormal() if s.published else nn.TruncatedNormal(),
        activation=lambda width, *, key: nn.Gelu(),
        dropout=s.dropout,
        key=key,
    )


def hyena(s: Settings, key):
    return nn.hyena(s.width, s.length, filter_width=s.filter_width, dropout=s.dropout, key=key)


def attention(s: Settings, key):
    rotary = nn.Rotary(s.width // s.num_heads)
    return nn.Attention(s.width, s.num_heads, max_length=s.length, rotary=rotary, dropout=s.dropout, key=key)


MIXERS = {"hyena-s5": hyena_s5, "hyena": hyena, "transformer": attention}


def build(s: Settings, vocab_size: int):
    def model(key):
        return LanguageModel(
            vocab_size,
            s.width,
            partial(MIXERS[s.mixer], s),
            num_layers=s.num_layers,
            mlp_width=s.mlp_width,
            embed_dropout=s.embed_dropout,
            dropout=s.dropout if s.mixer == "transformer" else 0.0,
            stack=s.stack,
            remat=s.remat,
            init={"default": DefaultInit(), "gpt2": GPT2Init(), "s5": S5Init()}[s.init],
            key=key,
        )

    return model


def groups(s: Settings):
    rates = s.lr, s.lr if s.recurrence_lr is None else s.recurrence_lr
    if s.published:
        schedule = PublishedCosine(s.steps, s.warmup)
        return PublishedGroups(*rates, schedule, weight_decay=s.weight_decay, clip_norm=s.clip_norm)
    averaged = s.optimizer == "schedule-free"
    return DefaultGroups(
        s.lr,
        WarmupConstant(s.warmup) if averaged else WarmupCosine(s.steps, s.warmup),
        recurrence_lr=s.recurrence_lr,
        weight_decay=s.weight_decay,
        clip_norm=s.clip_norm,
        rule=ScheduleFree() if averaged else AdamW(),
        dense={"muon": Muon(), "soap": Soap()}.get(s.optimizer),
    )
