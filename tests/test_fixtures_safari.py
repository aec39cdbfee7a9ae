"""Hyena, H3, S4D, long convolutions, attention and their models against safari's own numbers: outputs, gradients,
chunks and steps."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import but_slow, drawn, on_device, quick_jit, relative_error, slow
from safari_fixture import FOLDER, Fixture

from s5eqx import nn
from s5eqx.interop import to_safari
from s5eqx.models import GPT2Init, LanguageModel

H3_FILES = ["h3_1head_hd4", "h3_2heads_hd4", "h3_hd1", "h3_hd1_oddL_N16", "h3_hd2", "h3conv_a"]
HYENA_FILES = ["hyena_o2", "hyena_o2_nomod_freez", "hyena_o2_shortseq", "hyena_o3", "hyena_o3_shift_norm_sf4"]
HYENA_FILES += ["hyena_standalone_o3"]
LONG_CONV_FILES = ["longconv_bidir_C2", "longconv_nopost", "longconv_smooth_freq", "longconv_smooth_time"]
LONG_CONV_FILES += ["longconv_squash_C1", "longconv_squash_C2_glu"]
ATTENTION_FILES = ["mha_h1", "mha_h2", "mha_h2_dwconv", "mha_h4_mask", "rotary_mha_neox", "rotary_mha_neox_partial"]
ATTENTION_FILES += ["torchmha_h2"]
S4D_FILES = ["s4d_minimal_a", "s4d_safari_bidir", "s4d_safari_inv", "s4d_safari_lin_glu_C2"]
S4D_KERNELS = ["s4dkernel_combo_tied_zoh", "s4dkernel_inv2_bilinear_C2", "s4dkernel_inv_zoh"]
S4D_KERNELS += ["s4dkernel_legs_bilinear", "s4dkernel_lin_bilinear", "s4dkernel_lin_bilinear_default"]
S4D_KERNELS += ["s4dkernel_lin_zoh", "s4dkernel_lin_zoh_bandlimit"]
SHIFT_KERNELS = ["shiftkernel_N4_L12", "shiftkernel_N8_L6", "shiftkernel_default"]
MODELS = ["lm_h3", "lm_h3_hybrid", "lm_hyena", "lm_s4d", "lm_transformer"]
TABLES = ["hyena_posemb_33_20", "hyena_posemb_5_32", "s4d_init_tables"]
OTHERS = ["block_a", "longconv_kernel_squash_envelope", "modal_a", "s4dkernel_lin_dss"]
FILES = H3_FILES + HYENA_FILES + LONG_CONV_FILES + ATTENTION_FILES + S4D_FILES + S4D_KERNELS + SHIFT_KERNELS
FILES += MODELS + TABLES + OTHERS


def test_every_file_is_run():
    assert sorted(FILES) == sorted(path.stem for path in FOLDER.glob("*.npz") if not path.stem.startswith("data_"))


def streamed(mixer, x):
    """The first half as a chunk and the rest step by step: output, state after the chunk, final state."""
    half = len(x) // 2
    state, y = mixer.prefill(mixer.init_state(), x[:half])
    final, y_step = jax.lax.scan(lambda state, x_t: mixer.step(state, x_t), state, x[half:])
    return jnp.concatenate([y, y_step]), state, final


@quick_jit
def run_layer(save, layer, x, cot, stream):
    """Output, gradients of sum(cot y) by name and of x, and if asked output and states of a chunk and steps."""

    def loss(layer_and_x):
        layer, x = layer_and_x
        y = jax.vmap(layer)(x)
        return jnp.sum(cot * y), y

    (gradient, gradient_x), y = eqx.filter_grad(loss, has_aux=True)((layer, x))
    return y, save(gradient), gradient_x, jax.vmap(lambda x: streamed(layer, x))(x) if stream else None


def causal(layer):
    return isinstance(layer, nn.AbstractCausalMixer)


def check_layer(fixture, layer, dtype, x="x", **of):
    """Everything that all layers share. Returns the states after the chunk and at the end where the file has steps; of
    all other layers the law of a mixer is the test."""
    stream = any(path.startswith("step/") for path in fixture.arrays)
    inputs = fixture.inputs(dtype, f"in/{x}", "cot")
    y, gradient, gradient_x, stream = run_layer(fixture.save, layer, *inputs, stream)
    fixture.check("out/y", y)
    fixture.check(f"gin/{x}", gradient_x)
    fixture.check_gradient(gradient, **of)
    if stream is not None:
        fixture.check("out/y", stream[0])
    return stream and stream[1:]


def heads_last(meta, name, array):
    """The columns of `output_linear` for heads in the order (channel, head), that of the plain code path."""
    if name != "output_linear.weight":
        return array
    head_dim = meta.get("head_dim", 1)
    return array.reshape(len(array), head_dim, -1).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("name", but_slow(H3_FILES, "h3_1head_hd4", "h3_hd1", "h3_hd2"))
def test_h3(name, dtype):
    fixture = Fixture(name)
    permute = lambda name, array: heads_last(fixture.meta, name, array)
    params = fixture.params(dtype)
    layer = fixture.load({name: permute(name, array) for name, array in params.items()})
    states = check_layer(fixture, layer, dtype, of=permute)
    if "out/y_fast" in fixture:
        inputs = fixture.inputs(dtype, "in/x", "cot")
        fixture.check("out/y_fast", run_layer(fixture.save, fixture.load(params), *inputs, states is not None)[0])
    if "step/y" in fixture:
        for at, (shift, diagonal) in zip(("after_prefill", "final"), states, strict=True):
            fixture.check(f"step/state_shift_{at}", shift)
            fixture.check(f"step/state_diag_{at}", diagonal)
        half = fixture.meta["prefill_len"]
        assert half == fixture.meta["L"] // 2  # as in `streamed`, whose output is out/y, and that is
        fixture.check("step/prefill_y", fixture["out/y"][:, :half])
        fixture.check("step/y", fixture["out/y"][:, half:])


@pytest.mark.parametrize(
    "name", but_slow(HYENA_FILES, "hyena_o2", "hyena_o2_nomod_freez", "hyena_o2_shortseq", "hyena_o3")
)
def test_hyena(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    check_layer(fixture, layer, dtype, x="u")
    kernels = np.asarray(quick_jit(nn.ImplicitFilter.kernels)(layer.bank))
    stage = 1 if fixture.kind == "hyena_standalone" else 2  # where the reference has the axis of the operators
    filters = np.moveaxis(kernels, 0, stage).reshape(1, kernels.shape[1], -1)
    fixture.check("out/filter", filters[:, : fixture.meta["L"]])


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith("hyena_posemb")])
def test_positions_and_decay_rates(name, key, x64):
    fixture = Fixture(name)
    _, length, features = fixture["z"].shape
    bank = nn.ImplicitFilter(fixture["deltas"].size, length, features=features, filter_width=1, num_hidden=0, key=key)
    np.testing.assert_allclose(bank.z(), fixture["z"][0], atol=1e-5)
    np.testing.assert_allclose(bank.t(), fixture["t"][0, :, 0], atol=1e-5)
    np.testing.assert_allclose(np.abs(bank.deltas()), np.abs(fixture["deltas"][0, 0]), rtol=1e-5)


@pytest.mark.parametrize("name", but_slow(LONG_CONV_FILES, "longconv_nopost", "longconv_squash_C1"))
def test_long_conv(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    check_layer(fixture, layer, dtype, x="u")
    convs = [layer.conv] if causal(layer) else [layer.forward.conv]
    if not causal(layer):
        convs.append(eqx.tree_at(lambda conv: conv.kernel, convs[0], layer.kernel_backward))
    processed = quick_jit(lambda conv: conv.processed())
    fixture.check("out/k", np.concatenate([processed(conv) for conv in convs]).swapaxes(1, 2))


def test_long_conv_kernel(dtype, key):
    fixture = Fixture("longconv_kernel_squash_envelope")
    layer = fixture.load(fixture.params(dtype))
    check_kernel(fixture, layer, lambda layer: jnp.swapaxes(layer.processed(), 1, 2), dtype)
    draw = lambda init: np.asarray(init(1, *fixture["out/double_exp_envelope"].shape, dtype=dtype, key=key))[0]
    envelope = draw(nn.GeometricDecay()) / draw(nn.RandomKernel()) * 0.002 / 0.02
    np.testing.assert_allclose(envelope, fixture["out/double_exp_envelope"], rtol=1e-6)  # computed in float32


@pytest.mark.parametrize("name", but_slow(ATTENTION_FILES, "mha_h1", "mha_h2", "rotary_mha_neox"))
def test_attention(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    if "in/key_padding_mask" in fixture:
        return check_masked(fixture, layer, dtype)
    check_layer(fixture, layer, dtype)
    if "out/q_rot" in fixture:
        for path, turned in zip(
            ("q_rot", "k_rot", "cos", "sin"), run_rotary(layer, *fixture.inputs(dtype, "in/x")), strict=True
        ):
            fixture.check(f"out/{path}", turned)


@quick_jit
def run_rotary(layer, x):
    """The turned queries and keys; a vector along the first half, which turns into the cosines and sines."""
    time, half = jnp.arange(x.shape[1], dtype=jnp.int32), layer.rotary.dim // 2
    q, k, _ = jnp.moveaxis(nn.linear(layer.Wqkv, x).reshape(*x.shape[:2], 3, layer.num_heads, -1), 2, 0)
    turn = lambda z: layer.rotary(z, time)
    first = jnp.repeat(jnp.asarray([1, 0], x.dtype), half)
    turned = turn(jnp.broadcast_to(first, (len(time), 1, 2 * half)))[:, 0]
    return jax.vmap(turn)(q), jax.vmap(turn)(k), turned[:, :half], turned[:, half:]


def check_masked(fixture, layer, dtype):
    (keep,) = fixture.inputs(bool, "in/key_padding_mask")

    @quick_jit
    def run(layer, x, cot):
        def loss(layer_and_x):
            layer, x = layer_and_x
            y = jax.vmap(lambda x, keep: layer(x, key_padding_mask=keep))(x, keep)
            return jnp.sum(cot * y), y

        (gradient, gradient_x), y = eqx.filter_grad(loss, has_aux=True)((layer, x))
        return fixture.save(gradient), gradient_x, y

    gradient, gradient_x, y = run(layer, *fixture.inputs(dtype, "in/x", "cot"))
    fixture.check("out/y", y)
    fixture.check("gin/x", gradient_x)
    fixture.check_gradient(gradient)


@pytest.mark.parametrize("name", but_slow(S4D_FILES, "s4d_safari_bidir", "s4d_safari_inv"))
def test_s4d(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    states = check_layer(fixture, layer, dtype, x="u")
    ssm, length = (layer.ssm if causal(layer) else layer.forward.ssm), fixture.meta["L"]
    if not causal(layer):
        ssm = eqx.tree_at(lambda ssm: ssm.C, ssm, on_device(np.concatenate([ssm.C, layer.C_backward])))
    kernel, (dA, dB, dC) = quick_jit(lambda ssm: (ssm.kernel(length), ssm.discretised()))(ssm)
    fixture.check("out/k", np.asarray(kernel).swapaxes(1, 2).reshape(fixture["out/k"].shape))
    if "step/stateL" in fixture:
        fixture.check("step/stateL", states[1])
        fixture.check("step/y", fixture["out/y"])
        fixture.check("out/dA", dA)
        fixture.check("out/dC", dC)
        np.testing.assert_array_equal(dB, 1)


@quick_jit
def run_kernel(save, layer, kernel, cot, u, state):
    """The kernel and its gradient by name; a chunk, the answer to no input, and steps, all from `state`."""
    gradient, k = eqx.filter_grad(lambda layer: (lambda k: (jnp.sum(cot * k), k))(kernel(layer)), has_aux=True)(layer)
    gradient = save(gradient)
    if u is None:
        return k, gradient, None
    chunk = jax.vmap(layer.prefill)(state, u)
    silence = jax.vmap(layer.prefill)(state, jnp.zeros_like(u))[1]
    steps = jax.vmap(lambda s, u: jax.lax.scan(lambda s, u_t: layer.step(s, u_t), s, u))(state, u)
    return k, gradient, (chunk, silence, steps)


def check_kernel(fixture, layer, kernel, dtype):
    """What the two kernels share. `out/y` and the steps are (..., H, L); ours are (..., L, H)."""
    (cot,), u, state = fixture.inputs(dtype, "cot"), None, None
    if "step/u" in fixture:
        u = on_device(np.swapaxes(fixture["step/u"], 1, 2), dtype)
        wide = np.result_type(dtype, np.complex64) if np.iscomplexobj(fixture["step/state0"]) else dtype
        (state,) = fixture.inputs(wide, "step/state0")
    k, gradient, stream = run_kernel(fixture.save, layer, kernel, cot, u, state)
    fixture.check("out/y", k)
    fixture.check_gradient(gradient)
    if stream is None:
        return
    (after_chunk, y), silence, (after_steps, y_step) = stream
    fixture.check("out/forward_state", after_chunk)
    fixture.check("step/stateL", after_steps)
    expected = heard(fixture)
    for ours in (y, y_step):
        fixture.check("step/y", np.asarray(ours).swapaxes(1, 2)[:, None], of=lambda _: expected)
    if "out/k_state" in fixture:
        fixture.check("out/k_state", np.asarray(silence).swapaxes(1, 2)[:, None])


def heard(fixture):
    """The output of the reference's steps; under a band limit, of those that know it, which the reference's do not."""
    if "bandlimit" not in fixture.meta:
        return fixture["step/y"]
    _, dC = banded(fixture)
    u, s = fixture["step/u"], fixture["step/state0"]
    y = []
    for u_t in np.moveaxis(u, -1, 0):
        s = fixture["out/dA"] * s + fixture["out/dB"] * u_t[..., None]
        y.append(2 * np.sum(dC * s, axis=-1).real)
    return np.stack(y, axis=-1)[:, None]


def banded(fixture):
    """Which states are within the band, and `dC` without the others."""
    frequency = np.exp(fixture["p/kernel.log_dt"])[:, None] * np.abs(fixture["p/kernel.A_imag"]) / (2 * np.pi)
    slow = frequency < fixture.meta["bandlimit"] / 2
    assert 0 < np.mean(slow) < 1
    return slow, slow * fixture["out/dC"][0]


@pytest.mark.parametrize(
    "name",
    but_slow(
        S4D_KERNELS,
        "s4dkernel_combo_tied_zoh",
        "s4dkernel_inv_zoh",
        "s4dkernel_legs_bilinear",
        "s4dkernel_lin_bilinear",
        "s4dkernel_lin_bilinear_default",
        "s4dkernel_lin_zoh",
    ),
)
def test_s4d_kernel(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    length = fixture.meta["L"]
    check_kernel(fixture, layer, lambda layer: jnp.swapaxes(layer.kernel(length), 1, 2), dtype)
    if "out/dA" in fixture:
        dA, dB, dC = quick_jit(nn.DiagonalSSM.discretised)(layer)
        fixture.check("out/dA", dA)
        fixture.check("out/dB", dB)
        slow = banded(fixture)[0] if "bandlimit" in fixture.meta else True
        fixture.check("out/dC", dC, of=lambda reference: slow * reference)


@pytest.mark.smoke
@pytest.mark.parametrize("name", SHIFT_KERNELS)
def test_shift_kernel(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    length = fixture.meta["L"]
    padded = lambda layer: jnp.pad(layer.kernel(), ((0, max(0, length - layer.B.shape[1])), (0, 0)))[:length]
    check_kernel(fixture, layer, lambda layer: padded(layer).T[None], dtype)


@pytest.mark.smoke
def test_eigenvalues(key, x64):
    """A as each initialiser draws it, and B and P of HiPPO-LegS up to the phases of its eigenvectors."""
    fixture = Fixture("s4d_init_tables")
    inits = {"lin": nn.LinInit(), "inv": nn.InvInit(), "inv2": nn.Inv2Init(), "quad": nn.QuadInit()}
    inits |= {"legs": nn.LegSInit(), "real": nn.RealInit()}
    for size in fixture.meta["Ns"]:
        for name, init in inits.items():
            decay, frequency = init(2, size, dtype=np.dtype("float64"), key=key)
            A = fixture[f"{name}/N{size}/A"]
            np.testing.assert_allclose(frequency, np.stack([A.imag] * 2), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(decay, np.stack([-A.real] * 2), rtol=1e-5)
            np.testing.assert_allclose(fixture[f"{name}/N{size}/B"], 1 + 0j)
        Lambda, _, Vinv = nn.diagonalise(size, 1, conj_sym=True)
        nplr, n = f"nplr_legs/N{size}", np.arange(size)
        np.testing.assert_allclose(Lambda, fixture[f"{nplr}/w"], rtol=1e-9)
        np.testing.assert_allclose(np.abs(Vinv @ np.sqrt(2 * n + 1)), np.abs(fixture[f"{nplr}/B"]), rtol=1e-9)
        np.testing.assert_allclose(np.abs(Vinv @ np.sqrt(n + 0.5)), np.abs(fixture[f"{nplr}/P"]), rtol=1e-9)


@pytest.mark.smoke
def test_modal(dtype):
    """The file has float32 alone; in float64 we are as far from it as it is from the numbers of its own parameters."""
    fixture = Fixture("modal_a")
    ssm, length = fixture.load(fixture.params(dtype)), fixture.meta["L"]
    half = fixture.meta["prefill"]
    assert half == length // 2  # as in `streamed`

    @quick_jit
    def run(ssm, z):
        x2, x1, v = jnp.split(jnp.swapaxes(z, 1, 2), 3, axis=-1)
        y, *states = jax.vmap(lambda u: streamed(ssm, u))(x1 * v)
        whole = jax.vmap(lambda u: ssm(u))(x1 * v)
        return ssm.kernel(length)[0].T, x2 * whole, x2 * y, *states

    ours = run(ssm, *fixture.inputs(dtype, "z"))
    h, y, y_streamed, prefilled, final = map(np.asarray, ours)
    expected = {"h": h, "y": y, "y_steps": y_streamed[:, half:], "state_after_prefill": prefilled, "state_final": final}
    for path, array in expected.items():
        assert relative_error(array, fixture[path]) <= 1e-6, path
    np.testing.assert_allclose(y_streamed, y, atol=(1e-14 if dtype == np.float64 else 1e-6) * np.abs(y).max())
    assert relative_error(h, modal_kernel(fixture)) <= (1e-14 if dtype == np.float64 else 1e-6)
    back = quick_jit(fixture.save)(ssm)
    for name, array in fixture.params(dtype).items():
        assert back[name].dtype == dtype and relative_error(back[name], array) <= 4 * np.finfo(dtype).eps, name


def modal_kernel(fixture):
    """The kernel as its formula says, in float64."""
    poles, residues = (fixture[name].astype(float) @ [1, 1j] for name in ("poles", "residues"))
    return np.sum(residues * poles ** np.arange(fixture.meta["L"]), axis=1).real


def test_short_convolution_of_striped_hyena(dtype, key):
    fixture = Fixture("modal_a")
    weight, bias, u = fixture.inputs(dtype, "fir_w", "fir_b", "fir_u")
    conv = drawn(lambda key: nn.ShortConv(len(bias), weight.shape[-1], key=key), key)
    conv = eqx.tree_at(lambda conv: (conv.weight, conv.bias), conv, (on_device(fixture["fir_w"][:, 0].T, dtype), bias))
    whole, steps, end = quick_jit(lambda conv, u: jax.vmap(lambda u: (conv(u), *by_steps(conv, u)))(u))(conv, u)
    whole, steps, end = map(np.asarray, (whole, steps, end))
    expected = {"fir_z": whole.swapaxes(1, 2), "fir_steps": steps[:, 2:], "fir_state_end": end.swapaxes(1, 2)}
    for path, ours in expected.items():
        assert relative_error(ours, fixture[path]) <= 1e-6, path


def by_steps(mixer, x):
    end, y = jax.lax.scan(lambda state, x_t: mixer.step(state, x_t), mixer.init_state(), x)
    return y, end


def test_poles_outside_the_unit_circle_are_refused():
    fixture = Fixture("modal_a")
    params = fixture.params(np.float32)
    params["poles"][1, 2, 0] = [0.6, 0.8]
    with pytest.raises(ValueError, match="inside the unit circle"):
        fixture.load(params)


def test_block(dtype):
    """The reference returns the branch of the MLP and the residual sum before it; ours their sum."""
    fixture = Fixture("block_a")
    block = fixture.load(fixture.params(dtype))

    @quick_jit
    def run(block, h, r, cot):
        def loss(block_and_x):
            block, x = block_and_x
            residual = x + jax.vmap(block.mixer)(nn.layer_norm(block.norm1, x))
            y = jax.vmap(block)(x) - residual
            return jnp.sum(cot * y), (y, residual)

        (gradient, gradient_x), outputs = eqx.filter_grad(loss, has_aux=True)((block, h + r))
        return fixture.save(gradient), gradient_x, *outputs

    gradient, gradient_x, y, residual = run(block, *fixture.inputs(dtype, "in/h", "in/r", "cot"))
    fixture.check("out/y", y)
    fixture.check("out/residual", residual)
    fixture.check("gin/h", gradient_x)
    fixture.check("gin/r", gradient_x)
    fixture.check_gradient(gradient)


@quick_jit
def run_model(model, tokens, cot):
    """Logits, and the gradient of sum(cot logits) by name."""

    def loss(model):
        logits = jax.vmap(model)(tokens)
        return jnp.sum(cot * logits), logits

    gradient, logits = eqx.filter_grad(loss, has_aux=True)(model)
    return logits, to_safari(gradient)


@pytest.mark.parametrize("name", but_slow(MODELS, "lm_h3", "lm_s4d", "lm_transformer"))
def test_language_model(name, dtype):
    """What these generate is in test_generate.py."""
    fixture = Fixture(name)
    model = fixture.load(fixture.params(dtype))
    logits, gradient = run_model(model, *fixture.inputs(np.int32, "in/ids"), *fixture.inputs(dtype, "cot"))
    fixture.check("out/y", logits)
    fixture.check_gradient(gradient)


@pytest.mark.parametrize(
    "name, mixer",
    [
        ("h3", lambda key: nn.h3(64, 64, key=key)),
        slow("hyena", lambda key: nn.hyena(64, 64, short_filter=3, filter_width=64, features=5, key=key)),
        slow(
            "s4d",
            lambda key: nn.S4D(64, num_ssm=1, A_init=nn.InvInit(), B_init=nn.NormalBInit(), glu=False, key=key),
        ),
    ],
)
def test_initial_weights(name, mixer, key):
    """`GPT2Init`, and what the layers draw themselves, against the statistics of a fresh model of safari."""
    theirs = json.loads((FOLDER / "lm_init_stats.json").read_text())[name]
    model = quick_jit(lambda key: LanguageModel(20, 64, mixer, num_layers=2, mlp_width=256, init=GPT2Init(), key=key))(
        key
    )
    ours = to_safari(model)
    assert theirs.keys() <= ours.keys()
    for path, (shape, mean, std, low, high) in theirs.items():
        array = np.asarray(ours[path], float)
        assert list(array.shape) == shape, path
        if "short_filter" in path:  # uniform there, normal or zero here
            continue
        if low == high or path.endswith(("A_imag", "w_imag", "A_real", "w_real", "kernel.B")):
            own = [array.mean(), array.std(ddof=1), array.min(), array.max()]
            np.testing.assert_allclose(own, [mean, std, low, high], rtol=1e-3, atol=1e-6)
        else:  # six standard errors; an S4D layer's C has a scale of its own draw
            noise = 6 / np.sqrt(array.size)
            assert abs(array.mean() - mean) <= std * noise * np.sqrt(2), path
            assert abs(array.std() / std - 1) <= (0.5 if name == "s4d" and path.endswith(".C") else noise), path


def test_what_is_not_offered_is_refused():
    fixture = Fixture("s4dkernel_lin_dss")
    with pytest.raises(ValueError, match="disc must be one of 'zoh', 'bilinear'; got 'dss'"):
        fixture.load(fixture.params(np.float32))
