"""The names of safari's arrays: one table for each kind of layer, read in both directions."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from s5eqx.interop._table import LEADING, SAME, TAPS_LAST, Entry, Layout, Table, skips, under
from s5eqx.nn import (
    GLU,
    H3,
    S4D,
    ZOH,
    Attention,
    BidirectionalLongConv,
    BidirectionalS4D,
    Buffer,
    ExpReal,
    Hyena,
    ImplicitFilter,
    LongConv,
    SquashedConvolution,
)
from s5eqx.nn.modal_ssm import as_poles, decay_and_phase
from s5eqx.nn.s5 import as_pairs

_COLUMN = Layout(lambda a: a[0, :, 0], lambda a: a[None, :, None])  # (1, L, 1)
_ROW = Layout(lambda a: a[0, 0], lambda a: a[None, None])  # (1, 1, D)
_PIXEL = Layout(lambda a: a[..., 0], lambda a: a[..., None])  # (D, D, 1)
_NO_LEADING = Layout(LEADING.save, LEADING.load)
_JOINED = Layout(lambda a: (a[: len(a) // 2], a[len(a) // 2 :]), jnp.concatenate)  # both directions in one array


def _save_residues(a):
    if len(a) > 1:
        raise ValueError(f"StripedHyena's modal form has one output a channel; this ModalSSM has {len(a)}.")
    return a[0, :, :, None]


def _load_poles(a):
    re, im = np.moveaxis(np.asarray(a, float), -1, 0)[..., 0]
    return tuple(leaf.astype(a.dtype) for leaf in decay_and_phase(re + 1j * im))


_POLES = Layout(_load_poles, lambda leaves: as_pairs(as_poles(*leaves))[:, :, None])  # (D, P, 1, 2), ours in polar form
_RESIDUES = Layout(lambda a: a[None, :, :, 0], _save_residues)  # (D, P, 1, 2)


def _linear(name, layer, layout=SAME) -> Table:
    yield Entry(f"{name}.weight", layer.weight, layout)
    if layer.use_bias:
        yield Entry(f"{name}.bias", layer.bias)


def _norm(name, norm) -> Table:
    yield Entry(f"{name}.weight", norm.weight)
    yield Entry(f"{name}.bias", norm.bias)


def _short_conv(name, conv) -> Table:
    yield Entry(f"{name}.weight", conv.weight, TAPS_LAST)
    yield Entry(f"{name}.bias", conv.bias)


def _hyena_table(layer, filter_channels=lambda bank: SAME) -> Table:
    bank = layer.bank
    if not isinstance(bank, ImplicitFilter) or layer.short_conv is None or layer.num_heads > 1:
        raise ValueError(
            "safari has names for a Hyena over an ImplicitFilter, with a short convolution and without heads; this one "
            f"has a bank {type(bank).__name__}, {'no' if layer.short_conv is None else 'a'} short convolution and "
            f"num_heads={layer.num_heads}. Convert a model before it is materialised."
        )
    ours = filter_channels(bank)
    yield from _linear("in_proj", layer.in_proj)
    yield from _linear("out_proj", layer.out_proj)
    yield from _short_conv("short_filter", layer.short_conv)
    yield skips("filter_fn.bias", bank, ours)
    z = bank.z.array if isinstance(bank.z, Buffer) else bank.z
    yield Entry("filter_fn.pos_emb.z", z, LEADING)
    yield Entry("filter_fn.pos_emb.t", bank.t.array, _COLUMN)
    yield Entry("filter_fn.modulation.deltas", bank.deltas.array, _ROW.then(ours))
    *hidden, last = bank.layers
    sines = [f"filter_fn.implicit_filter.{2 * i + 1}.freq" for i in range(len(hidden))]
    yield Entry(sines[0], bank.freq, LEADING, copies=tuple(sines[1:]))
    for i, linear in enumerate(hidden):
        yield from _linear(f"filter_fn.implicit_filter.{2 * i}", linear)
    yield from _linear(f"filter_fn.implicit_filter.{2 * len(hidden)}", last, ours)


def _stage_first(bank):
    """The filter channels of the standalone file, operator by operator; ours are channel by channel."""
    operators, channels = bank.order - 1, bank.layers[-1].out_features
    swap = lambda a, rows: a.reshape(rows, -1, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)
    return Layout(lambda a: swap(a, operators), lambda a: swap(a, channels // operators))


def _ssm_table(ssm, real, imag, channels=SAME) -> Table:
    yield Entry("C", ssm.C, channels)
    if ssm.B is not None:
        yield Entry("B", ssm.B)
    yield Entry(real, ssm.A_real)
    yield Entry(imag, ssm.A_imag)
    yield Entry("log_dt", ssm.log_Delta)


def _s4d_kernel_table(ssm) -> Table:
    return under("kernel.", _ssm_table(ssm, "inv_A_real", "A_imag"))


def _shift_table(ssm) -> Table:
    yield Entry("kernel.B", ssm.B)
    yield Entry("kernel.C", ssm.C, LEADING)


def _h3_table(layer) -> Table:
    for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
        yield from _linear(name, getattr(layer, name))
    convolutions = isinstance(layer.shift, SquashedConvolution)
    short = "k" if convolutions else "ssm_k"
    yield Entry(f"{short}_D", layer.shift.D, _NO_LEADING if convolutions else SAME)
    yield Entry("D", layer.ssm.D, _NO_LEADING)
    if convolutions:
        yield Entry("k_kernel.kernel", layer.shift.kernel)
        yield Entry("kernel.kernel", layer.ssm.kernel)
    else:
        yield from under("ssm_k_kernel.", _shift_table(layer.shift))
        yield from under("kernel.", _s4d_kernel_table(layer.ssm))


def _dense(layer, layout=SAME) -> Table:
    return _linear("output_linear.0", layer.linear if isinstance(layer, GLU) else layer, layout)


def _s4d_table(layer) -> Table:
    both = isinstance(layer, BidirectionalS4D)
    s4d = layer.forward if both else layer
    plain = isinstance(s4d.ssm.discretisation, ZOH) and isinstance(s4d.ssm.real_part, ExpReal)
    if not plain or s4d.ssm.B is not None or s4d.ssm.bandlimit is not None:
        raise ValueError(
            "safari's S4D knows ZOH(), ExpReal(), a B within C, and no bandlimit; this one has "
            f"{s4d.ssm.discretisation}, {s4d.ssm.real_part}, {'no' if s4d.ssm.B is None else 'a'} B of its own and "
            f"bandlimit={s4d.ssm.bandlimit}."
        )
    yield Entry("D", s4d.ssm.D)
    for entry in under("kernel.kernel.", _ssm_table(s4d.ssm, "log_w_real", "w_imag")):
        if both and entry.leaf is s4d.ssm.C:
            entry = entry._replace(leaf=(s4d.ssm.C, layer.C_backward), layout=_JOINED)
        yield entry
    if isinstance(s4d.output_linear, GLU):
        yield from _dense(s4d.output_linear)
    else:
        yield from _linear("output_linear", s4d.output_linear)


def _s4d_minimal_table(layer) -> Table:
    yield Entry("D", layer.ssm.D, _NO_LEADING)
    yield from under("kernel.", _ssm_table(layer.ssm, "log_A_real", "A_imag", _NO_LEADING))
    yield from _dense(layer.output_linear, _PIXEL)


def _long_conv_table(layer) -> Table:
    both = isinstance(layer, BidirectionalLongConv)
    one = layer.forward if both else layer
    yield Entry("D", one.conv.D)
    if both:
        yield Entry("kernel.kernel", (one.conv.kernel, layer.kernel_backward), _JOINED)
    else:
        yield Entry("kernel.kernel", one.conv.kernel)
    yield from _dense(one.output_linear)


def _long_conv_kernel_table(conv) -> Table:
    yield Entry("kernel", conv.kernel)


def _modal_table(ssm) -> Table:
    yield Entry("poles", (ssm.log_decay, ssm.phase), _POLES)
    yield Entry("residues", ssm.R, _RESIDUES)
    yield Entry("D", ssm.D, _NO_LEADING)


def _attention_table(layer) -> Table:
    if layer.window is not None:
        raise ValueError(f"safari's attention sees all of the past; this one has window={layer.window}.")
    yield from _linear("Wqkv", layer.Wqkv)
    if layer.short_conv is not None:
        yield from _short_conv("dwconv_qkv", layer.short_conv)
    if layer.rotary is not None:
        angles = layer.rotary.base ** (-np.arange(0, layer.rotary.dim, 2) / layer.rotary.dim)
        yield Entry("rotary_emb.inv_freq", None, known=angles)
    yield from _linear("out_proj", layer.out_proj)


def _torch_mha_table(layer) -> Table:
    yield Entry("mha.in_proj_weight", layer.Wqkv.weight)
    if layer.Wqkv.use_bias:
        yield Entry("mha.in_proj_bias", layer.Wqkv.bias)
    yield from _linear("mha.out_proj", layer.out_proj)


@functools.singledispatch
def _mixer_table(mixer: Any) -> Table:
    raise ValueError(f"safari has no names for a {type(mixer).__name__} in a language model.")


for _type, _table in {
    Hyena: _hyena_table,
    H3: _h3_table,
    S4D: _s4d_table,
    LongConv: _long_conv_table,
    Attention: _attention_table,
}.items():
    _mixer_table.register(_type, _table)


def _block_table(block) -> Table:
    yield from under("mixer.", _mixer_table(block.mixer))
    yield from _norm("norm1", block.norm1)
    yield from _linear("mlp.fc1", block.mlp.fc1)
    yield from _linear("mlp.fc2", block.mlp.fc2)
    yield from _norm("norm2", block.norm2)


def language_model(model) -> Table:
    embeddings = "backbone.embeddings"
    yield Entry(f"{embeddings}.word_embeddings.weight", model.embedding, copies=("lm_head.weight",))
    if model.positions is not None:
        yield Entry(f"{embeddings}.position_embeddings.weight", model.positions)
    for i, block in enumerate(model.backbone.blocks):
        yield from under(f"backbone.layers.{i}.", _block_table(block))
    yield from _norm("backbone.ln_f", model.backbone.norm)


LAYERS = {
    "s4d_kernel": _s4d_kernel_table,
    "shift_kernel": _shift_table,
    "longconv_kernel": _long_conv_kernel_table,
    "modal": _modal_table,
    "s4d_layer_safari": _s4d_table,
    "s4d_layer_minimal": _s4d_minimal_table,
    "h3": _h3_table,
    "h3conv": _h3_table,
    "longconv": _long_conv_table,
    "hyena": _hyena_table,
    "hyena_standalone": functools.partial(_hyena_table, filter_channels=_stage_first),
    "mha": _attention_table,
    "rotary_mha": _attention_table,
    "torch_mha": _torch_mha_table,
    "block": _block_table,
}
"""The table of each kind of layer."""
