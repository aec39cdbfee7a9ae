"""What comes of training, and when it is enough."""

import dataclasses

from s5eqx.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Target:
    """Training is over when the evaluated accuracy is at least `accuracy` in `hold` evaluations in a row."""

    accuracy: float
    hold: int = 1

    def reached(self, history: list[dict], split: str = "test") -> bool:
        """Whether the last records of these examples say so."""
        name = f"{split}/accuracy"
        found = [record[name] for record in history if name in record]
        return len(found) >= self.hold and min(found[-self.hold :]) >= self.accuracy


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of `fit`.

    `state` is the last one and `best` the one with the least evaluated loss, of those that were saved: without a run
    it is the last one too. `history` has a record for each time something was logged: `step`, `seconds` of training
    until then, the means of the metrics since the last record (`train/loss`, ...) and, after an evaluation,
    `test/loss`, `test/accuracy` and `test/perplexity`, with the task's `split` in place of `test`. `steps_per_second`
    is that of this process, without compilation and evaluation.
    """

    state: TrainState
    best: TrainState
    step: int
    history: list[dict]
    seconds: float
    steps_per_second: float
    interrupted: bool
    split: str = "test"

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds until an evaluation first had this accuracy; `None` if none had."""
        reached = (r["seconds"] for r in self.history if r.get(f"{self.split}/accuracy", -1.0) >= accuracy)
        return next(reached, None)

    def best_value(self, name: str) -> float | None:
        """What the evaluation of `best` found: its `loss`, `accuracy` or `perplexity`; `None` if there was none."""
        step = int(self.best.step)
        return next((r.get(f"{self.split}/{name}") for r in self.history if r["step"] == step), None)
