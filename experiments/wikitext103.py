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
`tokenizer.json` and the model with the least validation loss, `model.safetensors`, which `generate.py` asks. Kill it
when you like: `--resume` goes on as if nothing had happened. The last line of standard output is the result.

    python experiments/generate.py runs/mine/model.safetensors "The sea" --tokenizer runs/mine/tokenizer.json
"""

import dataclasses
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _command import Place, parse
from _language_models import PRESETS, Settings, build, groups

from s5eqx.data import Bytes, Subwords, TextData, load_text, read_corpus, read_tokenizer, train_bpe
from s5eqx.generate import generate
from s5eqx.interop import save
from s5eqx.samplers import Chain, Temperature, TopP
from s5eqx.score import score
from s5eqx.train import (
    Trainer,
    commit,
    fit,
    make_mesh,
    next_token,
    on_one_device,
    open_run,
    perplexity,
    resume_command,
)


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
    prompt = np.asarray(text.task.evaluated[: max(1, min(32, s.length // 2))], np.int32)
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
    convention = (
        f"exp of the mean loss a token over the whole part; end-of-text after each document; windows of {s.length} "
        f"tokens without overlap, each from the empty state"
    )
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
        summary["test_perplexity_unbroken"] = perplexity(unbroken_loss(model, part.array, s))
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
