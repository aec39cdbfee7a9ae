"""Equal layers held as one, so that a deep model compiles as fast as a shallow one."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from s5eqx._typing import Array, PyTree
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._mixer import AbstractCausalMixer


class Stack(AbstractComposedMixer):
    """`layer_n(... layer_1(x))` for `n` layers that differ in their arrays alone, as one `lax.scan` over them.

    `layer` holds the arrays of all layers: each of its own has a leading axis of length `num_layers`, as has each
    array of the state. The plain layers come out by `stack[i]` and `for layer in stack`.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    layer: AbstractCausalMixer
    num_layers: int = eqx.field(static=True)

    @classmethod
    def of(cls, layers: Sequence[AbstractCausalMixer]) -> "Stack":
        """The stack of plain layers, the one that is applied first in front."""
        if not layers or not all(isinstance(layer, AbstractCausalMixer) for layer in layers):
            given = ", ".join(type(layer).__name__ for layer in layers)
            raise ValueError(f"A stack needs at least one layer, and causal mixers only; got {given or 'none'}.")
        arrays, rests = zip(*(eqx.partition(layer, eqx.is_array) for layer in layers), strict=True)
        form = lambda i: (jax.tree.structure(arrays[i]), [(a.shape, a.dtype) for a in jax.tree.leaves(arrays[i])])
        for i, rest in enumerate(rests):
            if form(i) != form(0) or eqx.tree_equal(rest, rests[0]) is not True:
                raise ValueError(
                    "Stacked layers must have equal types, options and shapes, and differ in the values of their "
                    f"arrays alone; layer {i}, a {type(layers[i]).__name__}, differs from layer 0, a "
                    f"{type(layers[0]).__name__}. Keep such layers in a tuple."
                )
        return cls(eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rests[0]), len(layers))

    @classmethod
    def build(cls, make: Callable[..., AbstractCausalMixer], *columns: PyTree) -> "Stack":
        """The stack of `make(*row)` for each row of `columns`, whose arrays have the layers in front; `make` is traced
        once."""
        num_layers = {len(a) for a in jax.tree.leaves(eqx.filter(columns, eqx.is_array))}
        return cls(eqx.filter_vmap(make)(*columns), *num_layers)

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, i: int) -> Any:
        i = range(self.num_layers)[operator.index(i)]
        return jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, self.layer)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.num_layers))

    def init_state(self) -> PyTree[Array]:
        init = eqx.filter_vmap(lambda layer: layer.init_state(), axis_size=self.num_layers)
        return init(self.layer)

    def forward(self, run, state, x, key):
        arrays, rest = eqx.partition(self.layer, eqx.is_array)

        def one(x, layer):
            arrays, state, key = layer
            state, x = run(eqx.combine(arrays, rest), state, x, key)
            return x, state

        keys = None if key is None else jr.split(key, self.num_layers)
        x, state = lax.scan(one, x, (arrays, state, keys), self.num_layers)
        return state, x
