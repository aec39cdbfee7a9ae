"""What happened in a run: means over the steps between two records, and the speed."""

import numpy as np


class Diary:
    """Collects the metrics of steps into records. `history` is the list of them, fit for JSON.

    Each record has `step`, `seconds` and the values it was written with.
    """

    def __init__(self, history: list[dict]):
        self.history = history
        self.summary = ""
        self._since_record: list[dict[str, np.ndarray]] = []
        self._first: tuple[int, float] = (0, 1.0)
        self._others: tuple[int, float] = (0, 0.0)
        self._tested = ""

    @property
    def steps_per_second(self) -> float:
        """The speed of the steps so far. The first dispatch, which compiles, counts only if it is alone."""
        steps, seconds = self._others if self._others[0] else self._first
        return steps / seconds

    def add(self, step: int, metrics: dict[str, np.ndarray], seconds: float) -> None:
        """Takes in the metrics of one dispatch that ended at `step` and took `seconds`."""
        loss = metrics["loss"]
        if not np.all(np.isfinite(loss)):
            bad = step - len(loss) + int(np.argmin(np.isfinite(loss)))
            raise FloatingPointError(
                f"the loss must stay finite, but at step {bad} it is {loss[np.argmin(np.isfinite(loss))]}; "
                f"lower the learning rate, lengthen the warm-up or clip the gradient"
            )
        self._since_record.append(metrics)
        if self._first[0] == 0:
            self._first = len(loss), seconds
        else:
            self._others = self._others[0] + len(loss), self._others[1] + seconds
        self.summary = f"loss {loss.mean():.4f}, accuracy {metrics['accuracy'].mean():.4f}{self._tested}"

    def write(self, step: int, seconds: float, values: dict[str, float]) -> dict[str, float]:
        """Makes a record of the steps since the last one and of `values`, and returns its curves."""
        means = {
            name if "/" in name else f"train/{name}": float(np.mean([m[name] for m in self._since_record]))
            for name in self._since_record[0]
        }
        speed = {"speed/steps_per_second": self.steps_per_second}
        curves = {**means, **values, **speed}
        self.history.append({"step": step, "seconds": seconds, **curves})
        self._since_record.clear()
        if "test/accuracy" in values:
            self._tested = f", test {values['test/accuracy']:.4f}"
        return curves
