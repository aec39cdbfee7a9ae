"""Associative recall over 131,072 tokens: the speed of a step beside the same step in plain JAX, then the training.

    python tests/gpu/recall_131k.py --run recall --seconds 400                    # a part of the training, or its end
    python tests/gpu/recall_131k.py --dry                                         # the same at L=4,096, on any machine

First a step of `assoc_recall.py 131k-30`, each way in a process of its own, since a device counts its peak memory by
process: this library's, the sequence whole and in pieces, and the research code's, with `associative_scan`. Then that
script, which continues the run in the folder if there is one, and is asked to stop when the time is over; its
checkpoints hold the weights and twice as much of the optimiser. Prints Markdown. It ends with 0 whether the training is
at its end or not; in the folder is `result.json` when it is.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "assoc_recall.py"
WAYS = ("s5eqx", "s5eqx, in pieces", "as written")


def settings(s):
    """Those of the preset, and its changes in a dry run, as words and as an object."""
    sys.path.insert(0, str(SCRIPT.parent))
    from _command import parse
    from _training import Where
    from assoc_recall import PRESETS

    small = f"--length {s.length} --batch-size 2 --chunk {s.length // 4} --num-test 16 --eval-batch-size 4 --steps 30"
    small += " --eval-every 10 --checkpoint-every 10 --warmup 5"
    words = ["131k-30", *(small.split() if s.dry else [])]
    return words, parse(PRESETS, Where(), None, [str(SCRIPT), *words])[1]


def measure(s, way):
    """Time, tokens a second, peak memory and the last loss of a few steps, as JSON."""
    _, recall = settings(s)
    import dataclasses

    import _as_written
    import jax
    import numpy as np
    from _models import trainer
    from assoc_recall import task

    from s5eqx.train import WarmupCosine, peak_memory

    steps = 2 if s.dry else 10
    chunk = recall.chunk if way == "s5eqx, in pieces" else None
    recall = dataclasses.replace(recall, steps_per_dispatch=steps, chunk=chunk)
    data = task(recall, recall.length)
    ours = trainer(recall, data, data.sequence_length)
    if way == "as written":
        weights = _as_written.weights(ours.unflatten(ours.init()).model)
        schedule = WarmupCosine(recall.steps, recall.warmup)(recall.lr)
        options = {"weight_decay": recall.weight_decay, "batch_size": recall.batch_size, "steps": steps}
        state, run = _as_written.training(weights, data, schedule, **options)
        run = jax.jit(run, donate_argnums=0)
    else:
        state = ours.init()

        def run(leaves):
            leaves, metrics = ours.run(leaves)
            return leaves, metrics["loss"]

    state, losses = run(state)  # compiles
    jax.block_until_ready(losses)
    began = time.perf_counter()
    state, losses = run(state)
    losses = np.asarray(losses)
    seconds = (time.perf_counter() - began) / steps
    tokens = recall.batch_size * data.sequence_length
    found = {"seconds": seconds, "tokens": tokens / seconds, "peak": peak_memory(), "loss": float(losses[-1])}
    print(json.dumps(found | {"device": str(jax.devices()[0].device_kind)}))


def in_its_own_process(s, way):
    words = [sys.executable, __file__, "--way", way, *(["--dry", "--length", f"{s.length}"] if s.dry else [])]
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    text = done.stderr.strip().splitlines()
    reason = next((line for line in text if "RESOURCE_EXHAUSTED" in line or "Out of memory" in line), None)
    if reason is None:
        sys.exit(done.stderr)
    return {"reason": "out of memory"}


def steps(s):
    """The table of a step."""
    found = {way: in_its_own_process(s, way) for way in WAYS}
    _, recall = settings(s)
    print(f"- a step at batch {recall.batch_size}, L = {recall.length:,}, V = {recall.vocab_size}\n")
    print("| step | s | steps/s | tokens/s | peak memory, GiB | loss |\n|---|---|---|---|---|---|")
    for way, row in found.items():
        if "reason" in row:
            print(f"| {way} | {row['reason']} | | | | |")
            continue
        print(
            f"| {way} | {row['seconds']:.3f} | {1 / row['seconds']:.2f} | {row['tokens']:,.0f} | "
            f"{row['peak'] / 2**30:.2f} | {row['loss']:.5f} |"
        )
    losses = [row["loss"] for row in found.values() if "loss" in row]
    if not losses:
        sys.exit("no way to a step fits into this device's memory")
    if max(losses) - min(losses) > 1e-3 * max(losses):
        sys.exit(f"the ways must train alike, but their losses are {losses}")
    device = next(row["device"] for row in found.values() if "device" in row)
    print(f"\n- device: {device}", flush=True)


def train(s, until):
    """The script, until it ends or the time is over; what it has come to."""
    words, recall = settings(s)
    folder = s.run.absolute()
    resume = ["--resume"] if (folder / "settings.json").exists() else []
    command = [sys.executable, str(SCRIPT), *words, "--run", str(folder), *resume]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        process.communicate(timeout=max(1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves, and says how to continue
        process.communicate()
    if process.returncode not in (0, -signal.SIGTERM):  # or it was asked before it could listen
        sys.exit(f"the training ended with {process.returncode}")
    checkpoints = [path for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    done = max((int(path.name) for path in checkpoints), default=0)
    newest = folder / "checkpoints" / str(done)
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / 2**20
    print(f"- command: `python experiments/assoc_recall.py {' '.join(words)}`")
    print(f"- trained: {done:,} of {recall.steps:,} steps; a checkpoint has {size:.1f} MiB")
    page = folder / "result.json"
    if not page.exists():
        print("- not at its end: the same command continues")
        return
    result = json.loads(page.read_text())
    print(
        f"- accuracy {100 * result['test_accuracy']:.2f} % on {recall.num_test} (published: 97.2 %), "
        f"{result['seconds']:,.0f} s, {result['steps_per_second']} steps/s, {result['tokens_per_second']:,} tokens/s, "
        f"peak memory {result['peak_memory_MiB']:,} MiB, commit {result['commit']}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("recall_131k"), help="the training's folder")
    parser.add_argument("--seconds", type=float, default=400, help="time for all of it")
    parser.add_argument("--dry", action="store_true", help="L=4,096 and few steps, on whatever device there is")
    parser.add_argument("--length", type=int, default=4096, help="tokens in a dry run")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process and print JSON")
    s = parser.parse_args()
    if s.way:
        measure(s, s.way)
        return
    if s.length < 16:
        sys.exit(f"error: length must be at least 16, got {s.length}")
    if s.seconds <= 0:
        sys.exit(f"error: seconds must be positive, got {s.seconds}")
    until = time.monotonic() + s.seconds
    if not (s.run / "settings.json").exists():  # where there is a run, they have been measured
        steps(s)
    train(s, until)


if __name__ == "__main__":
    main()
