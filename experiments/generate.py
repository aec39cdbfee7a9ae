"""Text from a model that `s5eqx.interop.save` wrote, on standard output as it comes.

    python experiments/generate.py text.safetensors "Once upon a time" --temperature 0.8 --top-p 0.95
    python experiments/generate.py text.safetensors - --num-tokens 1000 --stop 10 < book.txt
    python experiments/generate.py --help                       # every setting

A model of 256 tokens or more reads and writes UTF-8, one token a byte. With `--tokenizer tokenizer.json` it reads and
writes text by that file, such as `wikitext103.py` puts beside its model. With `--ids` the prompt and the output are
numbers of tokens, for any model. Ctrl-C ends the text. The last line of standard error has the speed and the settings.

A model that recalls, trained in a minute and asked for the value of a key:

    python experiments/assoc_recall.py --run runs/recall
    python experiments/generate.py runs/recall/model.safetensors --ids --num-tokens 1 --greedy \\
        "1 6 3 5 1 6 2 8 4 7 3 5 2 8 1 6 4 7 3 5 9 2"

Expected: 8. The prompt is ten pairs of a key, 1 to 4, and its value, 5 to 8; then 9, which is `=>`, and the key 2.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax.random as jr
import numpy as np
import tyro
from _alphabet import AbstractAlphabet, Numbers, Utf8, Words

from s5eqx.data import read_tokenizer
from s5eqx.generate import stream
from s5eqx.interop import load
from s5eqx.models import LanguageModel
from s5eqx.samplers import Chain, Greedy, MinP, Temperature, TopK, TopP


@dataclasses.dataclass(frozen=True)
class Settings:
    model: tyro.conf.Positional[Path]
    """File that `s5eqx.interop.save` wrote."""
    prompt: tyro.conf.Positional[str]
    """What the model is to go on with; `-` reads it from standard input."""
    ids: bool = False
    """Prompt and output are numbers of tokens with spaces between them, not text."""
    tokenizer: Path | None = None
    """The tokenizer.json that says which text is which tokens; None for bytes."""
    num_tokens: int = 200
    """Tokens to generate."""
    temperature: float = 1.0
    """Divides the logits; at 0 the most probable token is taken."""
    top_k: int | None = None
    """Then keeps so many most probable tokens; None for all."""
    top_p: float | None = None
    """Then keeps the most probable tokens that reach this probability together; None for all."""
    min_p: float | None = None
    """Then keeps tokens of at least this fraction of the largest probability; None for all."""
    greedy: bool = False
    """Take the most probable token, in place of the four above."""
    seed: int = 0
    """Chooses what is drawn."""
    stop: tuple[int, ...] = ()
    """Numbers of the tokens that end the text; without a tokenizer they are bytes, so that 10 is the end of a line."""
    every: int = 1
    """Tokens computed before they are shown; more at a time are faster."""


def alphabet(s: Settings, vocab_size: int) -> AbstractAlphabet:
    """How prompt and output are written."""
    if s.ids and s.tokenizer is not None:
        raise ValueError("ids are numbers of tokens and a tokenizer makes text of them: leave out one of the two")
    if s.ids:
        return Numbers()
    if s.tokenizer is None:
        if vocab_size < 256:
            raise ValueError(f"text needs a model of the 256 bytes, this one has {vocab_size} tokens; use --ids")
        return Utf8()
    tokenizer = read_tokenizer(s.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer must have at most the {vocab_size} tokens of the model, {s.tokenizer} has "
            f"{tokenizer.vocab_size}; give the one that the model was trained with"
        )
    return Words(tokenizer)


def read_prompt(s: Settings, letters: AbstractAlphabet) -> list[int]:
    """The tokens of the prompt."""
    text = sys.stdin.buffer.read() if s.prompt == "-" else s.prompt.encode(errors="surrogateescape")
    tokens = letters.read(text)
    if not tokens:
        raise ValueError("the prompt must have at least one token, got none")
    return tokens


def sampler(s: Settings):
    if not s.greedy:
        filters = (
            Temperature(s.temperature),
            None if s.top_k is None else TopK(s.top_k),
            None if s.top_p is None else TopP(s.top_p),
            None if s.min_p is None else MinP(s.min_p),
        )
        return Chain(*[item for item in filters if item is not None])
    if (s.temperature, s.top_k, s.top_p, s.min_p) != (1.0, None, None, None):
        raise ValueError("greedy draws nothing: leave out temperature, top_k, top_p and min_p, or greedy")
    return Greedy()


def main(s: Settings):
    model = load(s.model)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{s.model} must hold a language model, it holds a {type(model).__name__}")
    letters = alphabet(s, len(model.embedding))
    prompt, draw = np.asarray(read_prompt(s, letters)), sampler(s)
    start, first, log_probs = time.perf_counter(), None, []
    tokens = stream(model, prompt, s.num_tokens, key=jr.key(s.seed), sampler=draw, stop=s.stop, every=s.every)
    try:
        for token, log_prob in tokens:
            first = first or time.perf_counter()
            print(letters.write(int(token)), end="", flush=True)
            log_probs.append(log_prob)
    except KeyboardInterrupt:
        pass  # the text ends here
    print(letters.end())
    later, end = len(log_probs) - s.every, time.perf_counter()  # the first tokens come together
    summary = {
        "tokens": len(log_probs),
        "seconds_to_first": round(first - start, 2) if first else None,  # with the prompt and the compilation
        "tokens_per_second": round(later / (end - first), 1) if first and later > 0 else None,
        "log_prob": float(np.mean(log_probs)) if log_probs else None,  # nats a token, under the model itself
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(s).items()},
    }
    print(json.dumps(summary), file=sys.stderr)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except BrokenPipeError:  # whoever reads has enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped before the first token")
