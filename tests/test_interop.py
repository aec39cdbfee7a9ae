"""Reading and writing the S5 branch's parameters: names, dtypes, and everything that is refused."""

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import to_complex
from s5_fixture import Fixture

from s5eqx.interop import layer_from_s5, to_s5

SSM = "s5ssm_trunc_conj1_clip1_gelu"


@pytest.mark.parametrize("name", [SSM, "s5op_o3_sf3", "lm_s5_posemb"])
def test_round_trip_keeps_names_dtypes_and_bits(name):
    fixture = Fixture(name)
    params = fixture.params(np.float32)
    module = fixture.load(params)
    leaves = jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array))
    assert len(leaves) == len(params) and all(isinstance(leaf, jax.Array) for leaf in leaves)
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
    fixture.config[section] |= options
    with pytest.raises(ValueError, match=words):
        fixture.load(fixture.params(np.float32))


def test_other_layers_and_kinds_are_refused():
    fixture = Fixture("lm_s5")
    params = fixture.params(np.float32)
    with pytest.raises(ValueError, match="layer must be one of 'S5_operator'; got 'hyena'"):
        fixture.config["layer"] = "hyena"
        fixture.load(params)
    with pytest.raises(ValueError, match="kind must be one of 'ssm', 's5_operator'; got 'hyena_operator'"):
        layer_from_s5("hyena_operator", params, fixture.config)
    with pytest.raises(ValueError, match="config must give ssm_size, blocks, ssm_args"):
        layer_from_s5("ssm", params, fixture.config)


def test_module_without_names_is_refused(key):
    layer = Fixture(SSM).load(Fixture(SSM).params(np.float32))
    layer = eqx.tree_at(lambda s5: s5.activation, layer, eqx.nn.Identity())
    with pytest.raises(ValueError, match="no names for a Identity"):
        to_s5(layer)
