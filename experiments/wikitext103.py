"""Language modelling on WikiText-103, or on text of your own.

    python experiments/wikitext103.py                                # preset tiny: minutes on a laptop CPU
    python experiments/wikitext103.py --data 'books/*.txt' --unique  # your own text, as files or on the hub
    python experiments/wikitext103.py tiny-transformer               # the Transformer of as many parameters
    python experiments/wikitext103.py hyena-s5-125m --dtype bfloat16 # published: 18.3 perplexity after 100 K steps
    python experiments/wikitext103.py hyena-125m                     # the Hyena of the same code
    python experiments/wikitext103.py transformer-125m               # published: 18.6
    python experiments/wikitext103.py tiny --help                    # every setting, with that preset's values

Several devices: the batch is split over all of them, or each sequence over some, `--sequence-devices 8`. Several hosts:
start the same command on each with `--coordinator first-host:1234 --num-processes 4 --process-id 0` (1, 2, 3).

Perplexities follow WikiText-103's conventions where the corpus is that: GPT-2's 50,257 tokens, end-of-text after each
line that is not empty, the raw text as it is, the split as given, windows of 1,024 tokens without overlap, exp of the
mean loss a token. For a corpus of your own the same holds with its tokenizer, and a perplexity compares with those of
the same tokenizer only; bits a byte compare with all.

Everything goes to the run's folder: TensorBoard curves and samples, checkpoints, `curve.png`, `result.json`,
`tokenizer.json` and the model with the least validation loss, `model.safetensors`. Kill it when you like: `--resume`
goes on as if nothing had happened. The last line of standard output is the result.
"""

import dataclasses
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _command import Place, parse

from s5eqx import nn
from s5eqx.data import Bytes, Subwords, TextData, load_text, read_corpus, read_tokenizer, train_bpe
from s5eqx.generate import generate
from s5eqx.interop import save
from s5eqx.models import DefaultInit, GPT2Init, LanguageModel, S5Init
from s5eqx.samplers import Chain, Temperature, TopP
from s5eqx.score import score
from s5eqx.train import (
    AdamW,
    DefaultGroups,
    Muon,
    PublishedCosine,
    PublishedGroups,
    ScheduleFree,
    Soap,
    Trainer,
    WarmupConstant,
    WarmupCosine,
    commit,
    fit,
    make_mesh,
    next_token,
    on_one_device,
    open_run,
    resume_command,
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


@dataclasses.dataclass(frozen=True)
class Where(Place):
    cache: Path | None = None
    """Folder for tokenised corpora; None for S5EQX_CACHE or ~/.cache/s5eqx."""
    profile: int = 0
    """Trace so many dispatches for TensorBoard's profile page."""
    sequence_devices: int = 1
    """Devices that share the length of each sequence (Hyena-S5); the batch is split over the others."""
    data_devices: int | None = None
    """Devices, or groups of those, that share the batch; None for all."""
    coordinator: str | None = None
    """Address of the first of several processes, host:port."""
    num_processes: int | None = None
    """How many processes train together."""
    process_id: int | None = None
    """Which of them this is, from 0."""


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


def read(s: Settings, cache: Path | None, progress: bool) -> tuple[TextData, Bytes | Subwords, dict[str, str]]:
    """The corpus as tasks, its tokenizer, and what tells both from others of the same name."""
    config = s.config if s.data == Settings.data or s.config != Settings.config else None
    corpus = read_corpus(s.data, config=config, column=s.column, unique=s.unique)
    if s.tokenizer == "bytes":
        tokenizer = Bytes()
    elif size := re.fullmatch(r"bpe-(\d+)", s.tokenizer):
        tokenizer = train_bpe(corpus.train, int(size[1]), cache=cache, progress=progress)
    else:
        tokenizer = read_tokenizer(s.tokenizer)
    options = {"seed": s.seed, "packed": s.packed, "cache": cache, "progress": progress}
    text = load_text(corpus, tokenizer, length=s.length, **options)
    return text, tokenizer, {"corpus": corpus.train.fingerprint, "tokenizer": tokenizer.fingerprint}


def sample(model, text, tokenizer, s: Settings):
    """How the model goes on with the beginning of the validation part."""
    prompt = np.asarray(text.task.evaluated[: min(32, s.length // 2)], np.int32)
    tokens = min(s.sample_tokens, s.length - len(prompt))  # no model but Hyena-S5 goes on beyond its length
    sampler = Chain(Temperature(0.8), TopP(0.95))
    written = generate(model, prompt, tokens, key=jr.key(s.seed), sampler=sampler).tokens
    return f"{tokenizer.decode(prompt)} **...** {tokenizer.decode(written)}"


def unbroken_loss(model, tokens, s: Settings):
    """The mean loss a token where the state is carried through the whole part: no window, no reset."""
    total = score(model, np.asarray(tokens, np.int32), chunk=s.length)
    return -float(total) / (len(tokens) - 1)


def points(history, name):
    """The steps at which something was logged, and what it was."""
    return [(record["step"], record[name]) for record in history if name in record]


def draw(history, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("train/loss", "training"), ("validation/loss", "validation")):
        axes.plot(*zip(*points(history, name), strict=True), label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(file, dpi=120)


def train(preset: str, s: Settings, place: Where) -> dict | None:
    """Trains and tests; the result, or nothing if someone interrupted."""
    began = time.perf_counter()
    mesh = None
    if jax.device_count() > 1:
        mesh = make_mesh(place.data_devices, place.sequence_devices)
    elif place.sequence_devices > 1 or (place.data_devices or 1) > 1:
        make_mesh(place.data_devices, place.sequence_devices)  # says that there is one device
    first = jax.process_index() == 0
    text, tokenizer, fingerprints = read(s, place.cache, progress=first)
    trainer = Trainer(
        build(s, tokenizer.vocab_size),
        text.task,
        groups(s),
        batch_size=s.batch_size,
        steps_per_dispatch=s.steps_per_dispatch,
        eval_batch_size=s.eval_batch_size,
        seed=s.seed,
        loss=partial(next_token, logits_chunk=s.logits_chunk),
        mesh=mesh,
        compute_dtype=None if s.dtype == "float32" else jnp.dtype(s.dtype),
        accumulate=s.accumulate,
        skip_nonfinite=s.skip_nonfinite,
    )
    convention = f"exp of the mean loss a token over all of a part, windows of {s.length} without overlap"
    run = open_run(
        {"preset": preset, **dataclasses.asdict(s), "perplexity": convention, "fingerprints": fingerprints},
        folder=place.run,
        stem=f"wikitext103-{preset}",
        resume=place.resume,
        overwrite=place.overwrite,
    )
    if first:
        counts = ", ".join(f"{len(part.array):,} ({name})" for name, part in text.tokens.items())
        print(f"{trainer.num_parameters:,} parameters; tokens: {counts}; vocabulary {tokenizer.vocab_size:,}")
        print(f"perplexity: {convention}")
        print(f"run in {run.folder}, curves with: tensorboard --logdir {run.folder}", flush=True)

    def observe(model):
        model = on_one_device(model)
        return {"validation/sample": sample(model, text, tokenizer, s)} if first and s.sample_tokens else {}

    before = time.perf_counter() - began
    result = fit(
        trainer,
        steps=s.steps,
        eval_every=s.eval_every,
        log_every=s.log_every,
        checkpoint_every=s.checkpoint_every,
        run=run,
        observe=observe,
        profile=place.profile,
        seconds_before=before,
    )
    trained = time.perf_counter()
    if result.interrupted:
        if first:
            print(f"stopped at step {result.step}; continue with:\n{resume_command(run.folder, sys.argv)}")
        return None
    test = trainer.evaluate(trainer.flatten(result.best), task=text.test)
    model, part = on_one_device(trainer.model(result.best)), text.tokens["test"]
    summary = {
        "test_perplexity": test["perplexity"],
        "test_loss": test["loss"],
        "test_bits_per_byte": part.bits_per_byte(test["loss"]),
        "validation_perplexity": result.best_value("perplexity"),
        "validation_curve": points(result.history, "validation/perplexity"),
        "best_step": int(result.best.step),
        "parameters": trainer.num_parameters,
        "steps": result.step,
        "seconds": round(result.seconds + time.perf_counter() - trained, 1),
        "tokens_per_second": round(result.steps_per_second * trainer.tokens_per_step),
        "commit": commit(Path(__file__)),
        "versions": run.versions,
        "settings": run.settings,
    }
    if s.mixer == "hyena-s5" and not s.packed:  # whose state holds all that was before, in constant memory
        summary["test_perplexity_unbroken"] = math.exp(unbroken_loss(model, part.array, s))
    if first:
        draw(result.history, run.folder / "curve.png")
        save(run.folder / "model.safetensors", model)
        if isinstance(tokenizer, Subwords):
            tokenizer.save(run.folder / "tokenizer.json")
        (run.folder / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary))
    return summary


def main():
    preset, settings, place = parse(PRESETS, Where(), __doc__, sys.argv)
    if place.coordinator is not None:
        jax.distributed.initialize(place.coordinator, place.num_processes, place.process_id)
    try:
        train(preset, settings, place)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
