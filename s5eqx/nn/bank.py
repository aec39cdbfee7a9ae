"""The long operators of a Hyena layer, owned together so that they may share parameters."""

import abc
from typing import ClassVar

from s5eqx.nn._mixer import AbstractCausalMixer, AbstractLayer


class AbstractFilterBank(AbstractLayer):
    """Owns the `N - 1` long operators of a Hyena layer of order `N`."""

    @abc.abstractmethod
    def operators(self) -> tuple[AbstractCausalMixer, ...]:
        """The operators, the one that is applied first in front."""


class MixerBank(AbstractFilterBank):
    """A bank of independent operators."""

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    mixers: tuple[AbstractCausalMixer, ...]

    def operators(self) -> tuple[AbstractCausalMixer, ...]:
        return self.mixers
