"""Weights of the S5 branch, into our modules and back.

Parameters are a flat mapping of slash-joined Flax paths to arrays, such as
`backbone/layers_0/mixer_cls/filter_fn_0/Lambda_re`, without a prefix `param/` or `params/`. A configuration
is the dictionary of options that the reference was built from.

Source: lindermanlab/S5, branch `development` (S5, and the Hyena-S5 and Hyena language models).

Differs from the reference: `C` is a real (D, P, 2) array of (re, im) pairs. The branch makes it complex where
`C_init` is `complex_normal`, and then sums C[..., 0] + i C[..., 1]. Such an array is read as the pairs of
that sum.
"""

import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Inexact, checked
from s5eqx.interop._table import (
    LEADING,
    Entry,
    Layout,
    Params,
    Table,
    arrays,
    choose,
    fill,
    hidden,
    read,
    refuse,
    skips,
    under,
    with_epsilon,
)
from s5eqx.models import LanguageModel
from s5eqx.nn import MLP, S5, Block, FullGLU, Gelu, HalfGLU1, HalfGLU2, Hyena, ImplicitFilter, MixerBank, ShortConv

_FILTER_ACTIVATIONS = {
    "gelu": lambda width, *, key: Gelu(),
    "half_glu1": HalfGLU1,
    "half_glu2": HalfGLU2,
    "full_glu": FullGLU,
}
_OPERATOR_ACTIVATIONS = {"id": eqx.nn.Identity(), "gelu": eqx.nn.Lambda(jax.nn.gelu)}


@checked
def from_s5(params: Params, config: Mapping[str, Any]) -> LanguageModel:
    """The Hyena-S5 or Hyena language model that holds `params`. Its dropouts are off: `eqx.nn.inference_mode(model,
    False)` turns them on.

    **Arguments:**

    - `params`: NumPy or JAX arrays by path. The model keeps their dtypes.
    - `config`: `vocab_size`, `d_model`, `n_layer`, `d_inner` (by default four times `d_model`), `layer`,
        `layer_kwargs`, `seq_model_kwargs`, and `l_max` for Hyena.

    **Raises:** `ValueError` for an option that is not offered here, and for an array that is missing, left
    over, or of another shape than `config` asks for.
    """
    layer, vocab_size, width, depth = read("config", config, "layer", "vocab_size", "d_model", "n_layer")
    build = choose("layer", layer, {"S5_operator": _s5_operator, "hyena": _hyena_operator})
    options = config.get("seq_model_kwargs", {})
    known = ("max_position_embeddings", "resid_dropout", "embed_dropout", "layer_norm_epsilon")
    refuse("seq_model_kwargs", options, known, {})
    skeleton = eqx.filter_eval_shape(
        LanguageModel,
        vocab_size,
        width,
        functools.partial(build, config),
        num_layers=depth,
        mlp_width=config.get("d_inner") or hidden(params, "backbone/layers_0/mlp/fc1/kernel", 1) or 4 * width,
        max_length=options.get("max_position_embeddings", 0) or None,
        embed_dropout=options.get("embed_dropout", 0.0),
        dropout=options.get("resid_dropout", 0.0),
        key=jr.key(0),
    )
    return _read(with_epsilon(skeleton, options.get("layer_norm_epsilon", 1e-5)), params)


@checked
def layer_from_s5(kind: str, params: Params, config: Mapping[str, Any]) -> S5 | Hyena:
    """The single layer that holds `params`. It acts on one example: `jax.vmap(layer)(u)` on a batch.

    **Arguments:**

    - `kind`: `"ssm"` for `S5`, `"s5_operator"` for `Hyena` over S5 filters, or `"hyena_operator"` for `Hyena`
        over implicit filters.
    - `params`: NumPy or JAX arrays by path. The layer keeps their dtypes.
    - `config`: `d_model`, and `ssm_size`, `blocks`, `ssm_args` for an `"ssm"`, or `layer_kwargs` for an operator,
        and `l_max` for a `"hyena_operator"`.

    **Raises:** `ValueError` as `from_s5` does.
    """
    build = choose("kind", kind, {"ssm": _ssm, "s5_operator": _s5_operator, "hyena_operator": _hyena_operator})
    return _read(eqx.filter_eval_shape(build, config, jr.key(0)), params)


@checked
def to_s5(model: LanguageModel | S5 | Hyena) -> dict[str, Inexact[Array, "..."]]:
    """The inverse of `from_s5` and `layer_from_s5`: arrays by path, in the reference's layout.

    A gradient has the structure of its model and is translated alike.
    """
    return arrays(_table(model))


def _read(skeleton, params):
    module = fill(skeleton, _table, params, "that the paths carry no prefix such as `param/`")
    return eqx.nn.inference_mode(jax.tree.map(_with_positions, module, is_leaf=_is_filter))


# 1. From a configuration to modules. They are only built in the abstract, so nothing is drawn.


def _ssm(config, key):
    width, state_size, num_blocks, args = read("config", config, "d_model", "ssm_size", "blocks", "ssm_args")
    return _filter("ssm_args", args, width, state_size, num_blocks, key)


def _s5_operator(config, key):
    width, options = read("config", config, "d_model", "layer_kwargs")
    required = ("ssm_size", "ssm_blocks", "filter_args")
    _refuse_operator(options, required, filter_cls="hyena_S5")
    state_size, num_blocks, args = read("layer_kwargs", options, *required)
    key, *keys = jr.split(key, max(options.get("order", 2), 1))
    bank = MixerBank(tuple(_filter("filter_args", args, width, state_size, num_blocks, k) for k in keys))
    return _operator(width, bank, options, key)


def _hyena_operator(config, key):
    width, options, max_length = read("config", config, "d_model", "layer_kwargs", "l_max")
    required = ("filter_order", "filter_args")
    _refuse_operator(options, required, filter_cls="hyena-filter")
    filter_width, args = read("layer_kwargs", options, *required)
    (features,) = read("filter_args", args, "emb_dim")
    optional = ("use_bias", "num_inner_mlps", "normalized", "w")  # w is where the frequencies start
    refuse("filter_args", args, ("emb_dim", *optional), {})
    bank = ImplicitFilter(
        width,
        max_length,
        order=options.get("order", 2),
        features=features,
        filter_width=filter_width,
        num_hidden=args.get("num_inner_mlps", 2),
        normalize=args.get("normalized", False),
        use_bias=args.get("use_bias", True),
        key=key,
    )
    return _operator(width, bank, options, key)


def _refuse_operator(options, required, filter_cls):
    optional = ("order", "short_filter_order", "activation_type", "drop_rate")
    only = {"filter_cls": filter_cls, "inner_factor": 1, "num_heads": 1}
    only |= {"outer_mixing": False, "post_order_ffn": False}
    refuse("layer_kwargs", options, required + optional, only)


def _operator(width, bank, options, key):
    return Hyena(
        width,
        bank,
        order=options.get("order", 2),
        short_filter=options.get("short_filter_order", 3),
        activation=choose("activation_type", options.get("activation_type", "id"), _OPERATOR_ACTIVATIONS),
        dropout=options.get("drop_rate", 0.0),
        key=key,
    )


def _filter(section, args, width, state_size, num_blocks, key):
    required = ("activation", "conj_sym", "clip_eigs")
    drawing = ("C_init", "dt_min", "dt_max")  # of the first draw only, which the weights replace
    refuse(section, args, required + drawing, {})
    name, conj_sym, clip_eigs = read(section, args, *required)
    activation = choose(f"{section}/activation", name, _FILTER_ACTIVATIONS)
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


def _is_filter(node):
    return isinstance(node, ImplicitFilter)


def _with_positions(node):
    """A filter with its positions and decay rates, which the reference computes anew in each call."""
    if not _is_filter(node):
        return node
    channels, (max_length, features) = len(node.layers[-1].weight), node.z.array.shape
    plain = ImplicitFilter(channels, max_length, features=features, filter_width=1, num_hidden=0, key=jr.key(0))
    constants = lambda bank: [bank.z.array, bank.t.array, bank.deltas.array]
    return eqx.tree_at(constants, node, [a.astype(node.freq.dtype) for a in constants(plain)])


# 2. The names: one table, read in both directions.

_DENSE = Layout(lambda a: a.T, lambda a: a.T)  # (in, out)
_COLUMN = Layout(lambda a: a[:, 0], lambda a: a[:, None])  # (P, 1)
_TAPS = Layout(lambda a: a[:, 0], lambda a: a[:, None])  # (K, 1, D)
_PAIRS = Layout(  # (..., 2)
    lambda a: _pairs(a[..., 0] + 1j * a[..., 1]) if jnp.iscomplexobj(a) else a, may_be_complex=True
)


def _pairs(z):
    return np.stack([z.real, z.imag], axis=-1)


@functools.singledispatch
def _table(module: Any) -> Table:
    """Every array of a module."""
    raise ValueError(f"The S5 branch has no names for a {type(module).__name__}; it knows S5, Hyena-S5 and Hyena.")


def _under(prefix, module):
    return under(f"{prefix}/", _table(module))


@_table.register
def _(layer: eqx.nn.Linear):
    yield Entry("kernel", layer.weight, _DENSE)
    if layer.use_bias:
        yield Entry("bias", layer.bias)


@_table.register
def _(norm: eqx.nn.LayerNorm):
    yield Entry("scale", norm.weight)
    yield Entry("bias", norm.bias)


@_table.register
def _(conv: ShortConv):
    yield Entry("kernel", conv.weight, _TAPS)
    yield Entry("bias", conv.bias)


@_table.register
def _(gelu: Gelu):
    yield from ()


@_table.register
def _(glu: HalfGLU1 | HalfGLU2):
    yield from _under("out2", glu.out2)


@_table.register
def _(glu: FullGLU):
    yield from _under("out1", glu.out1)
    yield from _under("out2", glu.out2)


@_table.register
def _(layer: S5):
    for name in ("Lambda_re", "Lambda_im", "B", "D"):
        yield Entry(name, getattr(layer, name))
    yield Entry("C", layer.C, _PAIRS)
    yield Entry("log_step", layer.log_Delta, _COLUMN)
    yield from _table(layer.activation)


@_table.register
def _(bank: MixerBank):
    for i, s5 in enumerate(bank.mixers):
        yield from _under(f"filter_fn_{i}", s5)


@_table.register
def _(bank: ImplicitFilter):
    yield skips("filter_fn/bias", bank)
    yield Entry("filter_fn/implicit_filter/layers_1/freq", bank.freq, LEADING)
    for i, layer in enumerate(bank.layers):
        yield from _under(f"filter_fn/implicit_filter/layers_{2 * i}", layer)


@_table.register
def _(layer: Hyena):
    yield from _under("in_proj", layer.in_proj)
    if layer.short_conv is not None:
        yield from _under("short_filter", layer.short_conv)
    yield from _table(layer.bank)
    yield from _under("out_proj", layer.out_proj)


@_table.register
def _(mlp: MLP):
    yield from _under("fc1", mlp.fc1)
    yield from _under("fc2", mlp.fc2)


@_table.register
def _(block: Block):
    yield from _under("norm1", block.norm1)
    yield from _under("mixer_cls", block.mixer)
    yield from _under("norm2", block.norm2)
    yield from _under("mlp", block.mlp)


@_table.register
def _(model: LanguageModel):
    yield Entry("embeddings/word_embeddings/embedding", model.embedding)
    if model.positions is not None:
        yield Entry("embeddings/position_embeddings/embedding", model.positions)
    for i, block in enumerate(model.backbone.blocks):
        yield from _under(f"backbone/layers_{i}", block)
    yield from _under("backbone/ln_f", model.backbone.norm)
