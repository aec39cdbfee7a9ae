"""Parameter groups, schedules, the loss, and the training step."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import tiny
from helpers import quick_jit
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Split

from s5eqx.data import Batch
from s5eqx.models import LanguageModel
from s5eqx.nn import (
    MLP,
    S5,
    Attention,
    BidirectionalS5,
    Buffer,
    ImplicitFilter,
    Rotary,
    ShortConv,
    Stack,
    cast,
)
from s5eqx.train import (
    DefaultGroups,
    PublishedCosine,
    PublishedGroups,
    Score,
    WarmupConstant,
    WarmupCosine,
    next_token,
    score,
    spectral_radius,
)

SCHEDULE = WarmupConstant()
PUBLISHED = PublishedGroups(lr=1e-3, ssm_lr=5e-4, schedule=SCHEDULE)
DEFAULT = DefaultGroups(lr=1e-3, recurrence_lr=5e-4, schedule=SCHEDULE)


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


# Schedules.


def test_the_warm_up_is_part_of_the_steps():
    rate = WarmupCosine(steps=100, warmup=20, final=0.1)(2.0)
    assert [float(rate(s)) for s in (0, 10, 20, 60, 100, 200)] == pytest.approx([0, 1, 2, 1.1, 0.2, 0.2])


def test_the_published_cosine_ends_a_warm_up_early():
    rate = PublishedCosine(steps=100, warmup=20)(2.0)
    assert [float(rate(s)) for s in (0, 10, 20, 50, 80, 100)] == pytest.approx([0, 1, 2, 1, 0, 0], abs=1e-6)


def test_schedules_without_warm_up_start_at_the_peak():
    for schedule in (WarmupCosine(10, 0), PublishedCosine(10, 0), WarmupConstant()):
        assert float(schedule(0.5)(0.0)) == 0.5


@pytest.mark.parametrize(
    "make", [lambda: WarmupCosine(10, 10), lambda: PublishedCosine(20, 10), lambda: WarmupConstant(-1)]
)
def test_a_warm_up_that_does_not_fit_is_refused(make):
    with pytest.raises(ValueError, match="warmup"):
        make()


# Parameter groups.


@functools.cache
def built(build):
    return eqx.filter_jit(build)(jr.key(0))


@pytest.fixture(scope="module")
def model():
    return built(tiny.language_model)


@pytest.mark.parametrize("policy", [DEFAULT, PUBLISHED])
def test_every_trainable_leaf_has_a_label(policy, model):
    labels = by_path(policy.labels(model))
    assert labels.keys() == by_path(eqx.filter(model, eqx.is_inexact_array)).keys()
    assert set(labels.values()) == set(policy.groups)
    skeleton = eqx.filter_eval_shape(tiny.language_model, jr.key(0))
    assert by_path(policy.labels(skeleton)) == labels


def test_published_labels(model):
    labels = by_path(PUBLISHED.labels(model))
    ssm = {path for path, label in labels.items() if label == "ssm"}
    assert {path.rsplit(".", 1)[-1] for path in ssm} == {"B", "Lambda_re", "Lambda_im"}
    assert len(ssm) == 3
    assert PUBLISHED.groups == {"rest": (1e-3, 0.1), "ssm": (5e-4, 0.0)}


def test_default_labels(model):
    labels, leaves = by_path(DEFAULT.labels(model)), by_path(model)
    for path, label in labels.items():
        name = path.rsplit(".", 1)[-1]
        if name in ("Lambda_re", "Lambda_im", "log_Delta", "B", "C", "D"):
            assert label == "recurrence", path
        else:
            assert label == ("vectors" if leaves[path].ndim < 2 else "matrices"), path
    assert DEFAULT.groups == {"matrices": (1e-3, 0.1), "vectors": (1e-3, 0.0), "recurrence": (5e-4, 0.0)}


def test_labels_reach_into_a_bidirectional_layer(key):
    layer = BidirectionalS5(4, 4, key=key)
    published, default = by_path(PUBLISHED.labels(layer)), by_path(DEFAULT.labels(layer))
    assert {path for path, label in published.items() if label == "ssm"} == {
        ".forward.B",
        ".forward.Lambda_re",
        ".forward.Lambda_im",
    }
    assert set(default.values()) == {"recurrence"}


def test_published_labels_of_implicit_filters(key):
    """Their network and its frequency; not the skips of the convolutions, nor what is no parameter."""
    bank = ImplicitFilter(2, 4, filter_width=3, train_positions=True, key=key)
    labels = by_path(PUBLISHED.labels(bank))
    assert {path.split("[")[0] for path, label in labels.items() if label == "ssm"} == {".layers", ".freq"}
    assert {labels[".bias"], labels[".z"]} == {"rest"}


@pytest.mark.parametrize("policy", [DEFAULT, PUBLISHED])
def test_labels_of_stacked_layers_are_those_of_the_layers(policy, key):
    """A stack of biases is no matrix."""
    build = lambda stack: eqx.filter_eval_shape(
        lambda key: LanguageModel(5, 4, lambda key: S5(4, 4, key=key), num_layers=3, mlp_width=4, stack=stack, key=key),
        key,
    )
    stacked, plain = (policy.labels(build(stack)).backbone.blocks for stack in (True, False))
    assert by_path(stacked.layer) == by_path(plain[0])
    layer = MLP(3, 4, key=key)
    twice = Stack.of([Stack.of([layer, layer])] * 2)
    assert by_path(policy.labels(twice).layer.layer) == by_path(policy.labels(layer))


class Frozen(eqx.Module):
    weight: jax.Array
    buffer: Buffer

    def __call__(self, x):
        return jnp.sum((self.weight + self.buffer()) * x)


@pytest.mark.parametrize("policy", [DEFAULT, PUBLISHED])
def test_buffers_never_move(policy):
    """Whatever their gradient, without decay, and without moments; nor does `cast` touch them."""
    model = Frozen(jnp.ones(3), Buffer(jnp.full(3, 2.0)))
    params = eqx.filter(model, eqx.is_inexact_array)
    optimiser = policy.optimiser(model)
    updates = first_update(optimiser, params)
    np.testing.assert_array_equal(updates.buffer.array, 0)
    assert jnp.all(updates.weight != 0)
    moments = [leaf for leaf in jax.tree.leaves(optimiser.init(params)) if leaf.shape == (3,)]
    assert len(moments) == 2
    gradient = eqx.filter_grad(lambda model: model(jnp.ones(3)))(model)
    assert float(optax.tree.norm(gradient)) == pytest.approx(np.sqrt(3))
    narrow = cast(model, jnp.dtype("bfloat16"))
    assert (narrow.weight.dtype, narrow.buffer.array.dtype) == (jnp.bfloat16, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def first_update(optimiser, params):
    """What a gradient of 1 does at first."""
    return optimiser.update(jax.tree.map(jnp.ones_like, params), optimiser.init(params), params)[0]


@pytest.mark.parametrize("policy", [DEFAULT, PUBLISHED])
def test_groups_step_at_their_own_rate_and_decay_alone(policy, model):
    """With a gradient of 1 AdamW begins with -lr (1 + weight_decay p)."""
    params = eqx.filter(model, eqx.is_inexact_array)
    updates = first_update(policy.optimiser(model), params)
    labels, params = by_path(policy.labels(model)), by_path(params)
    for path, update in by_path(updates).items():
        lr, weight_decay = policy.groups[labels[path]]
        expected = -lr * (1 + weight_decay * params[path])
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5 * lr, err_msg=path)


def test_clipping_is_of_the_whole_gradient(key):
    model = tiny.bigram(key)
    params = eqx.filter(model, eqx.is_inexact_array)
    policy = DefaultGroups(lr=1.0, schedule=SCHEDULE, weight_decay=0.0, b1=0.0, b2=0.0, clip_norm=1e-9)
    updates = first_update(policy.optimiser(model), params)
    size = sum(p.size for p in jax.tree.leaves(params))
    clipped = 1e-9 / np.sqrt(size)  # Adam's epsilon is 1e-8: the length of a small gradient shows
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -clipped / (clipped + 1e-8), rtol=1e-4)


def test_complex_leaves_are_refused():
    with pytest.raises(ValueError, match=r"must be real, but \.weight is complex64"):
        layer = eqx.nn.Linear(2, 2, dtype=jnp.complex64, key=jr.key(0))
        DEFAULT.optimiser(layer)


# The loss.


score = jax.jit(score)
next_token = eqx.filter_jit(next_token)


def test_score_is_the_weighted_mean(key):
    logits = jr.normal(key, (3, 5, 7))
    targets = jr.randint(key, (3, 5), 0, 7)
    weights = jnp.array([[1.0, 0.0, 2.0, 0.5, 1.0]] * 3)
    given = score(logits, targets, weights)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    assert float(given.loss) == pytest.approx(np.average(nll, weights=weights))
    right = np.asarray(logits).argmax(-1) == targets
    assert float(given.accuracy) == pytest.approx(np.average(right, weights=weights))
    parts = score(logits[:1], targets[:1], weights[:1]) + score(logits[1:], targets[1:], weights[1:])
    assert float(parts.loss) == pytest.approx(float(given.loss))


def test_what_has_no_weight_has_no_effect(key):
    logits = jr.normal(key, (4, 7))
    targets, weights = jnp.array([1, 2, -100, 3]), jnp.array([1.0, 1.0, 0.0, 0.0])
    wild = logits.at[2:].set(jnp.nan)
    loss = lambda logits: score(logits, targets, weights).loss
    assert loss(wild) == loss(logits)
    gradient = jax.grad(loss)(wild)
    np.testing.assert_array_equal(gradient[2:], 0.0)
    assert np.isfinite(gradient).all()
    assert float(score(logits, targets, jnp.zeros(4)).loss) == 0.0


@pytest.mark.parametrize("dtype, wide", [("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2])
def test_the_loss_is_at_least_float32(dtype, wide, x64):
    given = score(jnp.zeros((2, 3), dtype), jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.float32))
    assert given.loss.dtype == given.accuracy.dtype == jnp.dtype(wide)


def test_a_batch_of_one_is_scored_like_any(key):
    model = eqx.nn.inference_mode(tiny.bigram(key))
    batch = tiny.TASK.train(jnp.arange(2))
    one = lambda i: Batch(*(x[i : i + 1] for x in (batch.inputs, batch.targets, batch.weights)))
    total: Score = next_token(model, one(0)) + next_token(model, one(1))
    assert float(total.loss) == pytest.approx(float(next_token(model, batch).loss), rel=1e-6)


def with_gradient(model, batch, **options):
    def loss(model):
        given = next_token(model, batch, **options)
        return given.loss, given

    (_, given), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return given, gradient


@pytest.mark.parametrize("size, length", [(1, 10), (2, 8)])
def test_pieces_have_the_score_and_the_gradient_of_the_whole(size, length, model):
    """Ten steps in two pieces and a shorter one, or eight in two."""
    model = eqx.nn.inference_mode(model)
    batch = jax.tree.map(lambda a: a[:, :length], tiny.TASK.train(jnp.arange(size)))
    whole, pieces = quick_jit(lambda model: [with_gradient(model, batch, chunk=chunk) for chunk in (None, 4)])(model)
    assert float(whole[0].weight) == length * size
    for given, expected in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)


def attention_model(key):
    mixers = (Attention(8, 2, max_length=10, rotary=Rotary(4), short_conv=3, dropout=0.1, key=key),)
    return LanguageModel(10, 8, mixers, mlp_width=8, max_length=10, dropout=0.1, key=key)


@quick_jit
def piece_by_hand(model, states, part, key, cotangents):
    """The loss of one piece and the states after it; the gradients for the model and the states before it."""

    def piece(model, states):
        keys = key[None] if len(part.inputs) == 1 else jr.split(key, len(part.inputs))
        prefill = lambda state, tokens, key: model.prefill(state, tokens, key=key)
        states, logits = jax.vmap(prefill)(states, part.inputs, keys)
        return score(logits, part.targets, part.weights).nll, states

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


@pytest.mark.parametrize("build, size, length", [(tiny.language_model, 2, 8), (attention_model, 1, 10)])
def test_pieces_are_those_of_a_loop(build, size, length, key):
    """With dropout. Truncated, the gradient is the sum of those of the pieces alone, and another one."""
    model, batch = built(build), jax.tree.map(lambda a: a[:, :length], tiny.TASK.train(jnp.arange(size)))
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


def test_pieces_on_two_devices(model):
    model = eqx.nn.inference_mode(model)
    batch = tiny.TASK.train(jnp.arange(4))
    mesh, (arrays, rest) = Mesh(jax.devices()[:2], "batch"), eqx.partition(model, eqx.is_array)
    nll = lambda arrays, batch: next_token(eqx.combine(arrays, rest), batch, chunk=5).nll
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


def test_each_piece_of_each_sequence_draws_anew(key):
    zeros = jnp.zeros((2, 20), jnp.int32)
    rows = []
    for weights in (jnp.ones((2, 20)) * row[:, None] for row in jnp.eye(2)):
        given: Score = next_token(Coin(), Batch(zeros, zeros, weights), key=key, chunk=1)
        rows.append(float(given.loss))
    assert rows[0] != rows[1]
    assert all(0 < row / np.log(2) < 1 for row in rows)


def test_pieces_need_memory_for_one_piece(key):
    mixer = lambda key: ShortConv(8, 3, key=key)
    model = quick_jit(lambda key: LanguageModel(10, 8, mixer, num_layers=1, mlp_width=16, key=key))(key)

    def temporaries(length, chunk):
        ones = jnp.ones((1, length), jnp.int32)
        arrays, rest = eqx.partition(model, eqx.is_array)
        loss = lambda arrays: (
            next_token(eqx.combine(arrays, rest), Batch(ones, ones, jnp.ones((1, length))), chunk=chunk).loss
        )
        return jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096, 256) < 0.2 * temporaries(4096, None)


def test_a_piece_has_a_step():
    with pytest.raises(ValueError, match="chunk must be at least 1 step"):
        next_token(Coin(), tiny.TASK.train(jnp.arange(1)), chunk=0)
    with pytest.raises(TypeError, match="init_state and prefill; Bigram lacks one: leave it out"):
        next_token(tiny.bigram(jr.key(0)), tiny.TASK.train(jnp.arange(1)), chunk=2)
    with pytest.raises(ValueError, match="truncate cuts the gradient between pieces and needs a chunk"):
        next_token(Coin(), tiny.TASK.train(jnp.arange(1)), truncate=True)


# The step.


@pytest.fixture(scope="module")
def trainer():
    return tiny.trainer()


def test_leaves_and_state_are_two_views(trainer):
    leaves = trainer.init()
    state = trainer.unflatten(leaves)
    assert all(a is b for a, b in zip(leaves, trainer.flatten(state), strict=True))
    assert isinstance(state.model, tiny.Bigram)
    assert int(state.step) == 0


def test_a_dispatch_is_so_many_steps_of_plain_optax(trainer):
    """The same steps one by one, with the module."""
    policy = tiny.GROUPS
    state = trainer.unflatten(trainer.init())
    model, optimiser = state.model, policy.optimiser(state.model)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def one_step(model, opt_state, batch, key):
        value_and_grad = eqx.filter_value_and_grad(lambda model: next_token(model, batch, key=key).loss)
        loss, grads = value_and_grad(model)
        updates, opt_state = optimiser.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, loss, optax.tree.norm(grads)

    losses, norms = [], []
    for step in range(5):
        key = jr.fold_in(jr.fold_in(jr.key(0), 1), step)
        batch = tiny.TASK.train_batch(step, 4)
        model, opt_state, loss, norm = one_step(model, opt_state, batch, key)
        losses.append(loss)
        norms.append(norm)

    leaves, metrics = trainer.run(trainer.init())
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norms, rtol=1e-4)
    np.testing.assert_allclose(metrics["lr/matrices"], [0.0, 5e-3, 1e-2, 1e-2, 1e-2], rtol=1e-6)
    assert metrics["accuracy"].shape == (5,)
    state = trainer.unflatten(leaves)
    assert int(state.step) == 5
    for given, expected in zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_runs_repeat_bit_for_bit_and_compile_once(trainer):
    def run():
        leaves = trainer.init()
        for _ in range(3):
            leaves, metrics = trainer.run(leaves)
        return [*leaves, *metrics.values()]

    for a, b in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert trainer._run._cache_size() == 1


def test_seeds_differ(trainer):
    first, second = trainer.init(), tiny.trainer(seed=1).init()
    assert any((a != b).any() for a, b in zip(first, second, strict=True))


def test_the_state_is_donated(trainer):
    leaves = trainer.init()
    trainer.run(leaves)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_evaluation_is_of_the_examples_asked_for(trainer):
    leaves = trainer.init()
    model = eqx.nn.inference_mode(trainer.unflatten(leaves).model)
    for count in (7, 23):
        expected = next_token(model, tiny.TASK.test(jnp.arange(count)))
        given = trainer.evaluate(leaves, count)
        assert given["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
        assert given["accuracy"] == pytest.approx(float(expected.accuracy))
    assert trainer.evaluate(leaves) == trainer.evaluate(leaves, 30) == trainer.evaluate(leaves, 99)


def test_a_language_model_learns():
    trainer = tiny.trainer(tiny.language_model, steps_per_dispatch=100)
    leaves, first = trainer.run(trainer.init())
    assert all(not jnp.iscomplexobj(leaf) for leaf in leaves)
    leaves, second = trainer.run(leaves)
    assert np.mean(second["loss"][-50:]) < np.mean(first["loss"][:20]) - 0.3
    C = lambda leaves: trainer.unflatten(leaves).model.backbone.blocks[0].mixer.bank.mixers[0].C
    assert np.median(np.abs(C(leaves) - C(trainer.init()))) > 1e-2


@pytest.mark.parametrize("name", ["batch_size", "steps_per_dispatch"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        tiny.trainer(**{name: 0})


# What is watched.


def test_spectral_radius_is_the_largest_of_all_layers(model, key):
    largest = max(np.abs(block.mixer.bank.mixers[0].discretised()[0]).max() for block in model.backbone.blocks)
    assert float(spectral_radius(model)) == pytest.approx(largest)
    assert float(spectral_radius(cast(model, jnp.dtype("bfloat16")))) == pytest.approx(largest)
    assert spectral_radius(tiny.bigram(key)) is None
    layer = eqx.tree_at(lambda s5: s5.Lambda_re, S5(4, 8, clip_eigs=False, key=key), jnp.full(4, 0.5))
    assert float(spectral_radius(layer)) > 1.0


def test_spectral_radius_reaches_into_a_stack(key):
    build = lambda mixer: lambda key: LanguageModel(5, 4, mixer, num_layers=3, mlp_width=4, stack=True, key=key)
    model = eqx.filter_jit(build(lambda key: S5(4, 4, key=key)))(key)
    largest = max(np.abs(block.mixer.discretised()[0]).max() for block in model.backbone.blocks)
    assert float(spectral_radius(model)) == pytest.approx(largest)
    assert spectral_radius(eqx.filter_jit(build(lambda key: ShortConv(4, 2, key=key)))(key)) is None
