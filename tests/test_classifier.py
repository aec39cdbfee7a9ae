"""Classifiers: lengths and padding, pooling, both forms of the residual branch, and what is refused."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, slow

from s5eqx import nn
from s5eqx.models import Classifier, GPT2Init, LastPool, MeanPool, RetrievalClassifier, SequenceEncoder

F, V, D, L, CLASSES = 3, 7, 6, 11, 4


MIXERS = {
    "short_conv": lambda key: nn.ShortConv(D, 3, key=key),
    "s5": lambda key: nn.S5(D, 4, key=key),
    "bidirectional_s5": lambda key: nn.BidirectionalS5(D, 4, key=key),
    "bidirectional_s4d": lambda key: nn.BidirectionalS4D(D, 4, key=key),
    "bidirectional_long_conv": lambda key: nn.BidirectionalLongConv(D, L, key=key),
}


def conv(key):
    return nn.ShortConv(D, 3, key=key)


def body(key, mixer=conv, *, tokens=False, **options):
    encoder_key, key = jr.split(key)
    encoder = eqx.nn.Embedding(V, D, key=encoder_key) if tokens else eqx.nn.Linear(F, D, key=encoder_key)
    return SequenceEncoder(encoder, mixer, **({"num_layers": 2} | options), key=key)


def classifier(key, mixer=conv, **options):
    return Classifier(body(key, mixer, **options), CLASSES, key=key)


def features(length=L):
    return on_device(np.random.default_rng(0).standard_normal((length, F)))


@pytest.mark.parametrize(
    "name",
    [
        "bidirectional_s5",
        *map(slow, ("short_conv", "s5", "bidirectional_s4d", "bidirectional_long_conv")),
    ],
)
def test_padding_has_no_effect(name, key, x64):
    """The logits of a padded sequence are those of the sequence alone, and no gradient reaches the padding."""
    model = drawn(lambda key: classifier(key, MIXERS[name], prenorm=name != "bidirectional_s5"), key)
    x, length = np.array(features()), 7

    @quick_jit
    def run(x, length):
        def weigh(x):
            h = model.body.features(x, length=length)
            logits = jnp.concatenate([model.decoder(pool(h, length)) for pool in (MeanPool(), LastPool())])
            return np.arange(1.0, 2 * CLASSES + 1) @ logits, logits

        return jax.grad(weigh, has_aux=True)(x)

    alone, expected = run(x[:length], None)
    assert not np.allclose(run(x, on_device(L))[1], expected, atol=1e-3)
    for filling in (0.0, 1e3, np.nan):
        x[length:] = filling
        gradient, logits = jax.device_get(run(x, on_device(length)))
        np.testing.assert_allclose(logits, expected, atol=1e-12)
        np.testing.assert_allclose(gradient[:length], alone, atol=1e-12)
        np.testing.assert_array_equal(gradient[length:], 0)


@pytest.mark.parametrize("name", [slow("s5"), "bidirectional_s5"])
def test_intervals(name, key, x64):
    """Padding has no effect, not on the last sample's way back either; the MLPs between the mixers are passed over."""
    model = drawn(lambda key: classifier(key, MIXERS[name], num_layers=1, mlp_width=5, remat=name == "s5"), key)
    model = eqx.tree_at(lambda model: model.body.pool, model, LastPool())
    rng = np.random.default_rng(1)
    x, intervals, length = np.array(features()), rng.uniform(0.1, 4, L), 7
    same = quick_jit(lambda x: (model(x, intervals=jnp.ones(L)), model(x)))
    np.testing.assert_allclose(*same(x), atol=1e-12)

    @quick_jit
    def run(x, intervals, length):
        def weigh(x, intervals):
            logits = model(x, length=length, intervals=intervals)
            return np.arange(1.0, CLASSES + 1) @ logits, logits

        return jax.grad(weigh, argnums=(0, 1), has_aux=True)(x, intervals)

    alone, expected = jax.device_get(run(x[:length], intervals[:length], None))
    assert np.all(alone[1] != 0)
    for filling in (0.0, 1e3, np.nan):
        x[length:], intervals[length:] = filling, filling
        gradients, logits = jax.device_get(run(x, intervals, on_device(length)))
        np.testing.assert_allclose(logits, expected, atol=1e-12)
        for got, apart in zip(gradients, alone, strict=True):
            np.testing.assert_allclose(got[:length], apart, atol=1e-12)
            np.testing.assert_array_equal(got[length:], 0)


def test_padding_of_tokens(key):
    """Padding may be any number, as -1."""
    model = drawn(lambda key: classifier(key, tokens=True), key)
    x = np.arange(L, dtype=np.int32) % V
    padded = np.where(np.arange(L) < 5, x, np.int32(-1))
    run = quick_jit(lambda x, padded, length: (model(padded, length=length), model(x), model(padded)))
    logits, expected, outside = run(x[:5], padded, on_device(5))
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert np.isnan(outside).all()


def test_parts(key):
    """By hand: encoder, prenorm branches of mixer and MLP, norm, mean, decoder; and the form with the norm behind."""
    apply = lambda layer, h: h @ layer.weight.T + layer.bias[None]
    x = features()

    @quick_jit
    def by_hand(model, prenorm):
        h = apply(model.body.encoder, x)
        for r in model.body.residuals:
            h = h + r.mixer(nn.layer_norm(r.norm, h)) if prenorm else nn.layer_norm(r.norm, h + r.mixer(h))
        h = nn.layer_norm(model.body.norm, h) if prenorm else h
        pooled = MeanPool()(h)
        return h, pooled, LastPool()(h), apply(model.decoder, pooled[None])[0], model(x)

    for prenorm in (True, False):
        model = drawn(lambda key, p=prenorm: classifier(key, mlp_width=5, prenorm=p), key)
        assert [type(r.mixer) for r in model.body.residuals] == [nn.ShortConv, nn.MLP] * 2
        h, pooled, last, expected, given = map(np.asarray, by_hand(model, prenorm))
        np.testing.assert_allclose(pooled, np.mean(h, axis=0), atol=1e-6)
        np.testing.assert_allclose(last, h[-1])
        np.testing.assert_allclose(given, expected, atol=1e-5)


def test_pairs(key):
    """The head of a pair tells which sequence is which, and each has its own length and intervals."""
    model = drawn(lambda key: RetrievalClassifier(body(key, MIXERS["s5"], num_layers=1), 2, key=key), key)
    x, other = np.asarray(features()), np.asarray(features(8))[::-1]
    intervals, other_intervals = np.linspace(0.1, 2, L, dtype=np.float32), np.linspace(3, 1, 8, dtype=np.float32)

    @quick_jit
    def run(lengths):
        u, v = model.body(x[:5], intervals=intervals[:5]), model.body(other, intervals=other_intervals)
        expected = model.decoder(jax.nn.gelu(model.hidden(jnp.concatenate([u, v, u * v, u - v]))))
        logits = model(x, other, **lengths, intervals=intervals, other_intervals=other_intervals)
        return expected, logits, model(other, x[:5], intervals=other_intervals, other_intervals=intervals[:5])

    expected, logits, swapped = run({"length": on_device(5), "other_length": on_device(8)})
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert not np.allclose(logits, swapped, atol=1e-4)


@pytest.mark.slow
def test_rematerialisation_is_the_same_model(key, x64):
    def run(remat):
        model = drawn(lambda key: classifier(key, dropout=0.3, mlp_width=5, num_layers=1, remat=remat), key)
        loss = lambda model: jnp.sum(jnp.sin(model(features(), length=jnp.asarray(8), key=key)))
        return jax.tree.leaves(quick_jit(eqx.filter_value_and_grad(loss))(model))

    for a, b in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_dropout(key):
    tied, free = (
        drawn(lambda key, t=tie: nn.Residual(D, conv(key), dropout=0.5, tie_dropout=t), key) for tie in (True, False)
    )
    x = np.asarray(np.random.default_rng(0).standard_normal((L, D)), np.float32)

    @quick_jit
    def run(key):
        mean = jnp.mean(jax.vmap(lambda k: tied(x, key=k))(jr.split(key, 2000)), axis=0)
        return tied(x, key=key), free(x, key=key), mean, eqx.nn.inference_mode(tied)(x)

    *both, mean, silent = map(np.asarray, run(key))
    tied_untouched, free_untouched = (y == x for y in both)
    assert np.all(np.all(tied_untouched, axis=0) == np.any(tied_untouched, axis=0))
    assert 0 < np.sum(tied_untouched) < L * D
    assert np.any(np.all(free_untouched, axis=0) != np.any(free_untouched, axis=0))
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(tied, x)
    np.testing.assert_allclose(mean, silent, atol=6 / np.sqrt(2000) * np.abs(silent - x).max())


def test_initial_weights(key):
    """The depth is the number of branches; the decoder and the encoder are dense layers as any."""

    def build(key):
        encoder = eqx.nn.Linear(64, 64, key=key)
        mixer = lambda key: nn.ShortConv(64, 3, key=key)
        whole = SequenceEncoder(encoder, mixer, num_layers=2, mlp_width=64, init=GPT2Init(std=0.1), key=key)
        return Classifier(whole, 64, init=GPT2Init(std=0.1), key=key)

    model = quick_jit(build)(key)
    mlp = model.body.residuals[1].mixer
    for layer, std in ((model.body.encoder, 0.1), (mlp.fc1, 0.1), (mlp.fc2, 0.1 / np.sqrt(4)), (model.decoder, 0.1)):
        np.testing.assert_allclose(np.asarray(layer.weight).std(), std, rtol=0.1)
        np.testing.assert_array_equal(layer.bias, 0)


@pytest.mark.smoke
def test_bfloat16(key):
    model = drawn(lambda key: classifier(key, MIXERS["bidirectional_s5"], num_layers=1), key)
    forward = lambda model, x: model(x, length=jnp.asarray(8))
    both = lambda model, x: (forward(nn.cast(model, jnp.bfloat16), x.astype(jnp.bfloat16)), forward(model, x))
    narrow, wide = quick_jit(both)(model, features())
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.1)


@pytest.mark.parametrize("length", [0, L + 1, -1])
def test_lengths_outside(length, key):
    model = drawn(lambda key: classifier(key, num_layers=1), key)
    with pytest.raises(Exception, match=re.escape(f"must lie in [1, {L}]")):
        jax.block_until_ready(quick_jit(model)(features(), length=on_device(length)))


def test_length_of_a_small_integer_type(key):
    """300 steps do not fit into int8, which holds the length 40."""
    means = drawn(classifier, key)
    last = eqx.tree_at(lambda model: model.body.pool, means, LastPool())
    x = features(300)
    run = quick_jit(lambda length: [(model(x, length=length), model(x[:40])) for model in (means, last)])
    for given, expected in run(on_device(40, np.int8)):
        np.testing.assert_allclose(given, expected, atol=1e-5)


def test_what_does_not_fit(key):
    refused = lambda message: pytest.raises(ValueError, match=re.escape(message))
    with refused("at least one step"):
        eqx.filter_eval_shape(lambda key: classifier(key, num_layers=1)(features(0)), key)
    with refused("`intervals` need mixers that take them, as `S5` and `BidirectionalS5` do; got ShortConv"):
        eqx.filter_eval_shape(lambda key: classifier(key)(features(), intervals=np.ones(L, np.float32)), key)
    with refused("num_classes must be at least 1; got 0"):
        Classifier(drawn(lambda key: body(key, num_layers=1), key), 0, key=key)
    with refused("must map width 6 to width 6; BidirectionalS5 refuses"):
        eqx.filter_eval_shape(lambda key: body(key, lambda key: nn.BidirectionalS5(D + 1, 4, key=key)), key)
    with refused("whose weights all layers would share"):
        eqx.filter_eval_shape(lambda key: body(key, conv(key)), key)
    with refused("needs num_layers of at least 1; got 0"):
        body(key, num_layers=0)
    with refused("lies in [0, 1); got 1.0"):
        eqx.filter_eval_shape(lambda key: body(key, dropout=1.0), key)
