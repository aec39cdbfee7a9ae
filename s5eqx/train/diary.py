"""What happened in a run: means over the steps between two records, and the speed."""

import math

import numpy as np

from s5eqx.train.loss import perplexity


class Diary:
    """Collects the metrics of steps into records. `history` is the list of them, fit for JSON.

    Each record has `step`, `seconds` and the values it was written with. Steps whose loss or gradient norm is not
    finite count in no mean.

    **Arguments:**

    - `split`: what the evaluated examples are called.
    - `tokens_per_step`: for the speed in tokens.
    - `tolerated`: how many steps in a row may be not finite.
    - `page`: what `page()` gave before; `None` for a new diary.
    """

    def __init__(self, split: str, *, tokens_per_step: int, tolerated: int = 0, page: dict | None = None):
        page = page or {"history": [], "pending": [], "nonfinite": 0}
        self.history: list[dict] = list(page["history"])
        self.summary = ""
        self._split, self._tokens, self._tolerated = split, tokens_per_step, tolerated
        self._pending = [{name: np.asarray(values) for name, values in metrics.items()} for metrics in page["pending"]]
        self._in_a_row: int = page["nonfinite"]
        self._first: tuple[int, float] = (0, 1.0)
        self._others: tuple[int, float] = (0, 0.0)
        self._tested = ""

    @property
    def steps_per_second(self) -> float:
        """The speed of the steps so far. The first dispatch, which compiles, counts only if it is alone."""
        steps, seconds = self._others if self._others[0] else self._first
        return steps / seconds

    @property
    def is_best(self) -> bool:
        """Whether the last record is an evaluation with less loss than any before."""
        losses = [record.get(f"{self._split}/loss", math.inf) for record in self.history]
        return bool(losses) and losses[-1] < min(losses[:-1], default=math.inf)

    def evaluated(self, step: int) -> float | None:
        """The loss of the evaluation after `step` steps; `None` if there was none, or it is not finite."""
        loss = self.history[-1].get(f"{self._split}/loss") if self.history else None
        is_it = loss is not None and self.history[-1]["step"] == step and math.isfinite(loss)
        return loss if is_it else None

    def page(self) -> dict:
        """All that a resumed run needs to go on writing, fit for JSON."""
        pending = [{name: values.tolist() for name, values in metrics.items()} for metrics in self._pending]
        return {"history": self.history, "pending": pending, "nonfinite": self._in_a_row}

    def add(self, step: int, metrics: dict[str, np.ndarray], seconds: float) -> int | None:
        """Takes in the metrics of one dispatch that ended at `step` and took `seconds`.

        Returns the first step, counted from 0, that is one more in a row than may be not finite; `None` if all is well.
        """
        metrics = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
        first = step - len(finite)
        for i, is_finite in enumerate(finite):
            self._in_a_row = 0 if is_finite else self._in_a_row + 1
            if self._in_a_row > self._tolerated:
                return first + i
        self._pending.append(metrics)
        if self._first[0] == 0:
            self._first = len(finite), seconds
        else:
            self._others = self._others[0] + len(finite), self._others[1] + seconds
        if finite.any():
            means = (f"{name} {metrics[name][finite].mean():.4f}" for name in ("loss", "accuracy") if name in metrics)
            self.summary = ", ".join(means) + self._tested
        return None

    def write(self, step: int, seconds: float, values: dict[str, float]) -> dict[str, float]:
        """Makes a record of the steps since the last one and of `values`, and returns its curves."""
        speed = {
            "speed/steps_per_second": self.steps_per_second,
            "speed/tokens_per_second": self.steps_per_second * self._tokens,
        }
        curves = {**self._means(), **values, **speed}
        self.history.append({"step": step, "seconds": seconds, **curves})
        self._pending.clear()
        for name in ("loss", "accuracy"):  # the accuracy, where there is one
            if f"{self._split}/{name}" in values:
                self._tested = f", {self._split} {values[f'{self._split}/{name}']:.4f}"
        return curves

    def _means(self) -> dict[str, float]:
        columns = {name: np.concatenate([m[name] for m in self._pending]) for name in self._pending[0]}
        finite = np.isfinite(columns["loss"]) & np.isfinite(columns["grad_norm"])
        means = {"train/skipped": float(np.sum(~finite))} if self._tolerated else {}
        if finite.any():
            for name, column in columns.items():
                means[name if "/" in name else f"train/{name}"] = float(column[finite].mean())
            if "train/accuracy" in means:
                means["train/perplexity"] = perplexity(means["train/loss"])
        return means
