"""Rules: what a group of parameters does with its gradient."""

import abc
import dataclasses
from collections.abc import Callable

import jax
import optax

from s5eqx.train.soap import check_decay_rates, scale_by_soap


class AbstractRule(abc.ABC):
    """How the parameters of one group step.

    `rule(learning_rate, weight_decay)` is an optax transformation of gradients into steps. `learning_rate` is a
    function of the number of the step; weight decay is decoupled: a step takes `learning_rate * weight_decay` of a
    weight off.
    """

    @abc.abstractmethod
    def __call__(self, learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
        """The transformation of gradients into steps."""


@dataclasses.dataclass(frozen=True)
class AdamW(AbstractRule):
    """Adam with decoupled weight decay. `b1`, `b2`: decay rates of the moments.

    Source: arXiv 1711.05101.
    """

    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self):
        check_decay_rates(b1=self.b1, b2=self.b2)

    def __call__(self, learning_rate, weight_decay):
        return optax.adamw(learning_rate, self.b1, self.b2, weight_decay=weight_decay)


@dataclasses.dataclass(frozen=True)
class Muon(AbstractRule):
    """Momentum made orthogonal by Newton–Schulz iterations. For the weights of dense layers alone, `(..., out, in)`;
    the axes in front are stacks of them.

    **Arguments:**

    - `beta`: decay rate of the momentum.
    - `rms`: root mean square of the entries of a step of rate 1. With 0.2, about AdamW's, the learning rates and weight
      decays of AdamW serve. `None` for `√max(1, out / in)` times an orthogonal matrix, which takes larger rates.

    Source: arXiv 2502.16982; the iteration is optax's.
    """

    beta: float = 0.95
    rms: float | None = 0.2

    def __post_init__(self):
        check_decay_rates(beta=self.beta)

    def __call__(self, learning_rate, weight_decay):
        axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
        return optax.contrib.muon(
            learning_rate,
            beta=self.beta,
            weight_decay=weight_decay,
            consistent_rms=self.rms,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: axes, params),
        )


@dataclasses.dataclass(frozen=True)
class Soap(AbstractRule):
    """Adam in the eigenbases of Shampoo's factors. For matrices; the axes in front of the last two are stacks of them.

    The arguments are those of `scale_by_soap`. Where a gradient has next to nothing, rounding decides on directions of
    whole steps: other numbers of devices or parts give other runs, though as good ones.

    Source: arXiv 2409.11321.
    """

    b1: float = 0.95
    b2: float = 0.95
    precondition_frequency: int = 10
    max_size: int = 10_000
    shampoo_decay: float | None = None

    def __call__(self, learning_rate, weight_decay):
        direction = scale_by_soap(
            self.b1,
            self.b2,
            precondition_frequency=self.precondition_frequency,
            max_size=self.max_size,
            shampoo_decay=self.shampoo_decay,
        )
        return optax.chain(
            direction, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
        )


@dataclasses.dataclass(frozen=True)
class Optax(AbstractRule):
    """Any optimiser that optax makes of a learning rate, such as `Optax(optax.contrib.ademamix)`.

    The group's weight decay is added to its steps; an option of `make` for the same comes on top. An optimiser that
    finds its own rate, such as `optax.contrib.prodigy`, takes a group with peak rate 1, without decay; Prodigy also, if
    the rate warms up from 0, its option `safeguard_warmup`, since it divides 0 by 0 without.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]

    def __call__(self, learning_rate, weight_decay):
        optimiser = self.make(learning_rate)
        if not isinstance(optimiser, optax.GradientTransformation):
            raise ValueError(
                "`make` must return an `optax.GradientTransformation` for a learning rate, but returned a "
                f"{type(optimiser).__name__}. Pass the function, such as `optax.contrib.ademamix`, not its result."
            )
        decay = optax.add_decayed_weights(lambda step: -weight_decay * learning_rate(step))
        return optax.chain(optimiser, decay) if weight_decay else optimiser


@dataclasses.dataclass(frozen=True)
class ScheduleFree(AbstractRule):
    """A rule whose steps are averaged in place of a falling learning rate.

    The parameters in training lie between the rule's own and their average; it is the average that is evaluated and
    saved (`AbstractGroups.evaluated`). Take it for every group, with a schedule that warms up and then stays, such as
    `WarmupConstant`.

    **Arguments:**

    - `rule`: without momentum of its own: the averaging stands for it.
    - `b1`: how near the average the parameters in training lie, above 0 and below 1.

    Source: arXiv 2405.15682.
    """

    rule: AbstractRule = AdamW(b1=0.0)
    b1: float = 0.9

    def __post_init__(self):
        if not 0 < self.b1 < 1:
            raise ValueError(f"b1 is the weight of the average: 0 < b1 < 1 must hold, got {self.b1}")

    def __call__(self, learning_rate, weight_decay):
        return optax.contrib.schedule_free(self.rule(learning_rate, weight_decay), learning_rate, self.b1)
