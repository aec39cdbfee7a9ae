"""What is said when training comes to a number that is not finite."""

from pathlib import Path

from s5eqx.train.step import Trainer


def bad_step(step: int, loss: float, norm: float, *, trainer: Trainer, good: Path | None) -> FloatingPointError:
    """The error for a loss or gradient at `step`, counted from 0; `good` is the newest checkpoint."""
    first, tolerated = step * trainer.batch_size, trainer.skip_nonfinite
    after = f", after {tolerated} such steps in a row that were passed over" if tolerated else ""
    return FloatingPointError(
        f"loss and gradient must stay finite, but at step {step} the loss is {loss} and the norm of the gradient {norm}"
        f"{after}; its batch: training examples {first} to {first + trainer.batch_size - 1}; {_advice(good)}"
    )


def bad_weights(steps: int, *, good: Path | None) -> FloatingPointError:
    """The error for weights that are not finite after so many steps, though every loss and gradient was."""
    return FloatingPointError(f"weights must stay finite, but after {steps} steps one is not; {_advice(good)}")


def _advice(good: Path | None) -> str:
    left = "there is no checkpoint" if good is None else f"the last good checkpoint is {good}"
    return (
        f"{left}. Resumed, the run would come here again: start one with a lower learning rate, a longer warm-up, a "
        f"clipped gradient or skip_nonfinite"
    )
