"""The law that every layer obeys: parallel, in chunks and step by step are one function."""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, PyTree


class AbstractLayer(eqx.Module):
    """What every layer declares of itself.

    `recurrence` names the fields that parametrise the layer's recurrence. They stay in float32 (or
    float64) whatever the compute dtype, and optimisers may give them a group of their own.

    `resets` says whether the layer can drop its state in the middle of a sequence. A layer made of layers
    can where all its parts can: ask `refuse_reset`.
    """

    recurrence: eqx.AbstractClassVar[tuple[str, ...]]
    resets: eqx.AbstractClassVar[bool]


def takes_reset(layer: PyTree) -> bool:
    """Whether `layer` and every part of it can drop its state in the middle of a sequence."""
    return not _stubborn(layer)


def refuse_reset(layer: AbstractLayer, reset: Bool[Array, "..."] | None) -> None:
    """Refuses flags, whatever they say, where some part of `layer` cannot drop its state."""
    if reset is not None and (parts := _stubborn(layer)):
        raise ValueError(
            f"{type(layer).__name__} takes no `reset`, since a {type(parts[0]).__name__} convolves with the whole past "
            "and cannot forget it at a step. Run the sequences one by one, or use a mixer whose recurrence is a scan."
        )


def _stubborn(layer):
    is_one = lambda node: isinstance(node, AbstractLayer) and not node.resets
    return [node for node in jax.tree.leaves(layer, is_leaf=is_one) if is_one(node)]


class AbstractMixer(AbstractLayer):
    """Mixes one un-batched sequence along its length. Batch it with `jax.vmap`.

    `takes_intervals` says whether the call takes `intervals`, the times between samples, as that of `S5` does.
    """

    takes_intervals: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        """The whole sequence in parallel, from the empty state."""


class _Scannable:
    """A method that is hashable once bound, which `jax.lax.scan` asks of its function, and still a PyTree.

    Equinox's own bound methods hash their arrays, which have no hash.
    """

    def __init__(self, method):
        self.__doc__, self.__wrapped__ = method.__doc__, method

    def __get__(self, instance, owner=None):
        return self.__wrapped__ if instance is None else jtu.Partial(self.__wrapped__, instance)


class AbstractCausalMixer(AbstractMixer):
    """A mixer that runs forward in time, and can therefore stream.

    For any partition of `x` into chunks, `mixer(x)`, `prefill` over the chunks with the state carried,
    and `jax.lax.scan(mixer.step, mixer.init_state(), x)` give the same output. `reset[t]` drops the
    state that enters step t: what follows equals a new sequence, with gradient exactly zero across.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            cls.step = _Scannable(cls.__dict__["step"])  # pyright: ignore[reportAttributeAccessIssue]

    @abc.abstractmethod
    def init_state(self) -> PyTree[Array]:
        """The empty state."""

    @abc.abstractmethod
    def prefill(
        self,
        state: PyTree[Array],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree[Array], Float[Array, "L D"]]:
        """A chunk of any length in parallel, from `state`. Returns the final state and the output."""

    @abc.abstractmethod
    def step(
        self,
        state: PyTree[Array],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree[Array], Float[Array, " D"]]:
        """One step. The carry comes first and keeps its dtypes, so that it fits `jax.lax.scan`.

        Outside `jax.jit` take `step = mixer.step` once: to JAX every look-up is a new function, to be compiled.
        """
