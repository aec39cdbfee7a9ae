"""What follows the core of S4D, of S4ND and of the long-convolution layer."""

from collections.abc import Callable

import equinox as eqx

from s5eqx._typing import Array, Float, PRNGKeyArray
from s5eqx.nn._mixer import AbstractLayer
from s5eqx.nn.activations import GLU
from s5eqx.nn.linear import linear


class AbstractReadOut(AbstractLayer):
    """A layer that ends in `output_linear(dropout(activation(y)))`, at each step or point on its own."""

    activation: eqx.AbstractVar[Callable]
    dropout: eqx.AbstractVar[eqx.nn.Dropout]
    output_linear: eqx.AbstractVar[GLU | eqx.nn.Linear]

    def read_out(self, y: Float[Array, "*L cD"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*L D"]:
        """That end, of the core's output."""
        y = self.dropout(self.activation(y), key=key)
        return linear(self.output_linear, y) if isinstance(self.output_linear, eqx.nn.Linear) else self.output_linear(y)
