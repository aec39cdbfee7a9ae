"""Weights of the S5 branch, into our modules and back.

Parameters are a flat mapping of slash-joined Flax paths to arrays, such as
`backbone/layers_0/mixer_cls/filter_fn_0/Lambda_re`, without a prefix `param/` or `params/`. A configuration
is the dictionary of options that the reference was built from.

Source: lindermanlab/S5, branch `development` (S5 and the Hyena-S5 language model).

Differs from the reference: `C` is a real (D, P, 2) array of (re, im) pairs. The branch makes it complex where
`C_init` is `complex_normal`, and then sums C[..., 0] + i C[..., 1]. Such an array is read as the pairs of
that sum.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Inexact, Shaped, checked
from s5eqx.models import LanguageModel
from s5eqx.nn import MLP, S5, Block, FullGLU, Gelu, HalfGLU1, HalfGLU2, Hyena, MixerBank, ShortConv

Params = Mapping[str, Shaped[Array, "..."]]

_FILTER_ACTIVATIONS = {
    "gelu": lambda width, *, key: Gelu(),
    "half_glu1": HalfGLU1,
    "half_glu2": HalfGLU2,
    "full_glu": FullGLU,
}
_OPERATOR_ACTIVATIONS = {"id": eqx.nn.Identity(), "gelu": eqx.nn.Lambda(jax.nn.gelu)}


@checked
def from_s5(params: Params, config: Mapping[str, Any]) -> LanguageModel:
    """The Hyena-S5 language model that holds `params`.

    **Arguments:**

    - `params`: NumPy or JAX arrays by path. The model keeps their dtypes.
    - `config`: `vocab_size`, `d_model`, `n_layer`, `d_inner` (by default four times `d_model`), `layer`,
        `layer_kwargs` and `seq_model_kwargs`.

    **Raises:** `ValueError` for an option that is not offered here, and for an array that is missing, left
    over, or of another shape than `config` asks for.
    """
    layer, vocab_size, width, depth = _read("config", config, "layer", "vocab_size", "d_model", "n_layer")
    _choose("layer", layer, {"S5_operator": Hyena})
    options = config.get("seq_model_kwargs", {})
    known = ("max_position_embeddings", "resid_dropout", "embed_dropout", "layer_norm_epsilon")
    _refuse("seq_model_kwargs", options, known, {})
    skeleton = eqx.filter_eval_shape(
        LanguageModel,
        vocab_size,
        width,
        functools.partial(_operator, config),
        num_layers=depth,
        mlp_width=config.get("d_inner", 4 * width),
        max_length=options.get("max_position_embeddings", 0) or None,
        embed_dropout=options.get("embed_dropout", 0.0),
        dropout=options.get("resid_dropout", 0.0),
        key=jr.key(0),
    )
    norm = eqx.filter_eval_shape(eqx.nn.LayerNorm, width, eps=options.get("layer_norm_epsilon", 1e-5))
    skeleton = eqx.tree_at(_norms, skeleton, replace_fn=lambda _: norm)
    return _fill(skeleton, params)


@checked
def layer_from_s5(kind: str, params: Params, config: Mapping[str, Any]) -> S5 | Hyena:
    """The single layer that holds `params`. It acts on one example: `jax.vmap(layer)(u)` on a batch.

    **Arguments:**

    - `kind`: `"ssm"` for `S5`, or `"s5_operator"` for `Hyena` over S5 filters.
    - `params`: NumPy or JAX arrays by path. The layer keeps their dtypes.
    - `config`: `d_model`, and `ssm_size`, `blocks`, `ssm_args` for an `"ssm"`, or `layer_kwargs` for an
        `"s5_operator"`.

    **Raises:** `ValueError` as `from_s5` does.
    """
    build = _choose("kind", kind, {"ssm": _ssm, "s5_operator": _operator})
    return _fill(eqx.filter_eval_shape(build, config, jr.key(0)), params)


@checked
def to_s5(model: LanguageModel | S5 | Hyena) -> dict[str, Inexact[Array, "..."]]:
    """The inverse of `from_s5` and `layer_from_s5`: arrays by path, in the reference's layout.

    A gradient has the structure of its model and is translated alike.
    """
    return {path: layout.save(leaf) for path, leaf, layout in _arrays(model)}


# 1. From a configuration to modules. They are only built in the abstract, so nothing is drawn.


def _ssm(config, key):
    width, state_size, num_blocks, args = _read("config", config, "d_model", "ssm_size", "blocks", "ssm_args")
    return _filter("ssm_args", args, width, state_size, num_blocks, key)


def _operator(config, key):
    width, options = _read("config", config, "d_model", "layer_kwargs")
    required = ("ssm_size", "ssm_blocks", "filter_args")
    optional = ("order", "short_filter_order", "activation_type", "drop_rate")
    only = {"filter_cls": "hyena_S5", "inner_factor": 1, "num_heads": 1}
    only |= {"outer_mixing": False, "post_order_ffn": False}
    _refuse("layer_kwargs", options, required + optional, only)
    state_size, num_blocks, args = _read("layer_kwargs", options, *required)
    order = options.get("order", 2)
    key, *keys = jr.split(key, max(order, 1))
    bank = MixerBank(tuple(_filter("filter_args", args, width, state_size, num_blocks, k) for k in keys))
    return Hyena(
        width,
        bank,
        order=order,
        short_filter=options.get("short_filter_order", 3),
        activation=_choose("activation_type", options.get("activation_type", "id"), _OPERATOR_ACTIVATIONS),
        dropout=options.get("drop_rate", 0.0),
        key=key,
    )


def _filter(section, args, width, state_size, num_blocks, key):
    required = ("activation", "conj_sym", "clip_eigs")
    drawing = ("C_init", "dt_min", "dt_max")  # of the first draw only, which the weights replace
    _refuse(section, args, required + drawing, {})
    name, conj_sym, clip_eigs = _read(section, args, *required)
    activation = _choose(f"{section}/activation", name, _FILTER_ACTIVATIONS)
    key, activation_key = jr.split(key)
    return S5(
        width,
        state_size,
        num_blocks=num_blocks,
        conj_sym=conj_sym,
        clip_eigs=clip_eigs,
        activation=activation(width, key=activation_key),
        key=key,
    )


def _norms(model):
    return [model.backbone.norm, *(n for b in model.backbone.blocks for n in (b.norm1, b.norm2))]


def _read(section, options, *names):
    missing = ", ".join(name for name in names if name not in options)
    if missing:
        raise ValueError(f"{section} must give {missing}; it gives {', '.join(options) or 'nothing'}.")
    return tuple(options[name] for name in names)


def _refuse(section, options, known, only):
    """Refuses what is neither known nor, for the names of `only`, the one value that is offered here."""
    for name, value in options.items():
        if name in only and value != only[name]:
            raise ValueError(f"{section}/{name} must be {only[name]!r}, the only one offered; got {value!r}.")
        if name not in only and name not in known:
            raise ValueError(
                f"{section} must hold options out of {', '.join((*known, *only))}; got {name}={value!r}. "
                "Leave it out if it does not change the model."
            )


def _choose(name, value, offered):
    if value not in offered:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, offered))}; got {value!r}.")
    return offered[value]


# 2. The names: one table, read in both directions.


class _Layout(NamedTuple):
    """How the reference lays an array out: `load` brings it into our form, `save` brings ours back."""

    load: Callable = lambda a: a
    save: Callable = lambda a: a


_SAME = _Layout()
_DENSE = _Layout(jnp.transpose, jnp.transpose)  # (in, out)
_COLUMN = _Layout(lambda a: a[:, 0], lambda a: a[:, None])  # (P, 1)
_TAPS = _Layout(lambda a: a[:, 0], lambda a: a[:, None])  # (K, 1, D)
_PAIRS = _Layout(lambda a: _pairs(a[..., 0] + 1j * a[..., 1]) if jnp.iscomplexobj(a) else a)  # (..., 2)


def _pairs(z):
    return jnp.stack([z.real, z.imag], axis=-1)


@functools.singledispatch
def _arrays(module: Any) -> Iterator[tuple[str, Any, _Layout]]:
    """Path, leaf and layout of every array of a module."""
    raise ValueError(f"The S5 branch has no names for a {type(module).__name__}; it knows S5 and Hyena-S5.")


def _under(prefix, module):
    return ((f"{prefix}/{path}", leaf, layout) for path, leaf, layout in _arrays(module))


@_arrays.register
def _(layer: eqx.nn.Linear):
    yield "kernel", layer.weight, _DENSE
    yield "bias", layer.bias, _SAME


@_arrays.register
def _(norm: eqx.nn.LayerNorm):
    yield "scale", norm.weight, _SAME
    yield "bias", norm.bias, _SAME


@_arrays.register
def _(conv: ShortConv):
    yield "kernel", conv.weight, _TAPS
    yield "bias", conv.bias, _SAME


@_arrays.register
def _(gelu: Gelu):
    yield from ()


@_arrays.register
def _(glu: HalfGLU1 | HalfGLU2):
    yield from _under("out2", glu.out2)


@_arrays.register
def _(glu: FullGLU):
    yield from _under("out1", glu.out1)
    yield from _under("out2", glu.out2)


@_arrays.register
def _(layer: S5):
    for name in ("Lambda_re", "Lambda_im", "B", "D"):
        yield name, getattr(layer, name), _SAME
    yield "C", layer.C, _PAIRS
    yield "log_step", layer.log_Delta, _COLUMN
    yield from _arrays(layer.activation)


@_arrays.register
def _(layer: Hyena):
    yield from _under("in_proj", layer.in_proj)
    if layer.short_conv is not None:
        yield from _under("short_filter", layer.short_conv)
    for i, s5 in enumerate(layer.bank.operators()):
        yield from _under(f"filter_fn_{i}", s5)
    yield from _under("out_proj", layer.out_proj)


@_arrays.register
def _(mlp: MLP):
    yield from _under("fc1", mlp.fc1)
    yield from _under("fc2", mlp.fc2)


@_arrays.register
def _(block: Block):
    yield from _under("norm1", block.norm1)
    yield from _under("mixer_cls", block.mixer)
    yield from _under("norm2", block.norm2)
    yield from _under("mlp", block.mlp)


@_arrays.register
def _(model: LanguageModel):
    yield "embeddings/word_embeddings/embedding", model.embedding, _SAME
    if model.positions is not None:
        yield "embeddings/position_embeddings/embedding", model.positions, _SAME
    for i, block in enumerate(model.backbone.blocks):
        yield from _under(f"backbone/layers_{i}", block)
    yield from _under("backbone/ln_f", model.backbone.norm)


# 3. From arrays to a module with weights.


def _fill(skeleton, params):
    """`skeleton` with an array for every abstract leaf. Each array is used exactly once."""
    expected = {path: (jax.eval_shape(layout.save, leaf), layout) for path, leaf, layout in _arrays(skeleton)}
    missing = [f"{path} of shape {leaf.shape}" for path, (leaf, _) in expected.items() if path not in params]
    left_over = [f"{path} of shape {params[path].shape}" for path in params if path not in expected]
    if missing or left_over:
        raise ValueError(
            "The parameters must be exactly those that the configuration asks for.\n"
            f"  missing: {', '.join(missing) or 'none'}\n"
            f"  left over: {', '.join(left_over) or 'none'}\n"
            "Check the configuration, and that the paths carry no prefix such as `param/`."
        )
    arrays = [_load(path, params[path], leaf.shape, layout) for path, (leaf, layout) in expected.items()]
    return eqx.tree_at(lambda module: [leaf for _, leaf, _ in _arrays(module)], skeleton, arrays)


def _load(path, given, shape, layout):
    if given.shape != shape:
        raise ValueError(f"{path} must have shape {shape} by the configuration; got {given.shape}.")
    if not jnp.issubdtype(given.dtype, jnp.inexact if layout is _PAIRS else jnp.floating):
        raise ValueError(f"{path} must be of floats (C may be complex); got {given.dtype}.")
    array = jnp.asarray(given)
    if array.dtype != given.dtype:
        raise ValueError(
            f"{path} must keep its dtype, {given.dtype}, but JAX would make it {array.dtype}. "
            "Set jax_enable_x64, or cast the parameters first."
        )
    return layout.load(array)
