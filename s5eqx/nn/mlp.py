"""The channel mixer between the sequence mixers."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.random as jr

from s5eqx._typing import Array, Bool, Float, PRNGKeyArray, checked
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn.linear import linear


class MLP(AbstractCausalMixer):
    """`fc2(gelu(fc1(x)))` at each step on its own, with the tanh form of the GELU. Its state is empty.

    Source: the blocks of GPT-2, as in the published Hyena and S5 language models.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear

    def __init__(self, width: int, hidden: int, *, key: PRNGKeyArray):
        """**Arguments:** `width` channels in and out, `hidden` in between."""
        if width < 1 or hidden < 1:
            raise ValueError(f"width and hidden must be positive; got width={width}, hidden={hidden}.")
        key1, key2 = jr.split(key)
        self.fc1 = eqx.nn.Linear(width, hidden, key=key1)
        self.fc2 = eqx.nn.Linear(hidden, width, key=key2)

    @checked
    def __call__(
        self,
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        return self._pointwise(x)

    def init_state(self) -> tuple[()]:
        return ()

    @checked
    def prefill(
        self,
        state: tuple[()],
        x: Float[Array, "L D"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[tuple[()], Float[Array, "L D"]]:
        return state, self._pointwise(x)

    @checked
    def step(
        self,
        state: tuple[()],
        x_t: Float[Array, " D"],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[tuple[()], Float[Array, " D"]]:
        return state, self._pointwise(x_t)

    def _pointwise(self, x):
        # Recomputed in the backward pass: the inside of a gelu is as large as the widest array of the model.
        return linear(self.fc2, jax.checkpoint(jax.nn.gelu)(linear(self.fc1, x)))
