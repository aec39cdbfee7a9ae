"""Regressors: a prediction at every step, from the past alone where the mixers are causal, of irregular samples too."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import but_slow, drawn, on_device, quick_jit

from s5eqx import nn
from s5eqx.interop import load, save
from s5eqx.models import LastPool, Regressor, SequenceEncoder

F, V, D, L, OUTPUTS = 3, 7, 6, 11, 2

MIXERS = {
    "s5": lambda key: nn.S5(D, 4, key=key),
    "bidirectional_s5": lambda key: nn.BidirectionalS5(D, 4, key=key),
}


def regressor(key, name="s5", *, tokens=False, **options):
    encoder_key, body_key, key = jr.split(key, 3)
    encoder = eqx.nn.Embedding(V, D, key=encoder_key) if tokens else eqx.nn.Linear(F, D, key=encoder_key)
    body = SequenceEncoder(encoder, MIXERS[name], **({"num_layers": 2, "mlp_width": 5} | options), key=body_key)
    return Regressor(body, OUTPUTS, key=key)


def samples(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((L, F)), rng.uniform(0.1, 4, L)


def test_parts(key, x64):
    """By hand: encoder, branches, norm, decoder. The classifiers pool the same features."""
    x, intervals = samples()
    apply = lambda layer, h: h @ layer.weight.T + layer.bias[None]

    @quick_jit
    def run(model, prenorm):
        h = apply(model.body.encoder, x)
        for r in model.body.residuals:
            mixer = functools.partial(r.mixer, intervals=intervals) if isinstance(r.mixer, nn.S5) else r.mixer
            h = h + mixer(nn.layer_norm(r.norm, h)) if prenorm else nn.layer_norm(r.norm, h + mixer(h))
        h = nn.layer_norm(model.body.norm, h) if prenorm else h
        given = model(x, intervals=intervals), model.body(x, intervals=intervals)
        return given, (apply(model.decoder, h), h[-1])

    for prenorm in (True, False):
        model = drawn(lambda key, p=prenorm: regressor(key, prenorm=p, num_layers=1, pool=LastPool()), key)
        for given, by_hand in zip(*run(model, prenorm), strict=True):
            np.testing.assert_allclose(given, by_hand, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_causal_mixers_predict_from_the_past(name, key, x64):
    model = drawn(lambda key: regressor(key, name), key)
    predict = quick_jit(lambda x, intervals: model(x, intervals=intervals))
    (x, intervals), (other_x, other_intervals) = samples(), samples(1)
    y = np.asarray(predict(x, intervals))
    for t in (0, 4, L - 2):
        later = lambda a, b, t=t: np.concatenate([a[: t + 1], b[t + 1 :]])
        for given in ((later(x, other_x), intervals), (x, later(intervals, other_intervals))):
            other = np.asarray(predict(*given))
            assert np.array_equal(other[: t + 1], y[: t + 1]) == (name == "s5")
            assert not np.allclose(other[t + 1], y[t + 1], atol=1e-6)


@pytest.mark.parametrize("name", but_slow(MIXERS, "s5"))
def test_padding_has_no_effect(name, key, x64):
    """The predictions are those of the sequence alone, and no gradient reaches the padding."""
    model = drawn(lambda key: regressor(key, name, num_layers=1), key)
    (x, intervals), length = samples(), 7
    weights = np.random.default_rng(2).standard_normal((length, OUTPUTS))

    @quick_jit
    def run(x, intervals, length):
        def weigh(x, intervals):
            y = model(x, length=length, intervals=intervals)[: len(weights)]
            return jnp.sum(weights * y), y

        return jax.grad(weigh, argnums=(0, 1), has_aux=True)(x, intervals)

    alone, expected = run(x[:length], intervals[:length], None)
    x[length:], intervals[length:] = np.nan, np.nan
    gradients, y = jax.device_get(run(x, intervals, on_device(length)))
    np.testing.assert_allclose(y, expected, atol=1e-12)
    for got, apart in zip(gradients, alone, strict=True):
        np.testing.assert_allclose(got[:length], apart, atol=1e-12)
        np.testing.assert_array_equal(got[length:], 0)


@pytest.mark.smoke
def test_bfloat16(key):
    model = drawn(lambda key: regressor(key, num_layers=1), key)
    x, intervals = samples()
    predict = lambda model, dtype: model(on_device(x, dtype), intervals=on_device(intervals, dtype))
    both = lambda model: (predict(nn.cast(model, jnp.bfloat16), jnp.bfloat16), predict(model, np.float32))
    narrow, wide = quick_jit(both)(model)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.1)


@pytest.mark.parametrize("tokens", [False, True])
def test_round_trip_through_a_file(tokens, key, tmp_path):
    model = drawn(lambda key: regressor(key, "bidirectional_s5", tokens=tokens), key)
    save(tmp_path / "model", model)
    assert eqx.tree_equal(*jax.device_get((load(tmp_path / "model"), model)))


def test_what_does_not_fit(key):
    body = drawn(regressor, key).body
    with pytest.raises(ValueError, match=re.escape("num_outputs must be at least 1; got 0")):
        Regressor(body, 0, key=key)
