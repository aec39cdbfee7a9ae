"""Hyena-S5 and a Transformer of as many parameters on the same text, each at the best of the same learning rates.

    python experiments/compare_text.py --data 'books/*.txt' -- --unique  # what follows -- goes to wikitext103.py
    python experiments/compare_text.py --rates 1e-3 2e-3 --seeds 5       # another grid, more seeds
    python experiments/compare_text.py --plot out.png --json out.json    # with curves and all the numbers

Trains the presets `tiny` and `tiny-transformer` of `wikitext103.py` at each learning rate with seed 0, then the best of
each, by the perplexity on the validation part, with the other seeds: one process after the other, ten by default. A
table in Markdown comes at the end. Every run has a folder of its own in `--folder`; the same command, started again,
keeps the runs that are done and continues the one that was broken off.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

from _command import check_file, parse
from _language_models import PRESETS
from wikitext103 import Where

from s5eqx.train import interruption

SCRIPT = Path(__file__).with_name("wikitext103.py")


def train(folder: Path, words: list[str]) -> dict:
    """The result of the run in this folder, which is started, continued or only read."""
    preset, settings, _ = parse(PRESETS, Where(), None, [str(SCRIPT), *words])
    page = folder / "result.json"
    if not page.exists():
        resume = ["--resume"] if (folder / "settings.json").exists() else []
        command = [sys.executable, str(SCRIPT), *words, "--run", str(folder), *resume]
        print(f"{folder.name} ...", file=sys.stderr)
        with interruption():  # Ctrl-C reaches the run too, which saves a checkpoint
            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code:
            sys.exit(f"error: the run in {folder} failed; mend what it says and start this command again")
        if not page.exists():
            sys.exit(f"stopped in {folder}; the same command continues")
    result = json.loads(page.read_text())
    wanted = json.loads(json.dumps({"preset": preset, **dataclasses.asdict(settings)}))
    for name, value in wanted.items():
        if result["settings"].get(name) != value:
            raise ValueError(
                f"a comparison continues with its own settings, but in {folder} {name} was "
                f"{result['settings'].get(name)!r} and is now {value!r}; name another folder"
            )
    return result


def compare(preset: str, rates: list[float], seeds: int, folder: Path, given: list[str]) -> dict[float, list[dict]]:
    """The results by learning rate: the best rate has one for each seed, the others that of seed 0."""

    def run(rate: float, seed: int) -> dict:
        words = [preset, *given, "--lr", f"{rate:g}", "--seed", f"{seed}"]
        return train(folder / f"{preset}-lr{rate:g}-seed{seed}", words)

    results = {rate: [run(rate, 0)] for rate in rates}
    best = best_rate(results)
    results[best] += [run(best, seed) for seed in range(1, seeds)]
    return results


def best_rate(results: dict[float, list[dict]]) -> float:
    """The learning rate with the least perplexity on the validation part, of seed 0."""
    return min(results, key=lambda rate: results[rate][0]["validation_perplexity"])


def table(found: dict[str, dict[float, list[dict]]], seeds: int) -> str:
    """The learning rates of each preset, in Markdown."""
    head = f"validation perplexity, seed 0 | test perplexity (seeds: {seeds}) | parameters | seconds a run"
    lines = [f"| mixer | learning rate | {head} |", "|---|---|---|---|---|---|"]
    for results in found.values():
        for rate, runs in results.items():
            first, test = runs[0], [run["test_perplexity"] for run in runs]
            deviation = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
            tested = f"{statistics.mean(test):.2f}{deviation}" if rate == best_rate(results) else ""
            seconds = statistics.mean(run["seconds"] for run in runs)
            lines.append(
                f"| {first['settings']['mixer']} | {rate:g} | {first['validation_perplexity']:.2f} | {tested} | "
                f"{first['parameters']:,} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def draw(found: dict[str, dict[float, list[dict]]], file: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, results in enumerate(found.values()):
        rate = best_rate(results)
        for run in results[rate]:
            label = f"{run['settings']['mixer']}, learning rate {rate:g}" if run is results[rate][0] else None
            axes.plot(*zip(*run["validation_curve"], strict=True), color=f"C{number}", label=label)
    axes.set(xlabel="step", ylabel="validation perplexity, a line a seed", yscale="log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:.0f}")
    axes.legend()
    figure.savefig(file, dpi=120)


def main(words: list[str]):
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the corpus, as wikitext103.py takes it; WikiText-103 if not given")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 8e-3, 2e-2], help="peak learning rates")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best learning rate")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["tiny", "tiny-transformer"])
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="where the runs are")
    parser.add_argument("--plot", type=Path, help="draw the validation curves of the best into this file")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    s = parser.parse_args(words[:cut])
    if s.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {s.seeds}")
    for name, file in (("plot", s.plot), ("json", s.json)):
        check_file(name, file)
    given = [*([] if s.data is None else ["--data", s.data]), *words[cut + 1 :]]
    found = {preset: compare(preset, s.rates, s.seeds, s.folder, given) for preset in s.presets}
    print(table(found, s.seeds))
    if s.plot is not None:
        draw(found, s.plot)
    if s.json is not None:
        s.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
