"""Log-likelihoods of sequences: the same in one pass and in pieces, whatever the model carries."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import tiny
from helpers import drawn, on_device, quick_jit, relative_error, slow

from s5eqx.models import LanguageModel
from s5eqx.nn import S5, Attention, Rotary, ShortConv, hyena, hyena_s5
from s5eqx.score import score

V, D, L = 7, 6, 12


def hybrid(key):
    mixers = ShortConv(D, 3, key=key), Attention(D, 2, max_length=L, rotary=Rotary(2), key=key)
    return LanguageModel(V, D, mixers, mlp_width=8, dropout=0.5, key=key)


MODELS = {
    "hyena_s5": lambda key: LanguageModel(
        V, D, lambda key: hyena_s5(D, 4, key=key), num_layers=2, mlp_width=8, stack=True, embed_dropout=0.5, key=key
    ),
    "hyena": lambda key: LanguageModel(
        V, D, lambda key: hyena(D, L, filter_width=5, key=key), num_layers=1, mlp_width=8, key=key
    ),
    "hybrid": hybrid,
    "positions": lambda key: LanguageModel(
        V, D, lambda key: S5(D, 4, key=key), num_layers=1, mlp_width=8, max_length=L, key=key
    ),
}


@pytest.fixture(scope="module")
def model():
    """One that compiles in no time."""
    mixer = lambda key: ShortConv(D, 3, key=key)
    return drawn(lambda key: LanguageModel(V, D, mixer, num_layers=1, mlp_width=8, dropout=0.5, key=key), jr.key(1))


def some_tokens(*shape):
    return on_device(np.random.default_rng(5).integers(0, V, shape, np.int32))


@pytest.mark.parametrize("name", ["hyena_s5", *map(slow, ("hybrid", "hyena", "positions"))])
def test_a_score_is_the_same_in_one_pass_and_in_pieces(name, key, x64):
    model, tokens = drawn(MODELS[name], key, np.float64), some_tokens(2, L)

    @quick_jit
    def run(model, tokens):
        scores = [score(model, tokens, chunk) for chunk in (None, 1, 5, L + 3)]
        return scores, jax.nn.log_softmax(jax.vmap(eqx.nn.inference_mode(model))(tokens))

    scores, log_p = run(model, tokens)
    expected = np.take_along_axis(np.asarray(log_p)[:, :-1], np.asarray(tokens)[:, 1:, None], axis=-1).sum(axis=(1, 2))
    for given in scores:
        assert given.dtype == jnp.float64
        np.testing.assert_allclose(given, expected, rtol=1e-10)


def test_one_program_a_shape(model, monkeypatch):
    """Whatever the weights and the tokens."""
    module = sys.modules["s5eqx.score"]
    monkeypatch.setattr(module, "in_pieces", eqx.debug.assert_max_traces(max_traces=1)(module.in_pieces))
    tokens = some_tokens(3, 5)
    double = jax.tree.map(lambda a: on_device(2 * np.asarray(a)) if eqx.is_inexact_array(a) else a, model)
    others = on_device(V - 1 - np.asarray(tokens))
    scores = [score(model, tokens, 2), score(double, tokens, 2), score(model, others, 2)]
    assert len({float(np.asarray(s)[0]) for s in scores}) == 3
    with pytest.raises(RuntimeError, match="traced"):
        score(model, tokens, 3)


def test_a_score_inside_transformations(model):
    """Any leading axes, `jax.vmap`, numpy's tokens, a gradient; dropout is off."""
    tokens = some_tokens(2, 3, 8)
    expected, row = np.asarray(score(model, tokens, 3)), np.asarray(tokens)[0, 1]
    assert expected.shape == (2, 3) and np.all(expected < 0)
    np.testing.assert_allclose(jax.vmap(lambda rows: score(model, rows, 3))(tokens), expected, rtol=1e-5)
    np.testing.assert_allclose(score(model, row.astype(np.int8), 3), expected[0, 1], rtol=1e-5)
    gradient = eqx.filter_grad(lambda model, chunk: score(model, row, chunk))
    gradients = quick_jit(lambda model: [gradient(model, chunk) for chunk in (None, 3)])(model)
    for whole, pieces in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_a_sequence_of_one_scores_nothing(model):
    np.testing.assert_array_equal(score(model, some_tokens(2, 1)), [0.0, 0.0])
    assert float(score(model, some_tokens(1), 4)) == 0.0


@pytest.mark.parametrize("outside", [-1, V, 2**31 - 1])
def test_a_token_outside_has_no_score(outside, model):
    """Wherever it stands, also last, where no layer's output depends on it."""
    tokens = np.array(some_tokens(2, 8))
    run = jax.jit(lambda tokens: score(model, tokens, 3))
    for position in (0, 7):
        wrong = tokens.copy()
        wrong[1, position] = outside
        with pytest.raises(ValueError, match=rf"must lie in \[0, vocab_size={V}\); got {outside}"):
            score(model, on_device(wrong), 3)
        np.testing.assert_array_equal(np.isnan(run(wrong)), [False, True])


def test_a_score_is_at_least_float32(model):
    narrow = jax.tree.map(lambda a: on_device(a, jnp.bfloat16) if eqx.is_inexact_array(a) else a, model)
    given = score(narrow, some_tokens(8), 4)
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, score(model, some_tokens(8), 4), rtol=0.02)


class Even(eqx.Module):
    """All of `V` tokens are equally likely."""

    def init_state(self):
        return ()

    def prefill(self, state, x, *, key):
        return state, self(x, key=key)

    def __call__(self, x, *, key):
        return jnp.zeros((V, V))[x]


@pytest.mark.parametrize("chunk", [None, 4096])
def test_a_long_sum_is_exact(chunk):
    length = 131_072
    given = score(Even(), np.zeros(length, np.int32), chunk)
    assert relative_error(given, -(length - 1) * np.log(V)) < 1e-6


@pytest.mark.smoke
def test_what_has_no_score(model):
    with pytest.raises(
        TypeError, match="score needs a model with init_state and prefill; Bigram lacks one: give it both"
    ):
        score(eqx.filter_eval_shape(tiny.bigram, jr.key(0)), some_tokens(3))
    with pytest.raises(ValueError, match=r"at least one token to have a score; got tokens of shape \(2, 0\)"):
        score(model, some_tokens(2, 0))
    with pytest.raises(ValueError, match="chunk must be at least 1 step, or None for whole sequences; got 0"):
        score(model, some_tokens(3), 0)


def test_pieces_need_memory_for_one_piece():
    """131,072 steps in pieces of 4,096; measured, a thirtieth of what one pass takes."""
    build = lambda key: LanguageModel(
        64, 64, lambda key: hyena_s5(64, 64, num_blocks=2, key=key), num_layers=4, mlp_width=128, stack=True, key=key
    )
    model = eqx.filter_eval_shape(build, jr.key(0))
    arrays, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    tokens = jax.ShapeDtypeStruct((131_072,), jnp.int32)

    def temporaries(chunk):
        run = jax.jit(lambda arrays, tokens: score(eqx.combine(arrays, rest), tokens, chunk))
        return run.lower(arrays, tokens).compile().memory_analysis().temp_size_in_bytes

    pieces, whole = temporaries(4096), temporaries(None)
    print(f"temporaries: {pieces / 2**20:.1f} MiB in pieces, {whole / 2**20:.1f} MiB in one pass")
    assert pieces <= whole / 8
