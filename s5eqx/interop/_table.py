"""What the readers of foreign weights share: options, layouts, and the table of names, read in both directions."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from s5eqx._typing import Array, Inexact, PyTree, Shaped
from s5eqx.models import LanguageModel
from s5eqx.nn import Block, ImplicitFilter

Params = Mapping[str, Shaped[Array, "..."]]


# 1. Options.


def read(section: str, options: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """The values of options that must be there."""
    missing = ", ".join(name for name in names if name not in options)
    if missing:
        raise ValueError(f"{section} must give {missing}; it gives {', '.join(options) or 'nothing'}.")
    return tuple(options[name] for name in names)


def refuse(section: str, options: Mapping[str, Any], known: Iterable[str], only: Mapping[str, Any]) -> None:
    """Refuses what is neither known nor, for the names of `only`, the one value that is offered here."""
    for name, value in options.items():
        if name in only and value != only[name]:
            raise ValueError(f"{section}/{name} must be {only[name]!r}, the only one offered; got {value!r}.")
        if name not in only and name not in known:
            raise ValueError(
                f"{section} must hold options out of {', '.join((*known, *only))}; got {name}={value!r}. "
                "Leave it out if it does not change the model."
            )


def choose(name: str, value: Any, offered: Mapping[Any, Any]) -> Any:
    """What an option stands for."""
    if value not in offered:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, offered))}; got {value!r}.")
    return offered[value]


def hidden(params: Params, name: str, axis: int) -> int | None:
    """The hidden channels of the first MLP, by its array; None without one, which is missed later."""
    return params[name].shape[axis] if name in params and params[name].ndim == 2 else None


# 2. The table.


class Layout(NamedTuple):
    """How the reference lays an array out: `load` brings it into our form, `save` brings ours back. A NumPy array stays
    one while it is loaded, so that nothing is compiled."""

    load: Callable = lambda a: a
    save: Callable = lambda a: a
    may_be_complex: bool = False

    def then(self, other: "Layout") -> "Layout":
        """This one from the file on, `other` after it."""
        return Layout(lambda a: other.load(self.load(a)), lambda a: self.save(other.save(a)))


SAME = Layout()
TAPS_LAST = Layout(lambda a: a[:, 0].T, lambda a: a.T[:, None])  # (D, 1, K)
LEADING = Layout(lambda a: a[0], lambda a: a[None])  # (1, ...)


class Entry(NamedTuple):
    """An array of the reference: its name, our leaf (or leaves), and how the two relate.

    `copies` are other names of the same array. Two kinds of arrays have no leaf: one of an `unused` shape is held by
    the reference, which computes nothing with it; one that is `known` may be left out, and has this value.
    """

    name: str
    leaf: Any
    layout: Layout = SAME
    copies: tuple[str, ...] = ()
    unused: tuple[int, ...] | None = None
    known: np.ndarray | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.copies


Table = Iterator[Entry]


def under(prefix: str, entries: Iterable[Entry]) -> Table:
    """The same entries with longer names."""
    for entry in entries:
        copies = tuple(prefix + copy for copy in entry.copies)
        yield entry._replace(name=prefix + entry.name, copies=copies)


def arrays(table: Table) -> dict[str, Inexact[Array, "..."]]:
    """All arrays by name, in the reference's layout. What the reference does not use is zero."""
    entries = [entry for entry in table if entry.known is None]
    dtype = next(entry.leaf.dtype for entry in entries if eqx.is_array(entry.leaf))
    save = lambda entry: entry.layout.save(entry.leaf) if entry.unused is None else jnp.zeros(entry.unused, dtype)
    return {name: array for entry in entries for array in [save(entry)] for name in entry.names}


def skips(name: str, bank: ImplicitFilter, layout: Layout = SAME) -> Entry:
    """The skips of implicit filters. The references keep such an array also where they do not use it."""
    unused = (int(bank.layers[-1].out_features),) if bank.bias is None else None
    return Entry(name, bank.bias, layout, unused=unused)


# 3. From arrays to a module with weights.


def fill(skeleton: PyTree, table: Callable[[Any], Table], params: Params, hint: str) -> Any:
    """`skeleton` with an array for every abstract leaf of its table. Each array of `params` is used exactly once."""
    entries = list(table(skeleton))
    shapes = {entry.name: _shape(entry) for entry in entries}
    given = [[name for name in entry.names if name in params] for entry in entries]
    used = {name for names in given for name in names}
    missing = [
        f"{entry.name} of shape {shapes[entry.name]}"
        for entry, names in zip(entries, given, strict=True)
        if not names and entry.known is None
    ]
    left_over = [f"{name} of shape {params[name].shape}" for name in params if name not in used]
    if missing or left_over:
        raise ValueError(
            "The parameters must be exactly those that the configuration asks for.\n"
            f"  missing: {', '.join(missing) or 'none'}\n"
            f"  left over: {', '.join(left_over) or 'none'}\n"
            f"Check the configuration, and {hint}."
        )
    loaded = [
        _load(entry, {name: params[name] for name in names}, shapes[entry.name])
        for entry, names in zip(entries, given, strict=True)
        if names
    ]
    leaves = lambda module: jax.tree.leaves([entry.leaf for entry in table(module)])
    return eqx.tree_at(leaves, skeleton, jax.tree.leaves(loaded))


def _shape(entry):
    if entry.known is not None:
        return entry.known.shape
    return entry.unused if entry.leaf is None else jax.eval_shape(entry.layout.save, entry.leaf).shape


def _load(entry, given, shape):
    (name, array), *copies = given.items()
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape} by the configuration; got {array.shape}.")
    for other, copy in copies:
        if copy.dtype != array.dtype or not np.array_equal(copy, array):
            raise ValueError(f"{other} and {name} are one tensor and must be equal; they differ. Keep the right one.")
    if not jnp.issubdtype(array.dtype, jnp.inexact if entry.layout.may_be_complex else jnp.floating):
        raise ValueError(f"{name} must be of floats (C of S5 may be complex); got {array.dtype}.")
    if entry.known is not None and not np.allclose(
        np.asarray(array, float), entry.known, rtol=max(1e-3, float(jnp.finfo(array.dtype).eps))
    ):
        raise ValueError(f"{name} must have the value that the configuration gives it; it differs. Check the options.")
    if entry.leaf is None:
        return None
    return jax.tree.map(functools.partial(as_given, name), entry.layout.load(array))


def as_given(name: str, array: Shaped[Array, "..."]) -> jax.Array:
    """A copy of `array` for JAX, in its own dtype."""
    ours = jax.device_put(np.array(array))  # `jnp.array` compiles a program for every shape
    if ours.dtype != array.dtype:
        raise ValueError(
            f"{name} must keep its dtype, {array.dtype}, but JAX would make it {ours.dtype}. "
            "Set jax_enable_x64, or cast the parameters first."
        )
    return ours


def with_epsilon(model: LanguageModel | Block, epsilon: float) -> Any:
    """The same model with this epsilon in all its norms."""
    is_norm = lambda node: isinstance(node, eqx.nn.LayerNorm)
    norm = lambda old: eqx.filter_eval_shape(eqx.nn.LayerNorm, old.shape, eps=epsilon)
    return jax.tree.map(lambda node: norm(node) if is_norm(node) else node, model, is_leaf=is_norm)
