"""Weights of safari (Hyena, H3, S4D, long convolutions, attention), into our modules and back; of StripedHyena, its
modal layer.

Parameters are a state dict: a flat mapping of dotted names to arrays, such as
`backbone.layers.0.mixer.in_proj.weight`. One line turns a checkpoint into it:

    {name: a.numpy() for name, a in torch.load(path, weights_only=True)["state_dict"].items()}

Source: HazyResearch/safari; the layer S4D of state-spaces/s4; the modal layer of togethercomputer/stripedhyena.

Differs from the reference: heads of H3 lie in the order (head, channel), as its CUDA kernel and the published
checkpoints have it; the plain code path has (channel, head).
"""

import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from s5eqx._typing import Array, Inexact, checked
from s5eqx.interop import _safari_names as _names
from s5eqx.interop import _safari_options as _options
from s5eqx.interop._table import Params, arrays, choose, fill, hidden, read, refuse, with_epsilon
from s5eqx.models import LanguageModel
from s5eqx.nn import AbstractLayer, SquashedConvolution

_HINT = "that the names are those of a state dict, with or without a leading `model.`"

# Options of training and of the implementation, and what describes a layer beside its options.
_MODEL = (
    "_name_",
    "dropout_cls",
    "norm_cls",
    "initializer_cfg",
    "checkpoint_mlp",
    "checkpoint_mixer",
    "fused_mlp",
    "fused_dropout_add_ln",
    "residual_in_fp32",
    "process_group",
    "sequence_parallel",
    "device",
    "dtype",
)
_ABOUT = ("kind", "name", "source", "note", "seed", "batch", "perturbed", "z_perturbed", "prefill_len", "n_heads")
_ABOUT += ("numpy", "torch", "tied")


@checked
def from_safari(params: Params, config: Mapping[str, Any], *, max_length: int = 2048) -> LanguageModel:
    """The language model that holds `params`. Its dropouts are off: `eqx.nn.inference_mode(model, False)` turns them
    on.

    **Arguments:**

    - `params`: NumPy or JAX arrays by name, with or without a leading `model.`. The model keeps their dtypes.
    - `config`: `vocab_size`, `d_model`, `n_layer`, `layer` with its `_name_`, and the other options of the official
        language model.
    - `max_length`: the longest sequence for attention, in tokens, where `config` gives none.

    **Raises:** `ValueError` for an option that is not offered here, and for an array that is missing, left
    over, or of another shape than `config` asks for.
    """
    vocab_size, width, depth = read("config", config, "vocab_size", "d_model", "n_layer")
    known = ("vocab_size", "d_model", "n_layer", "d_inner", "layer", "attn_layer_idx", "attn_cfg")
    known += ("max_position_embeddings", "pad_vocab_size_multiple", "layer_norm_epsilon")
    refuse("config", config, (*known, "embed_dropout", "resid_dropout", *_MODEL), {"return_hidden_state": False})
    bare = {name.removeprefix("model."): array for name, array in params.items()}
    padding = config.get("pad_vocab_size_multiple") or 1
    skeleton = eqx.filter_eval_shape(
        lambda key: LanguageModel(
            -(-vocab_size // padding) * padding,
            width,
            _options.mixers(config, width, depth, max_length, key),
            mlp_width=config.get("d_inner") or hidden(bare, "backbone.layers.0.mlp.fc1.weight", 0) or 4 * width,
            max_length=max(0, config.get("max_position_embeddings", 0)) or None,
            embed_dropout=config.get("embed_dropout", 0.1),
            dropout=config.get("resid_dropout", 0.0),
            key=key,
        ),
        jr.key(0),
    )
    if len(bare) < len(params):
        raise ValueError("Each array must be given once; some names come with and without `model.`. Keep one of each.")
    skeleton = with_epsilon(skeleton, config.get("layer_norm_epsilon", 1e-5))
    return eqx.nn.inference_mode(fill(skeleton, _names.language_model, bare, _HINT))


@checked
def to_safari(model: LanguageModel) -> dict[str, Inexact[Array, "..."]]:
    """The inverse of `from_safari`: arrays by name, in the reference's layout, a shared one under each of its names.

    A gradient has the structure of its model and is translated alike.
    """
    return arrays(_names.language_model(model))


@checked
def layer_from_safari(kind: str, params: Params, meta: Mapping[str, Any], *, max_length: int = 2048) -> AbstractLayer:
    """The single layer that holds `params`. It acts on one example: `jax.vmap(layer)(u)` on a batch.

    **Arguments:**

    - `kind`: `"s4d_kernel"`, `"shift_kernel"`, `"longconv_kernel"`, `"modal"`, `"s4d_layer_safari"`,
        `"s4d_layer_minimal"`, `"h3"`, `"h3conv"`, `"longconv"`, `"hyena"`, `"hyena_standalone"`, `"mha"`,
        `"rotary_mha"`, `"torch_mha"` or `"block"`. The kernels become layers without a skip.
    - `params`: NumPy or JAX arrays by name. The layer keeps their dtypes.
    - `meta`: the sizes and options of the layer.
    - `max_length`: the longest sequence for attention, in tokens.

    **Raises:** `ValueError` as `from_safari` does.
    """
    build, table = choose("kind", kind, _options.LAYERS), _names.LAYERS[kind]
    options = {name: value for name, value in meta.items() if name not in _ABOUT}
    if kind == "block":
        options["d_inner"] = options.get("d_inner") or hidden(params, "mlp.fc1.weight", 0)
    skeleton = eqx.filter_eval_shape(functools.partial(build, options, max_length), jr.key(0))
    layer = fill(skeleton, table, params, _HINT)
    return eqx.nn.inference_mode(_without_skip(layer) if kind.endswith("_kernel") else layer)


@checked
def layer_to_safari(kind: str, layer: AbstractLayer) -> dict[str, Inexact[Array, "..."]]:
    """The inverse of `layer_from_safari`; a gradient is translated alike, but for the poles of `"modal"`, which are
    no linear function of ours."""
    return arrays(choose("kind", kind, _names.LAYERS)(layer))


def _without_skip(layer):
    weight = layer.kernel if isinstance(layer, SquashedConvolution) else layer.C
    return eqx.tree_at(lambda layer: layer.D, layer, jnp.zeros(layer.D.shape, weight.dtype))
