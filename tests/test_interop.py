"""Reading and writing foreign parameters: names, dtypes, and everything that is refused."""

import equinox as eqx
import jax
import ml_dtypes
import numpy as np
import pytest
import safari_fixture
from helpers import drawn, to_complex
from s5_fixture import Fixture

from s5eqx.interop import from_safari, layer_from_s5, layer_from_safari, layer_to_safari, to_s5, to_safari
from s5eqx.nn import S4D, Attention, Buffer, ModalSSM, materialise

SSM = "s5ssm_trunc_conj1_clip1_gelu"


@pytest.mark.smoke
@pytest.mark.parametrize("name", [SSM, "s5op_o3_sf3", "lm_s5_posemb", "hyenaop_o3", "lm_hyena"])
def test_round_trip_keeps_names_dtypes_and_bits(name):
    fixture = Fixture(name)
    params = fixture.params(np.float32)
    module = fixture.load(params)
    leaves = jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array))
    constants = jax.tree.leaves([leaf for leaf in jax.tree.leaves(module, is_leaf=_is_buffer) if _is_buffer(leaf)])
    assert len(leaves) == len(params) + len(constants) and all(isinstance(leaf, jax.Array) for leaf in leaves)
    back = to_s5(module)
    assert back.keys() == params.keys()
    for path, array in back.items():
        assert array.dtype == params[path].dtype
        np.testing.assert_array_equal(array, params[path])


def test_complex_C_is_read_as_real_pairs():
    fixture = Fixture("s5ssm_cplx_conj1_clip1_half_glu2")
    C = fixture["param/C"]
    layer = fixture.load(fixture.params(np.float32))
    assert layer.C.dtype == np.float32
    np.testing.assert_allclose(to_complex(layer.C), to_complex(C), rtol=1e-6)


def test_epsilon_of_the_norms_is_read():
    fixture = Fixture("lm_s5")
    fixture.config["seq_model_kwargs"]["layer_norm_epsilon"] = 0.25
    model = fixture.load(fixture.params(np.float32))
    block = model.backbone.blocks[1]
    assert (block.norm1.eps, block.norm2.eps, model.backbone.norm.eps) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    "path, array, words",
    [
        ("D", np.ones(11, np.float32), r"D must have shape \(12,\) .*got \(11,\)"),
        ("D", np.ones(12), "D must keep its dtype, float64.*float32.*jax_enable_x64"),
        ("D", np.ones(12, int), "D must be of floats.*int64"),
        ("D", np.ones(12, np.complex64), "D must be of floats.*complex64"),
        ("param/D", np.ones(12), r"left over: param/D of shape \(12,\)"),
    ],
)
def test_array_that_does_not_fit_is_refused(path, array, words):
    fixture = Fixture(SSM)
    params = fixture.params(np.float32) | {path: array}
    with pytest.raises(ValueError, match=words):
        fixture.load(params)


def test_missing_array_is_named():
    fixture = Fixture(SSM)
    params = fixture.params(np.float32)
    del params["log_step"]
    with pytest.raises(ValueError, match=r"missing: log_step of shape \(8, 1\)"):
        fixture.load(params)


@pytest.mark.parametrize(
    "name, section, options, words",
    [
        (SSM, "ssm_args", {"activation": "relu"}, "ssm_args/activation must be one of .*'relu'"),
        (SSM, "ssm_args", {"bidirectional": True}, "ssm_args .*bidirectional=True"),
        ("s5op_o2_sf3_inner2", "layer_kwargs", {}, "layer_kwargs/inner_factor must be 1.*got 2"),
        (
            "hyenaop_o3_outer_mixing_postffn_gelu",
            "layer_kwargs",
            {},
            "outer_mixing must be False.*got True",
        ),
        ("hyenaop_o2", "layer_kwargs", {"post_order_ffn": True}, "post_order_ffn must be False.*got True"),
        ("hyenaop_o2", "layer_kwargs", {"num_heads": 2}, "num_heads must be 1.*got 2"),
        ("hyenaop_o2", "layer_kwargs", {"filter_cls": "hyena_S5"}, "filter_cls must be 'hyena-filter'.*got 'hyena_S5'"),
        ("hyenaop_o2", "filter_args", {"emb_dim": 4}, "features must be odd.*got 4"),
        ("hyenaop_o2", "filter_args", {"modulate": False}, "filter_args .*modulate=False"),
        ("hyenaop_o2", "filter_args", {"num_inner_mlps": 3}, "missing: .*layers_8/kernel"),
        ("s5op_o2_sf3", "layer_kwargs", {"num_heads": 2}, "num_heads must be 1.*got 2"),
        ("s5op_o2_sf3", "layer_kwargs", {"outer_mixing": True}, "outer_mixing must be False.*got True"),
        ("s5op_o2_sf3", "layer_kwargs", {"post_order_ffn": True}, "post_order_ffn must be False.*got True"),
        ("s5op_o2_sf3", "layer_kwargs", {"activation_type": "relu"}, "activation_type .*'relu'"),
        ("s5op_o2_sf3", "layer_kwargs", {"order": 1}, "order must be at least 2.*got 1"),
        ("s5op_o2_sf3", "layer_kwargs", {"order": 3}, r"missing: filter_fn_1/Lambda_re of shape \(8,\)"),
        ("lm_s5", "seq_model_kwargs", {"max_position_embeddings": 8}, "missing: .*position_embeddings"),
        ("lm_s5", "seq_model_kwargs", {"rotary": True}, "seq_model_kwargs .*rotary=True"),
    ],
)
def test_option_that_is_not_offered_is_refused(name, section, options, words):
    fixture = Fixture(name)
    config = fixture.config if section in fixture.config else fixture.config["layer_kwargs"]
    config[section] |= options
    with pytest.raises(ValueError, match=words):
        fixture.load(fixture.params(np.float32))


def test_other_layers_and_kinds_are_refused():
    fixture = Fixture("lm_s5")
    params = fixture.params(np.float32)
    with pytest.raises(ValueError, match="layer must be one of 'S5_operator', 'hyena'; got 'H3'"):
        fixture.config["layer"] = "H3"
        fixture.load(params)
    with pytest.raises(ValueError, match="kind must be one of 'ssm', 's5_operator', 'hyena_operator'; got 'lm'"):
        layer_from_s5("lm", params, fixture.config)
    with pytest.raises(ValueError, match="config must give ssm_size, blocks, ssm_args"):
        layer_from_s5("ssm", params, fixture.config)


def test_module_without_names_is_refused(key):
    layer = Fixture(SSM).load(Fixture(SSM).params(np.float32))
    layer = eqx.tree_at(lambda s5: s5.activation, layer, eqx.nn.Identity())
    with pytest.raises(ValueError, match="no names for a Identity"):
        to_s5(layer)


def test_unused_skips_are_checked_and_come_back_as_zeros():
    fixture = Fixture("hyenaop_o2_emb3_norm_nobias")
    params = fixture.params(np.float32)
    back = to_s5(fixture.load(params))
    assert back.keys() == params.keys() and not np.any(np.asarray(back["filter_fn/bias"]))
    with pytest.raises(ValueError, match=r"filter_fn/bias must have shape \(16,\).*\(3,\)"):
        fixture.load(params | {"filter_fn/bias": np.ones(3, np.float32)})


# safari


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["lm_h3_hybrid", "lm_hyena", "hyena_standalone_o3", "s4d_safari_bidir", "h3conv_a"])
def test_safari_round_trip_keeps_names_dtypes_and_bits(name):
    fixture = safari_fixture.Fixture(name)
    params = fixture.params(np.float32)
    params = {name: a.astype(ml_dtypes.bfloat16) if "proj" in name else a for name, a in params.items()}
    back = fixture.save(fixture.load(params))
    assert back.keys() - params.keys() <= {"lm_head.weight"}
    for path, array in params.items():
        assert back[path].dtype == array.dtype
        np.testing.assert_array_equal(back[path], array)


def test_names_may_have_a_prefix_and_the_head_its_own_name():
    fixture = safari_fixture.Fixture("lm_transformer")
    params, config = fixture.params(np.float32), fixture.meta["config"]
    model = from_safari(params, config)
    is_read = lambda params: eqx.tree_equal(*jax.device_get((from_safari(params, config), model)))
    assert is_read({f"model.{name}": a for name, a in params.items()})
    part = {name: f"model.{name}" if "ln_f" in name else name for name in params}  # as in a file with a bare alias
    assert is_read({part[name]: a for name, a in params.items()})
    with pytest.raises(ValueError, match=r"with and without `model\.`"):
        from_safari(params | {"model.backbone.ln_f.bias": params["backbone.ln_f.bias"]}, config)
    full = to_safari(model)
    assert full.keys() - params.keys() == {"lm_head.weight"}
    assert is_read(full)
    with pytest.raises(ValueError, match=r"lm_head.weight and .*word_embeddings.weight are one tensor.*differ"):
        from_safari(full | {"lm_head.weight": np.zeros((10, 8), np.float32)}, config)


def test_shared_frequencies_must_be_equal():
    fixture = safari_fixture.Fixture("hyena_o2")
    params = fixture.params(np.float32)
    name = "filter_fn.implicit_filter.3.freq"
    with pytest.raises(ValueError, match=rf"{name} and .*\.1\.freq are one tensor.*differ"):
        fixture.load(params | {name: params[name] + 1})
    del params[name]
    assert name in fixture.save(fixture.load(params))


def test_known_buffer_is_checked():
    fixture = safari_fixture.Fixture("rotary_mha_neox")
    params = fixture.params(np.float32)
    angles = np.asarray(10000.0 ** (-np.arange(0, 8, 2) / 8), np.float32)
    fixture.load(params | {"rotary_emb.inv_freq": angles})
    with pytest.raises(ValueError, match=r"rotary_emb.inv_freq must have the value.*differs"):
        fixture.load(params | {"rotary_emb.inv_freq": 2 * angles})


def test_options_of_a_model_are_read():
    fixture = safari_fixture.Fixture("lm_h3_hybrid")
    config = fixture.meta["config"] | {"layer_norm_epsilon": 0.25, "resid_dropout": 0.2}
    model = from_safari(fixture.params(np.float32), config, max_length=7)
    h3, attention = model.backbone.blocks
    assert len(model.embedding) == 16  # 10 tokens, padded to a multiple of 8
    assert (model.embed_dropout.p, h3.dropout.p, attention.mixer.dropout.p) == (0.1, 0.2, 0.1)
    assert model.embed_dropout.inference and h3.dropout.inference and attention.mixer.dropout.inference
    assert (h3.norm1.eps, attention.norm2.eps, model.backbone.norm.eps) == (0.25, 0.25, 0.25)
    assert attention.mixer.max_length == 7
    z = from_safari(*_with_layer("lm_hyena", {"lr_pos_emb": 1e-5})).backbone.blocks[0].mixer.bank.z
    assert isinstance(z, jax.Array)  # trained
    z = from_safari(*_with_layer("lm_hyena", {})).backbone.blocks[0].mixer.bank.z
    assert isinstance(z, Buffer)


def _with_layer(name, options):
    fixture = safari_fixture.Fixture(name)
    config = fixture.meta["config"]
    return fixture.params(np.float32), config | {"layer": config["layer"] | options}


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("lm_hyena", {"num_heads": 2}, "layer/num_heads must be 1, the only one offered; got 2"),
        ("lm_hyena", {"inner_factor": 2}, "layer/inner_factor must be 1.*got 2"),
        ("lm_hyena", {"num_blocks": 2}, "layer/num_blocks must be 1.*got 2"),
        ("lm_hyena", {"post_order_ffn": True}, "layer/post_order_ffn must be False"),
        ("lm_hyena", {"filter_args": {"emb_dim": 5}}, "layer must hold options out of .*filter_args="),
        ("lm_hyena", {"l_max": 15}, r"filter_fn.pos_emb.z must have shape \(1, 15, 5\).*got \(1, 14, 5\)"),
        ("lm_hyena", {"order": 3}, r"in_proj.weight must have shape \(32, 8\)"),
        ("lm_hyena", {"_name_": "mamba"}, "config/layer/_name_ must be one of 'hyena', 'h3'.*got 'mamba'"),
        ("lm_h3", {"mode": "nplr"}, "layer/mode must be 'diag'.*got 'nplr'"),
        ("lm_h3", {"head_dim": 3}, "layer/head_dim must divide the width 8; got 3"),
        ("lm_h3", {"real_type": "relu"}, "real_type must be one of 'exp', 'softplus'; got 'relu'"),
        ("lm_h3", {"disc": "dss"}, "disc must be one of .*got 'dss'"),
        ("lm_s4d", {"postact": "glu"}, "missing: .*output_linear.0.weight.*\n.*left over: .*output_linear.weight"),
        ("lm_s4d", {"bidirectional": True}, "layer/bidirectional must be False, .*causal; got True"),
        ("lm_s4d", {"gate": 2}, "layer must hold options out of .*gate=2"),
    ],
)
def test_layer_of_safari_that_is_not_offered_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        from_safari(*_with_layer(name, options))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"attn_layer_idx": [2]}, r"attn_layer_idx must hold layers from 0 to 1; got \[2\]"),
        ({"attn_cfg": {"dropout": 0.1}}, "attn_cfg must give num_heads; it gives dropout"),
        ({"attn_cfg": {"num_heads": 3}}, "width must be a positive multiple of num_heads"),
        ({"attn_cfg": {"num_heads": 2, "causal": False}}, "attn_cfg/causal must be True"),
        ({"layer": {}}, "config/layer must give _name_"),
        ({"vocabulary": 3}, "config must hold options out of .*vocabulary=3"),
        ({"max_position_embeddings": 12}, "missing: .*position_embeddings.weight of shape"),
    ],
)
def test_config_of_safari_that_does_not_fit_is_refused(options, words):
    fixture = safari_fixture.Fixture("lm_h3_hybrid")
    with pytest.raises(ValueError, match=words):
        from_safari(fixture.params(np.float32), fixture.meta["config"] | options)


def test_layers_of_safari_that_do_not_fit_are_refused():
    fixture = safari_fixture.Fixture("mha_h2")
    params = fixture.params(np.float32)
    with pytest.raises(ValueError, match=r"kind must be one of 's4d_kernel', .*got 'lm'"):
        layer_from_safari("lm", params, fixture.meta)
    with pytest.raises(ValueError, match="meta must give H, N; it gives"):
        layer_from_safari("shift_kernel", params, {"L": 3})
    with pytest.raises(ValueError, match=r"left over: extra of shape \(1,\)"):
        fixture.load(params | {"extra": np.ones(1)})
    with pytest.raises(ValueError, match=r"Wqkv.bias must be of floats.*int64"):
        fixture.load(params | {"Wqkv.bias": np.ones(24, int)})
    with pytest.raises(ValueError, match=r"safari has names for a Hyena over an ImplicitFilter.*MixerBank"):
        hyena = safari_fixture.Fixture("hyena_o2")
        layer_to_safari("hyena", materialise(hyena.load(hyena.params(np.float32))))
    with pytest.raises(ValueError, match="no names for a ShortConv in a language model"):
        block = safari_fixture.Fixture("block_a").load(safari_fixture.Fixture("block_a").params(np.float32))
        conv = Fixture("s5op_o2_sf3").load(Fixture("s5op_o2_sf3").params(np.float32)).short_conv
        layer_to_safari("block", eqx.tree_at(lambda block: block.mixer, block, conv))


def _is_buffer(node):
    return isinstance(node, Buffer)


def test_width_of_an_mlp_comes_from_its_arrays():
    fixture = safari_fixture.Fixture("block_a")
    params = fixture.params(np.float32)
    params["mlp.fc1.weight"], params["mlp.fc1.bias"] = params["mlp.fc1.weight"][:5], params["mlp.fc1.bias"][:5]
    params["mlp.fc2.weight"] = params["mlp.fc2.weight"][:, :5]
    assert fixture.load(params).mlp.fc1.out_features == 5


def test_standalone_hyena_ignores_what_its_code_ignores():
    fixture = safari_fixture.Fixture("hyena_standalone_o3")
    params = fixture.params(np.float32)
    fixture.meta |= {"normalized": True, "bias": False, "short_filter_order": 4}
    layer = fixture.load(params)
    assert not layer.bank.normalize and layer.bank.bias is not None and len(layer.short_conv.weight) == 3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("longconv_squash_C1", {"causal": False}, "causal must be True"),
        ("longconv_kernel_squash_envelope", {"causal": False}, "causal must be True"),
        ("hyena_o2", {"modulation_lr": 0.001}, "modulation_lr must be 0.0"),
        ("longconv_squash_C1", {"postact": None}, "postact must be one of 'id', 'glu'; got None"),
    ],
)
def test_option_of_safari_that_changes_the_function_is_refused(name, options, words):
    fixture = safari_fixture.Fixture(name)
    fixture.meta |= options
    with pytest.raises(ValueError, match=words):
        fixture.load(fixture.params(np.float32))


@pytest.mark.parametrize(
    ("kind", "build", "words"),
    [
        ("mha", lambda key: Attention(4, window=3, key=key), "window=3"),
        ("s4d_layer_safari", lambda key: S4D(4, 4, bandlimit=0.5, key=key), "bandlimit=0.5"),
        ("s4d_layer_safari", lambda key: S4D(4, 4, train_B=True, key=key), "a B of its own"),
        ("modal", lambda key: ModalSSM(4, 2, channels=3, key=key), "one output a channel; this ModalSSM has 3"),
    ],
)
def test_what_safari_would_compute_differently_is_not_written(kind, build, words, key):
    with pytest.raises(ValueError, match=words):
        layer_to_safari(kind, drawn(build, key))
