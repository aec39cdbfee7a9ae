"""The loss: whole, in pieces whose state is carried, with the logits alone in pieces, on packed sequences."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import tiny
from helpers import drawn, quick_jit, slow
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Split
from scipy.special import log_softmax

from s5eqx.data import Batch
from s5eqx.models import LanguageModel
from s5eqx.nn import Attention, Rotary, ShortConv
from s5eqx.train import Score, next_token, score


@functools.cache
def built(build):
    return drawn(build, jr.key(0))


def conv_model(key):
    mixer = lambda key: ShortConv(8, 3, key=key)
    return LanguageModel(10, 8, mixer, num_layers=1, mlp_width=16, dropout=0.1, key=key)


@pytest.fixture(scope="module")
def model():
    return built(conv_model)


def some_batch(size, length=10):
    inputs, targets = np.random.default_rng(0).integers(0, 10, (2, size, length), np.int32)
    return Batch(inputs, targets, np.ones((size, length), np.float32))


score = jax.jit(score)
next_token = eqx.filter_jit(next_token)


@pytest.mark.smoke
def test_score_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((4, 5, 7), np.float32), rng.integers(0, 7, (4, 5), np.int32)
    weights = np.array([[1.0, 0.0, 2.0, 0.5, 1.0]] * 4, np.float32)
    given = score(logits, targets, weights)
    nll = -np.take_along_axis(log_softmax(logits, -1), targets[..., None], -1)[..., 0]
    assert float(given.loss) == pytest.approx(np.average(nll, weights=weights))
    right = logits.argmax(-1) == targets
    assert float(given.accuracy) == pytest.approx(np.average(right, weights=weights))
    parts = score(logits[:2], targets[:2], weights[:2]) + score(logits[2:], targets[2:], weights[2:])
    assert float(parts.loss) == pytest.approx(float(given.loss))


def test_what_has_no_weight_has_no_effect():
    logits = np.random.default_rng(0).standard_normal((4, 7), np.float32)
    targets, weights = np.array([1, 2, -100, 3], np.int32), np.array([1, 1, 0, 0], np.float32)
    wild = logits.copy()
    wild[2:] = np.nan
    loss = jax.jit(jax.value_and_grad(lambda logits, weights: score(logits, targets, weights).loss))
    given, gradient = loss(wild, weights)
    assert float(given) == float(loss(logits, weights)[0])
    np.testing.assert_array_equal(gradient[2:], 0.0)
    assert np.isfinite(gradient).all()
    assert float(loss(logits, np.zeros_like(weights))[0]) == 0.0


@pytest.mark.parametrize("dtype, wide", [("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2])
def test_the_loss_is_at_least_float32(dtype, wide, x64):
    example = np.zeros((2, 3), jnp.dtype(dtype)), np.zeros(2, np.int32), np.ones(2, np.float32)
    means = jax.eval_shape(lambda *example: score(*example).means, *example)
    assert means["loss"].dtype == means["accuracy"].dtype == wide


def test_a_batch_of_one_is_scored_like_any(key):
    model, batch = eqx.nn.inference_mode(drawn(tiny.bigram, key)), some_batch(2)
    one = lambda i: jax.tree.map(lambda a: a[i : i + 1], batch)
    total: Score = next_token(model, one(0)) + next_token(model, one(1))
    assert float(total.loss) == pytest.approx(float(next_token(model, batch).loss), rel=1e-6)


def with_gradient(model, batch, **options):
    def loss(model):
        given = next_token(model, batch, **options)
        return given.loss, given

    (_, given), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return given, gradient


@pytest.mark.slow
@pytest.mark.parametrize("size, length", [(1, 10), (2, 8)])
def test_pieces_have_the_score_and_the_gradient_of_the_whole(size, length, model):
    """Ten steps in two pieces and a shorter one, or eight in two."""
    model = eqx.nn.inference_mode(model)
    batch = some_batch(size, length)
    whole, pieces = quick_jit(lambda model: [with_gradient(model, batch, chunk=chunk) for chunk in (None, 4)])(model)
    assert float(whole[0].weight) == length * size
    for given, expected in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)


def attention_model(key):
    mixers = (Attention(8, 2, max_length=10, rotary=Rotary(4), short_conv=3, dropout=0.1, key=key),)
    return LanguageModel(10, 8, mixers, mlp_width=8, max_length=10, dropout=0.1, key=key)


class Total(eqx.Module):
    """Logits from the sum of what was embedded so far, with dropout: it compiles in no time."""

    embedding: jax.Array
    head: jax.Array

    def __init__(self, key):
        self.embedding, self.head = jr.normal(key, (10, 4)), jr.normal(key, (4, 10))

    def init_state(self):
        return jnp.zeros((1, 4))

    def prefill(self, state, x, *, key):
        h = state + jnp.cumsum(self.embedding[x], axis=0)
        return h[-1:], eqx.nn.Dropout(0.1)(h, key=key) @ self.head

    def __call__(self, x, *, key):
        return self.prefill(self.init_state(), x, key=key)[1]


@quick_jit
def piece_by_hand(model, states, part, key, cotangents):
    """The loss of one piece and the states after it; the gradients for the model and the states before it."""

    def piece(model, states):
        keys = key[None] if len(part.inputs) == 1 else jr.split(key, len(part.inputs))
        prefill = lambda state, tokens, key: model.prefill(state, tokens, key=key)
        states, logits = jax.vmap(prefill)(states, part.inputs, keys)
        return score(logits, part.targets, part.weights).total, states

    (nll, states), back = eqx.filter_vjp(piece, model, states)
    return nll, states, back((jnp.ones_like(nll), cotangents))


def by_hand(model, batch, key, chunk):
    """The loss in pieces, its gradient from the last to the first, and the sum of the gradients of single pieces."""
    length = batch.inputs.shape[1]
    parts = [jax.tree.map(lambda a, i=i: a[:, i : i + chunk], batch) for i in range(0, length, chunk)]
    states = jax.tree.map(lambda a: np.stack([a] * len(batch.inputs)), model.init_state())
    none = cotangents = jax.tree.map(np.zeros_like, eqx.filter(states, eqx.is_inexact_array_like))
    total, calls, alone, linked = 0.0, [], [], []
    for part, part_key in zip(parts, jr.split(key, len(parts)), strict=True):
        calls.append((model, states, part, part_key))
        nll, states, (gradient, _) = piece_by_hand(*calls[-1], none)
        total += nll
        alone.append(gradient)
    for call in reversed(calls):
        _, _, (gradient, cotangents) = piece_by_hand(*call, cotangents)
        linked.append(gradient)
    weight = np.sum(batch.weights)
    mean = lambda *gradients: sum(map(np.asarray, gradients)) / weight
    return total / weight, *(jax.tree.map(mean, *gradients) for gradients in (linked, alone))


@pytest.mark.parametrize(
    "build, size", [(Total, 2), slow(conv_model, 2), slow(tiny.language_model, 2), slow(attention_model, 1)]
)
def test_pieces_are_those_of_a_loop(build, size, key):
    """Ten steps in two pieces and a shorter one, with dropout. Truncated, the gradient is the sum of those of the
    pieces alone, and another one."""
    model, batch = built(build), some_batch(size)
    run = lambda model, key: [
        with_gradient(model, batch, key=key, chunk=4, truncate=truncate) for truncate in (False, True)
    ]
    (exact, gradient), (same, truncated) = quick_jit(run)(model, key)
    loss, *expected = by_hand(model, batch, key, chunk=4)
    assert float(exact.loss) == pytest.approx(float(loss), rel=1e-6)
    assert float(same.loss) == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip((gradient, truncated), expected, strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    flat, cut = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)]) for g in (gradient, truncated))
    assert np.linalg.norm(flat - cut) > 0.01 * np.linalg.norm(flat)


@pytest.mark.slow
def test_pieces_on_two_devices(model):
    model = eqx.nn.inference_mode(model)
    batch = some_batch(4)
    mesh, (arrays, rest) = Mesh(jax.devices()[:2], "batch"), eqx.partition(model, eqx.is_array)
    nll = lambda arrays, batch: next_token(eqx.combine(arrays, rest), batch, chunk=5).total
    spread = jax.shard_map(
        lambda *operands: jax.lax.psum(nll(*operands), "batch"),
        mesh=mesh,
        in_specs=(Split(), Split("batch")),
        out_specs=Split(),
    )
    given, expected = (quick_jit(jax.value_and_grad(f))(arrays, batch) for f in (spread, nll))
    for ours, exact in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)


class Coin(eqx.Module):
    """Certain of token 0 or without an opinion, as the key falls."""

    def __call__(self, x, *, key):
        return jnp.zeros((len(x), 2)).at[:, 0].set(50 * jr.bernoulli(key).astype(float))

    def init_state(self):
        return ()

    def prefill(self, state, x, *, key):
        return state, self(x, key=key)


@pytest.mark.smoke
def test_each_piece_of_each_sequence_draws_anew(key):
    zeros = np.zeros((2, 20), np.int32)
    rows = []
    for weights in np.eye(2, dtype=np.float32).repeat(20, axis=1).reshape(2, 2, 20):
        given: Score = next_token(Coin(), Batch(zeros, zeros, weights), key=key, chunk=1)
        rows.append(float(given.loss))
    assert rows[0] != rows[1]
    assert all(0 < row / np.log(2) < 1 for row in rows)


def test_pieces_need_memory_for_one_piece():
    model = eqx.nn.inference_mode(built(conv_model))

    def temporaries(length, chunk):
        batch, (arrays, rest) = some_batch(1, length), eqx.partition(model, eqx.is_array)
        loss = lambda arrays: next_token(eqx.combine(arrays, rest), batch, chunk=chunk).loss
        return jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096, 256) < 0.2 * temporaries(4096, None)


def test_a_piece_has_a_step():
    with pytest.raises(ValueError, match="chunk must be at least 1 step"):
        next_token(Coin(), some_batch(1), chunk=0)
    with pytest.raises(TypeError, match="init_state and prefill; Bigram lacks one: leave it out"):
        next_token(drawn(tiny.bigram, jr.key(0)), some_batch(1), chunk=2)
    with pytest.raises(ValueError, match="truncate cuts the gradient between pieces and needs a chunk"):
        next_token(Coin(), some_batch(1), truncate=True)


def test_logits_come_in_pieces_of_their_own(model):
    """With dropout; ten steps in two pieces and a shorter one."""
    batch, keys = some_batch(2), jr.split(jr.key(0))

    @quick_jit
    def run(model):
        whole, pieces = (with_gradient(model, batch, key=keys, logits_chunk=chunk) for chunk in (None, 4))
        return whole, pieces, next_token(model, batch, key=jr.key(0), logits_chunk=20)

    whole, pieces, beyond = run(model)
    for ours, expected in zip(jax.tree.leaves((pieces, beyond)), jax.tree.leaves((whole, whole[0])), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"logits_chunk must be at least 1 step, .* got 0"):
        next_token(model, batch, logits_chunk=0)
    with pytest.raises(TypeError, match="hidden and unembed; Coin lacks one: leave it out"):
        next_token(Coin(), batch, logits_chunk=2)
    with pytest.raises(ValueError, match="chunk=2 steps makes its own logits; got logits_chunk=4"):
        next_token(model, batch, chunk=2, logits_chunk=4)


@pytest.mark.slow
def test_packed_sequences_are_scored_one_by_one(model):
    """A row of two sequences, flagged where the second begins, has the score of both; in pieces as well."""
    model, batch = eqx.nn.inference_mode(model), some_batch(2)
    row = jax.tree.map(lambda a: a.reshape(1, -1), batch)
    length = batch.inputs.shape[1]
    packed = eqx.tree_at(lambda b: b.resets, row, (np.arange(2 * length) == length)[None], is_leaf=lambda x: x is None)
    score = lambda batch, **options: with_gradient(model, batch, **options)
    given = quick_jit(lambda: [score(batch), score(packed), score(packed, chunk=7), score(row)])()
    apart, *together, unflagged = given
    for other in together:
        for ours, expected in zip(jax.tree.leaves(other), jax.tree.leaves(apart), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert abs(float(unflagged[0].loss) - float(apart[0].loss)) > 1e-3
