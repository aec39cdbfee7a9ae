"""How a learning rate runs over the steps. A schedule has a shape; each parameter group gives its peak."""

import abc
import dataclasses

import optax


class AbstractSchedule(abc.ABC):
    """The shape of a learning rate: `schedule(peak)` is a function of the step, counted from 0."""

    @abc.abstractmethod
    def __call__(self, peak: float) -> optax.Schedule:
        """The learning rate that peaks at `peak`."""


def _check_warmup(steps: int, warmup: int):
    if not 0 <= warmup < steps:
        raise ValueError(f"the warm-up is a part of the steps: 0 <= warmup < {steps} must hold, got warmup={warmup}")


@dataclasses.dataclass(frozen=True)
class WarmupCosine(AbstractSchedule):
    """Linear from 0 to the peak over `warmup` steps, then half a cosine down to `final` at `steps`.

    **Arguments:**

    - `steps`: the whole length, warm-up included, in steps.
    - `warmup`: length of the warm-up, in steps. With any, the first step has rate 0.
    - `final`: the rate at the end, as a fraction of the peak.
    """

    steps: int
    warmup: int
    final: float = 0.0

    def __post_init__(self):
        _check_warmup(self.steps, self.warmup)

    def __call__(self, peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, self.warmup, self.steps, self.final * peak)


@dataclasses.dataclass(frozen=True)
class PublishedCosine(AbstractSchedule):
    """The cosine of the S5 branch's training script, which takes the warm-up off twice.

    The rate reaches 0 at `steps - warmup` and stays there: the last `warmup` steps change nothing.

    Source: lindermanlab/S5, branch `development`.
    """

    steps: int
    warmup: int

    def __post_init__(self):
        _check_warmup(self.steps - self.warmup, self.warmup)

    def __call__(self, peak: float) -> optax.Schedule:
        return WarmupCosine(self.steps - self.warmup, self.warmup)(peak)


@dataclasses.dataclass(frozen=True)
class WarmupConstant(AbstractSchedule):
    """Linear from 0 to the peak over `warmup` steps, then the peak."""

    warmup: int = 0

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")

    def __call__(self, peak: float) -> optax.Schedule:
        if self.warmup == 0:  # a ramp of no steps is optax's way to stay at 0
            return optax.constant_schedule(peak)
        return optax.warmup_constant_schedule(0.0, peak, self.warmup)
