"""Layers from the options of safari. They are only built in the abstract, so nothing is drawn."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import PRNGKeyArray
from s5eqx.interop._table import choose, read, refuse, with_epsilon
from s5eqx.nn import (
    H3,
    MLP,
    S4D,
    ZOH,
    Attention,
    BidirectionalLongConv,
    BidirectionalS4D,
    Bilinear,
    Block,
    DiagonalSSM,
    ExpReal,
    Gelu,
    Hyena,
    ImplicitFilter,
    LongConv,
    ModalSSM,
    Rotary,
    ShiftSSM,
    SmoothFrequency,
    SmoothTime,
    SoftplusReal,
    SquashedConvolution,
)

_ACTIVATIONS = {
    None: eqx.nn.Identity(),
    "id": eqx.nn.Identity(),
    "identity": eqx.nn.Identity(),
    "linear": eqx.nn.Identity(),
    "sigmoid": eqx.nn.Lambda(jax.nn.sigmoid),
    "swish": eqx.nn.Lambda(jax.nn.silu),
    "gelu": Gelu(),
    "relu": eqx.nn.Lambda(jax.nn.relu),
    "silu": eqx.nn.Lambda(jax.nn.silu),
    "tanh": eqx.nn.Lambda(jnp.tanh),
}
_GATED = {"id": False, "glu": True}
_DISCRETISATIONS = {"zoh": ZOH(), "bilinear": Bilinear()}
_REAL_PARTS = {"exp": ExpReal(), "softplus": SoftplusReal()}

# Options of the first draw, which the weights replace, of training, and of the implementation.
_TRAINING = ("_name_", "lr", "wd", "lr_dt", "layer_idx", "device", "dtype", "l_max", "transposed", "return_state")
_TRAINING += ("verbose", "use_flashfftconv")
_DRAWING = ("measure", "dt_min", "dt_max", "scaling", "init", "weight_init", "learning_rate", "init_scale")

# 1. The layers of a language model, from what a configuration says of them.


def mixers(config: Mapping[str, Any], width: int, depth: int, max_length: int, key: PRNGKeyArray) -> tuple[Any, ...]:
    """The mixer of each layer. `max_length` is for attention, where the configuration gives none."""
    attention = config.get("attn_layer_idx") or ()
    if not all(0 <= i < depth for i in attention):
        raise ValueError(f"config/attn_layer_idx must hold layers from 0 to {depth - 1}; got {list(attention)}.")
    options = config.get("layer") or {}
    max_length = max(0, config.get("max_position_embeddings", 0)) or options.get("l_max") or max_length
    chosen = []
    for i, layer_key in enumerate(jr.split(key, depth)):
        if i in attention:
            (cfg,) = read("config", config, "attn_cfg")
            chosen.append(_attention(cfg or {}, width, max_length, layer_key))
        else:
            (name,) = read("config/layer", options, "_name_")
            if options.get("bidirectional", False):
                raise ValueError(
                    "config/layer/bidirectional must be False, since a language model is causal; got True."
                )
            chosen.append(choose("config/layer/_name_", name, _LAYERS)(options, width, layer_key))
    return tuple(chosen)


def _hyena(options, width, key):
    known = ("order", "filter_order", "emb_dim", "num_inner_mlps", "bias", "modulate", "shift", "normalized")
    known += ("short_filter_order", "activation", "dropout", "lr_pos_emb")
    ignored = ("w", "fast_decay_pct", "slow_decay_pct", "target", "local_order", "filter_dropout")
    ignored += ("fused_fft_conv", "fused_bias_fc", "jit_filter", "seq_len")
    only = {"num_heads": 1, "inner_factor": 1, "num_blocks": 1, "outer_mixing": False, "post_order_ffn": False}
    only |= {"linear_mixer": False, "filter_cls": "hyena-filter", "modulation_lr": 0.0}
    refuse("layer", options, known + ignored + _TRAINING, only)
    (max_length,) = read("layer", options, "l_max")
    order = options.get("order", 2)
    bank = ImplicitFilter(
        width,
        max_length,
        order=order,
        features=options.get("emb_dim", 3),
        filter_width=options.get("filter_order", 64),
        num_hidden=options.get("num_inner_mlps", 2),
        modulate=options.get("modulate", True),
        shift=options.get("shift", 0.0),
        normalize=options.get("normalized", False),
        use_bias=options.get("bias", True),
        train_positions=options.get("lr_pos_emb", 1e-5) != 0.0,
        key=key,
    )
    return Hyena(
        width,
        bank,
        order=order,
        short_filter=options.get("short_filter_order", 3),
        activation=choose("layer/activation", options.get("activation", "id"), _ACTIVATIONS),
        dropout=options.get("dropout", 0.0),
        key=key,
    )


def _hyena_standalone(options, width, key):
    """The form in one file takes these options, and does nothing with them."""
    dead = ("normalized", "bias", "activation", "short_filter_order")
    return _hyena({name: value for name, value in options.items() if name not in dead}, width, key)


def _ssm(options, width, key, num_ssm, disc, train_B):
    """The state-space model that the options describe, `disc` by default."""
    return DiagonalSSM(
        width,
        options.get("d_state", 64),
        num_ssm=options.get("n_ssm", num_ssm),
        channels=options.get("channels", 1),
        train_B=train_B,
        discretisation=choose("disc", options.get("disc", disc), _DISCRETISATIONS),
        real_part=choose("real_type", options.get("real_type", "exp"), _REAL_PARTS),
        bandlimit=options.get("bandlimit"),
        key=key,
    )


def _h3(options, width, key):
    known = ("d_state", "head_dim", "n_ssm", "disc", "real_type", "bandlimit", "use_fast_fftconv", "dropout")
    refuse("layer", options, known + _TRAINING + _DRAWING, {"mode": "diag", "channels": 1})
    head_dim = options.get("head_dim", 1)
    if width % head_dim:
        raise ValueError(f"layer/head_dim must divide the width {width}; got {head_dim}.")
    shift = ShiftSSM(width, options.get("d_state", 64), key=key)
    ssm = _ssm(options, width // head_dim, key, num_ssm=None, disc="bilinear", train_B=True)
    return H3(width, shift, ssm, head_dim=head_dim, key=key)


def _h3_conv(options, width, key):
    known = (*_SQUASH, "use_fast_fftconv", "dropout")
    refuse("layer", options, known + _TRAINING + _DRAWING, {"head_dim": 1, "channels": 1} | _CAUSAL)
    shift, ssm = (_squashed(options, width, 1, key) for _ in range(2))
    return H3(width, shift, ssm, key=key)


_SQUASH = ("lam", "use_ma_smoothing", "ma_window_len", "smooth_freq", "kernel_dropout")
_CAUSAL = {"causal": True, "weight_norm": False, "block_fft_conv": False, "initializer": None}


def _squashed(options, width, channels, key):
    (max_length,) = read("layer", options, "l_max")
    smooth = SmoothFrequency if options.get("smooth_freq", False) else SmoothTime
    return SquashedConvolution(
        width,
        max_length,
        channels=channels,
        lam=options.get("lam", 0.1),
        smooth=smooth(options.get("ma_window_len", 7)) if options.get("use_ma_smoothing", False) else None,
        dropout=options.get("kernel_dropout", 0.0),
        key=key,
    )


def _s4d(options, width, key):
    known = ("d_state", "channels", "n_ssm", "bidirectional", "activation", "postact", "dropout", "tie_dropout")
    refuse("layer", options, known + _TRAINING + _DRAWING, {"disc": "zoh", "real_type": "exp"})
    gated = choose("layer/postact", options.get("postact"), {None: False, "glu": True})
    return _s4d_of(options, width, key, gated, num_ssm=1)


def _s4d_of(options, width, key, gated, num_ssm):
    layer = BidirectionalS4D if options.get("bidirectional", False) else S4D
    return layer(
        width,
        options.get("d_state", 64),
        num_ssm=options.get("n_ssm", num_ssm),
        channels=options.get("channels", 1),
        activation=choose("layer/activation", options.get("activation", "gelu"), _ACTIVATIONS),
        dropout=options.get("dropout", 0.0),
        glu=gated,
        key=key,
    )


def _long_conv(options, width, key):
    known = (*_SQUASH, "channels", "bidirectional", "activation", "postact", "dropout", "tie_dropout")
    refuse("layer", options, known + _TRAINING + _DRAWING, _CAUSAL)
    channels, (max_length,) = options.get("channels", 1), read("layer", options, "l_max")
    bidirectional = options.get("bidirectional", False)
    layer = (BidirectionalLongConv if bidirectional else LongConv)(
        width,
        max_length,
        channels=channels,
        activation=choose("layer/activation", options.get("activation", "gelu"), _ACTIVATIONS),
        dropout=options.get("dropout", 0.0),
        key=key,
    )
    one = lambda layer: layer.forward if bidirectional else layer
    layer = eqx.tree_at(lambda layer: one(layer).conv, layer, _squashed(options, width, channels, key))
    if not choose("layer/postact", options.get("postact", "glu"), _GATED):
        plain = eqx.nn.Linear(channels * width, width, key=key)
        layer = eqx.tree_at(lambda layer: one(layer).output_linear, layer, plain)
    return layer


def _attention(options, width, max_length, key):
    known = ("num_heads", "dropout", "dwconv", "bias", "rotary_emb_dim", "rotary_emb_base", "rotary_emb_interleaved")
    ignored = ("use_flash_attn", "fused_bias_fc", "layer_idx", "device", "dtype")
    refuse("attn_cfg", options, known + ignored, {"causal": True, "softmax_scale": None})
    (num_heads,) = read("attn_cfg", options, "num_heads")
    turned = options.get("rotary_emb_dim", 0)
    base, interleaved = options.get("rotary_emb_base", 10000.0), options.get("rotary_emb_interleaved", False)
    return Attention(
        width,
        num_heads,
        max_length=max_length,
        use_bias=options.get("bias", True),
        rotary=Rotary(turned, base, interleaved) if turned else None,
        short_conv=3 if options.get("dwconv", False) else 0,
        dropout=options.get("dropout", 0.0),
        key=key,
    )


_LAYERS = {"hyena": _hyena, "h3": _h3, "h3-conv": _h3_conv, "s4d": _s4d, "long-conv": _long_conv}


# 2. The options of a single layer. Its length is what models call `l_max`.


def _layer(build):
    def layer(meta, max_length, key):
        (width,) = read("meta", meta, "d_model")
        options = {name: value for name, value in meta.items() if name not in ("d_model", "L")}
        if options.get("l_max") is None and "L" in meta:
            options["l_max"] = meta["L"]
        return build(options, width, key)

    return layer


def _s4d_kernel(meta, max_length, key):
    known = ("H", "N", "L", "channels", "n_ssm", "disc", "real_type", "bandlimit")
    refuse("meta", meta, known + _TRAINING + _DRAWING, {"mode": "diag"})
    width, state_size = read("meta", meta, "H", "N")
    return _ssm({**meta, "d_state": state_size}, width, key, num_ssm=None, disc="bilinear", train_B=True)


def _shift_kernel(meta, max_length, key):
    refuse("meta", meta, ("H", "N", "L", *_TRAINING, *_DRAWING), {"mode": "shift", "channels": 1})
    return ShiftSSM(*read("meta", meta, "H", "N"), key=key)


def _long_conv_kernel(meta, max_length, key):
    refuse("meta", meta, ("H", "L", "channels", *_SQUASH, *_TRAINING, *_DRAWING), _CAUSAL)
    width, length = read("meta", meta, "H", "L")
    return _squashed({**meta, "l_max": length}, width, meta.get("channels", 1), key)


def _modal(meta, max_length, key):
    refuse("meta", meta, ("D", "state", "L", "prefill"), {})
    return ModalSSM(*read("meta", meta, "D", "state"), key=key)


def _s4d_minimal(options, width, key):
    refuse("meta", options, ("d_state", "dropout", *_TRAINING, *_DRAWING), {})
    return _s4d_of(options, width, key, True, num_ssm=None)


def _mha(meta, max_length, key):
    names = {"heads": "num_heads", "rotary_dim": "rotary_emb_dim", "base": "rotary_emb_base"}
    names |= {"interleaved": "rotary_emb_interleaved"}
    (width,) = read("meta", meta, "d_model")
    options = {names.get(name, name): value for name, value in meta.items() if name not in ("d_model", "L")}
    return _attention(options, width, max_length, key)


def _block(meta, max_length, key):
    options = {name: value for name, value in meta.items() if name not in ("eps", "mlp", "d_inner")}
    (width,) = read("meta", meta, "d_model")
    block = Block(_mha(options, max_length, key), MLP(width, meta.get("d_inner") or 4 * width, key=key))
    return with_epsilon(block, meta.get("eps", 1e-5))


LAYERS = {
    "s4d_kernel": _s4d_kernel,
    "shift_kernel": _shift_kernel,
    "longconv_kernel": _long_conv_kernel,
    "modal": _modal,
    "s4d_layer_safari": _layer(_s4d),
    "s4d_layer_minimal": _layer(_s4d_minimal),
    "h3": _layer(_h3),
    "h3conv": _layer(_h3_conv),
    "longconv": _layer(_long_conv),
    "hyena": _layer(_hyena),
    "hyena_standalone": _layer(_hyena_standalone),
    "mha": _mha,
    "rotary_mha": _mha,
    "torch_mha": _mha,
    "block": _block,
}
"""Each kind of layer as a function of `(meta, max_length, key)`."""
