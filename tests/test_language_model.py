"""The language model: its parts, its initial weights, and what it refuses."""

import itertools
import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, slow
from s5_fixture import FOLDER

from s5eqx import nn
from s5eqx.interop import to_s5
from s5eqx.models import Backbone, DefaultInit, GPT2Init, LanguageModel, S5Init

V, D, L = 11, 6, 10


def conv(key):
    return nn.ShortConv(D, 3, key=key)


def language_model(key, mixer=conv, **options):
    return LanguageModel(V, D, mixer, **({"num_layers": 2, "mlp_width": 8} | options), key=key)


def drawn_model(key, **options):
    return drawn(lambda key: language_model(key, **options), key)


def tokens(length=L):
    return on_device(np.random.default_rng(0).integers(0, V, length))


def tokens_with(bad):
    return np.where(np.arange(L) == 3, bad, tokens())


@pytest.mark.smoke
def test_parts(key):
    model, x = drawn_model(key, max_length=L), tokens()
    first, second = model.backbone.blocks
    embedding = np.asarray(model.embedding)
    h = embedding[x] + np.asarray(model.positions)
    parts = quick_jit(
        lambda x, h: (
            model.embed(x),
            model.backbone(h),
            model.unembed(h[0]),
            model(x),
            nn.layer_norm(model.backbone.norm, second(first(h))),
        )
    )
    embed, backbone, unembed, whole, blocks = map(np.asarray, parts(x, h))
    np.testing.assert_allclose(embed, h, atol=1e-6)
    np.testing.assert_allclose(whole, backbone @ embedding.T, atol=1e-5)
    np.testing.assert_allclose(unembed, h[0] @ embedding.T, atol=1e-5)
    np.testing.assert_allclose(blocks, backbone, atol=1e-5)


def test_the_embedding_is_tied(key):
    """One table, used twice: its gradient is that of both uses."""
    model, x = drawn_model(key, num_layers=1), tokens()
    shapes = [a.shape for a in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
    assert shapes.count((V, D)) == 1
    weigh = np.random.default_rng(0).standard_normal((L, V)).astype(np.float32)
    put = lambda table: eqx.tree_at(lambda m: m.embedding, model, table)
    once = lambda table: jnp.sum(weigh * put(table)(x))
    twice = lambda enters, leaves: jnp.sum(weigh * put(leaves).unembed(model.backbone(put(enters).embed(x))))
    gradients = quick_jit(lambda table: (jax.grad(once)(table), *jax.grad(twice, argnums=(0, 1))(table, table)))
    both, first, second = map(np.asarray, gradients(model.embedding))
    np.testing.assert_allclose(both, first + second, atol=1e-4)
    assert np.any(first) and np.any(second)


def test_a_token_outside_the_vocabulary_is_seen(key):
    forward = quick_jit(drawn_model(key))
    for bad in (-1, V):
        assert np.all(np.isnan(np.asarray(forward(tokens_with(bad)))[3]))


def test_a_token_outside_the_vocabulary_is_an_error_on_request(key, monkeypatch):
    monkeypatch.setenv("S5EQX_DEBUG", "1")
    forward = quick_jit(drawn_model(key, num_layers=1).embed)
    assert np.all(np.isfinite(forward(tokens_with(V - 1))))
    for bad in (-1, V):
        with pytest.raises(Exception, match=re.escape(f"Every token must lie in [0, vocab_size={V})")):
            jax.block_until_ready(forward(tokens_with(bad)))


def test_mixers_are_built_once_a_layer(key):
    @quick_jit
    def keys_and_weights(key):
        keys = []
        model = language_model(key, lambda key: keys.append(key) or conv(key), num_layers=3)
        return [jr.key_data(key) for key in keys], [block.mixer.weight for block in model.backbone.blocks]

    keys, weights = map(np.asarray, keys_and_weights(key))
    assert len(np.unique(keys, axis=0)) == len(keys) == 3
    assert not any(np.any(a == b) for a, b in itertools.pairwise(weights))

    mixers = drawn(lambda key: (nn.S5(D, 4, key=key), conv(key)), key)
    used = quick_jit(
        lambda key: [block.mixer for block in language_model(key, mixers, num_layers=None).backbone.blocks]
    )(key)
    assert [type(mixer) for mixer in used] == [nn.S5, nn.ShortConv]
    np.testing.assert_array_equal(used[0].C, mixers[0].C)


def test_default_init(key):
    def build(key):
        wide = lambda key: nn.hyena_s5(64, 8, activation=nn.HalfGLU2, key=key)
        model = LanguageModel(50, 64, wide, num_layers=2, mlp_width=128, max_length=30, key=key)
        return model.embedding, model.positions, model.backbone.blocks[1]

    embedding, positions, block = jax.tree.map(np.asarray, quick_jit(build)(key))
    for weight, std in (
        (embedding, 1 / 8),
        (positions, 1 / 8),
        (block.mixer.in_proj.weight, 1 / 8),
        (block.mixer.bank.operators()[0].activation.out2.weight, 1 / 8),
        (block.mlp.fc1.weight, 1 / 8),
        (block.mixer.out_proj.weight, 1 / 8 / 2),
        (block.mlp.fc2.weight, 128**-0.5 / 2),
    ):
        np.testing.assert_allclose(np.std(weight), std, rtol=0.1)
        assert abs(np.mean(weight)) < 0.1 * std
    for layer in (block.mixer.in_proj, block.mixer.out_proj, block.mlp.fc1, block.mlp.fc2):
        np.testing.assert_array_equal(layer.bias, 0)
    assert 0.3 < np.std(block.mixer.short_conv.weight) < 0.8


class Branch(eqx.Module):
    """The names that dense layers have where they end a branch, or seem to."""

    output_linear: eqx.nn.Linear | nn.GLU
    filter_layers: tuple[eqx.nn.Linear, ...]

    def __init__(self, gate, *, key):
        self.output_linear = nn.GLU(64, 64, key=key) if gate else eqx.nn.Linear(64, 64, key=key)
        self.filter_layers = (eqx.nn.Linear(64, 64, use_bias=False, key=key),)


def test_gpt2_init(key):
    """One deviation everywhere, less at the ends of branches; an `output_linear` without a gate is none here."""
    init = GPT2Init(std=0.05)

    def build(key):
        mixer = lambda key: nn.hyena(64, 4, filter_width=64, key=key)
        model = LanguageModel(50, 64, mixer, num_layers=2, mlp_width=128, max_length=30, init=init, key=key)
        branch = lambda init, gate: init.block(key, Branch(gate, key=key), 4)
        branches = branch(init, True), branch(init, False), branch(DefaultInit(), False)
        return model.embedding, model.positions, model.backbone.blocks[1], *branches

    *tables, block, gated, plain, default = jax.tree.map(np.asarray, quick_jit(build)(key))
    filters = [*block.mixer.bank.layers, gated.filter_layers[0]]
    for layer, std in (
        *((layer, 0.05) for layer in (block.mixer.in_proj, block.mlp.fc1, plain.output_linear, *filters)),
        *((layer, 0.025) for layer in (block.mixer.out_proj, block.mlp.fc2, gated.output_linear.linear)),
    ):
        np.testing.assert_allclose(np.std(layer.weight), std, rtol=0.15)
        assert layer.bias is None or not np.any(layer.bias)
    assert block.mixer.bank.layers[-1].bias is None
    for table in tables:
        np.testing.assert_allclose(np.std(table), 0.05, rtol=0.1)
    np.testing.assert_allclose(np.std(default.output_linear.weight), 1 / 8 / 2, rtol=0.1)


@pytest.mark.parametrize("tag", ["s5", *map(slow, ("s5_trunc", "s5_cplx"))])
def test_s5_init_has_the_statistics_of_the_s5_branch(tag, key):
    """Mean, deviation and extremes of every array over 20 models, against those of 20 official ones."""
    with np.load(FOLDER / "init_stats.npz") as file:
        stats = {k.removeprefix(f"{tag}/"): a for k, a in file.items() if k.startswith(f"{tag}/")}
    config = json.loads(str(stats.pop("config")))
    options, filter_args = config["layer_kwargs"], config["layer_kwargs"]["filter_args"]
    C_init = {
        "lecun_normal": nn.LecunNormal(),
        "trunc_standard_normal": nn.TruncatedNormal(),
        "complex_normal": nn.ComplexNormal(),
    }[filter_args["C_init"]]

    def build(key):
        mixer = lambda key: nn.hyena_s5(
            config["d_model"],
            options["ssm_size"],
            num_blocks=options["ssm_blocks"],
            conj_sym=filter_args["conj_sym"],
            C_init=C_init,
            dt_min=filter_args["dt_min"],
            dt_max=filter_args["dt_max"],
            activation=nn.HalfGLU2,
            key=key,
        )
        sizes = {"num_layers": config["n_layer"], "mlp_width": config["d_inner"], "stack": True}
        return to_s5(LanguageModel(config["vocab_size"], config["d_model"], mixer, **sizes, init=S5Init(), key=key))

    arrays = quick_jit(jax.vmap(build))(jr.split(key, 20))
    assert arrays.keys() == stats.keys()
    for path, (mean, std, low, high, size) in stats.items():
        ours = np.asarray(arrays[path], np.float64)
        if tag == "s5_cplx" and path.endswith("/C"):  # theirs are the four parts of c_0 + i c_1, ours its two
            std, low, high = np.sqrt(2) * std, np.sqrt(2) * low, np.sqrt(2) * high
        error = std / np.sqrt(20 * size)  # of a mean; that of a deviation is less
        np.testing.assert_allclose(ours.mean(), mean, atol=7 * error + 1e-6, err_msg=path)
        np.testing.assert_allclose(ours.std(), std, atol=7 * error + 1e-6, err_msg=path)
        np.testing.assert_allclose([ours.min(), ours.max()], [low, high], rtol=0.3, atol=1e-6, err_msg=path)


def test_dropout_and_keys(key):
    model, x = drawn_model(key, embed_dropout=0.5, dropout=0.3, drop_path=0.2), tokens()
    plain = drawn_model(key)
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(model, x)

    @quick_jit
    def run(key):
        keys, many = jr.split(key, 3), jr.split(key, 4000)
        loud = jax.vmap(lambda k: model(x, key=k))(keys), model(x, key=keys[2])
        return eqx.nn.inference_mode(model)(x), plain(x), *loud, jax.vmap(lambda k: model.embed(x, key=k))(many)

    silent, without, logits, alone, h = map(np.asarray, run(key))
    np.testing.assert_allclose(silent, without, atol=1e-6)
    assert not np.allclose(logits[0], logits[1])
    np.testing.assert_allclose(alone, logits[2], atol=1e-5)

    # Dropout of the embedding keeps its mean.
    embedded = np.asarray(plain.embedding)[x]
    np.testing.assert_allclose(h.mean(axis=0), embedded, atol=6 / np.sqrt(4000) * np.abs(embedded).max())
    np.testing.assert_allclose(np.mean(h == 0), 0.5, atol=0.01)


def test_position_is_bounded(key):
    model = drawn_model(key, max_length=3, num_layers=1)
    call, prefill, step = map(quick_jit, (model, model.prefill, model.step))
    message = "longer than the learned positions, max_length=3"
    with pytest.raises(ValueError, match=re.escape("max_length=3 tokens; got a sequence of 4")):
        eqx.filter_eval_shape(model, tokens(4))

    state, _ = prefill(quick_jit(model.init_state)(), tokens(2))
    assert state[0].dtype == jnp.int32 and state[0].item() == 2
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(prefill(state, tokens(2)))
    token = np.asarray(tokens())[0]
    state, _ = step(state, token)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(step(state, token))
    state, _ = step(state, token, reset=np.array(True))
    assert state[0].item() == 1

    # A packed batch may be longer than any of its sequences.
    assert np.all(np.isfinite(call(tokens(9), reset=np.arange(9) % 3 == 0)))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(tokens(9), reset=np.arange(9) == 2))


def test_models_without_positions_take_any_length(key):
    assert quick_jit(drawn_model(key, num_layers=1))(tokens(300)).shape == (300, V)


CONV = drawn(conv, jr.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": lambda key: nn.BidirectionalS5(D, 4, key=key)}, "mixer must be causal"),
        ({"mixer": lambda key: nn.ShortConv(D + 1, 3, key=key)}, "must map width 6 to width 6"),
        ({"mixer": CONV}, "whose weights all layers would share"),
        ({"mixer": (CONV,)}, "must be the number of mixers, or left out; got 1"),
        ({"mixer": (), "num_layers": None}, "at least one layer"),
        ({"mixer": (CONV,) * 2}, "got one object twice"),
        ({"num_layers": None}, "needs num_layers of at least 1; got None"),
        ({"num_layers": 0}, "needs num_layers of at least 1; got 0"),
        ({"max_length": 0}, "max_length must be positive"),
        ({"mlp_width": 0}, "hidden must be positive"),
        ({"drop_path": 1.5}, "lies in [0, 1); got 1.5"),
        ({"dropout": 1.5}, "lies in [0, 1); got 1.5"),
        ({"embed_dropout": -0.1}, "lies in [0, 1); got -0.1"),
    ],
)
def test_models_that_do_not_fit(options, message, key):
    with pytest.raises(ValueError, match=re.escape(message)):
        eqx.filter_eval_shape(lambda key: language_model(key, **options), key)


def test_vocabulary_and_width(key):
    with pytest.raises(ValueError, match="vocab_size and width must be positive; got 0 and 6"):
        LanguageModel(0, D, conv, num_layers=1, mlp_width=8, key=key)
    block = drawn(lambda key: nn.Block(conv(key), nn.MLP(D, 8, key=key)), key)
    with pytest.raises(ValueError, match="backbone's width 7; block 0 has 6"):
        Backbone(7, (block,))


@pytest.mark.slow
def test_initialisation_compiles(key):
    """Built under jit it is the same model, and its shapes are known without building it."""
    build = lambda key: language_model(key, lambda key: nn.hyena_s5(D, 4, key=key), max_length=L)
    eager, compiled = build(key), quick_jit(build)(key)
    for a, b in zip(*(jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (eager, compiled)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    skeleton = eqx.filter_eval_shape(build, key)
    assert jax.tree.map(lambda a: a.shape, skeleton.embedding) == (V, D)
