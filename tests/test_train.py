"""Parameter groups, schedules, and the training step."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import tiny
from helpers import drawn, on_device, quick_jit

from s5eqx.models import LanguageModel
from s5eqx.nn import (
    MLP,
    S5,
    BidirectionalS5,
    Buffer,
    ImplicitFilter,
    ShortConv,
    Stack,
    cast,
)
from s5eqx.train import (
    AdamW,
    DefaultGroups,
    PublishedCosine,
    PublishedGroups,
    WarmupConstant,
    WarmupCosine,
    next_token,
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


@pytest.fixture(scope="module")
def model(key):
    return drawn(tiny.language_model, key)


@pytest.mark.parametrize("policy", [DEFAULT, PUBLISHED])
def test_every_trainable_leaf_has_a_label(policy, model):
    labels = by_path(policy.labels(model))
    assert labels.keys() == by_path(eqx.filter(model, eqx.is_inexact_array)).keys()
    assert set(labels.values()) == set(policy.groups)
    skeleton = eqx.filter_eval_shape(tiny.language_model, jr.key(0))
    assert by_path(policy.labels(skeleton)) == labels


@pytest.mark.smoke
def test_published_labels(model):
    labels = by_path(PUBLISHED.labels(model))
    ssm = {path for path, label in labels.items() if label == "ssm"}
    assert {path.rsplit(".", 1)[-1] for path in ssm} == {"B", "Lambda_re", "Lambda_im"}
    assert len(ssm) == 3
    assert {name: group[:2] for name, group in PUBLISHED.groups.items()} == {"rest": (1e-3, 0.1), "ssm": (5e-4, 0.0)}


@pytest.mark.smoke
def test_default_labels(model):
    labels, leaves = by_path(DEFAULT.labels(model)), by_path(model)
    for path, label in labels.items():
        name = path.rsplit(".", 1)[-1]
        if name in ("Lambda_re", "Lambda_im", "log_Delta", "B", "C", "D"):
            assert label == "recurrence", path
        else:
            assert label == ("vectors" if leaves[path].ndim < 2 else "matrices"), path
    settings = {name: group[:2] for name, group in DEFAULT.groups.items()}
    assert settings == {"matrices": (1e-3, 0.1), "vectors": (1e-3, 0.0), "recurrence": (5e-4, 0.0)}


def test_labels_reach_into_a_bidirectional_layer(key):
    layer = drawn(lambda key: BidirectionalS5(4, 4, key=key), key)
    published, default = by_path(PUBLISHED.labels(layer)), by_path(DEFAULT.labels(layer))
    assert {path for path, label in published.items() if label == "ssm"} == {
        ".forward.B",
        ".forward.Lambda_re",
        ".forward.Lambda_im",
    }
    assert set(default.values()) == {"recurrence"}


def test_published_labels_of_implicit_filters(key):
    """Their network and its frequency; not the skips of the convolutions, nor what is no parameter."""
    bank = drawn(lambda key: ImplicitFilter(2, 4, filter_width=3, train_positions=True, key=key), key)
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
    layer = drawn(lambda key: MLP(3, 4, key=key), key)
    twice = eqx.filter_eval_shape(lambda layer: Stack.of([Stack.of([layer, layer])] * 2), layer)
    assert by_path(policy.labels(twice).layer.layer) == by_path(policy.labels(layer))


class Frozen(eqx.Module):
    weight: jax.Array
    buffer: Buffer

    def __call__(self, x):
        return jnp.sum((self.weight + self.buffer()) * x)


@pytest.mark.parametrize("policy", [DEFAULT, PUBLISHED])
def test_buffers_never_move(policy):
    """Whatever their gradient, without decay, and without moments; nor does `cast` touch them."""
    ones = on_device(np.ones(3), np.float32)
    model = Frozen(ones, Buffer(on_device(np.full(3, 2), np.float32)))
    params = eqx.filter(model, eqx.is_inexact_array)
    optimiser = policy.optimiser(model)
    updates = first_update(optimiser, params)
    np.testing.assert_array_equal(updates.buffer.array, 0)
    assert np.all(np.asarray(updates.weight) != 0)
    moments = [leaf for leaf in jax.tree.leaves(optimiser.init(params)) if leaf.shape == (3,)]
    assert len(moments) == 2
    gradient = quick_jit(eqx.filter_grad(lambda model: model(ones)))(model)
    assert np.linalg.norm(jax.tree.leaves(gradient)) == pytest.approx(np.sqrt(3))
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
        lr, weight_decay, _ = policy.groups[labels[path]]
        expected = -lr * (1 + weight_decay * np.asarray(params[path]))
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5 * lr, err_msg=path)


def test_clipping_is_of_the_whole_gradient(key):
    model = drawn(tiny.bigram, key)
    params = eqx.filter(model, eqx.is_inexact_array)
    policy = DefaultGroups(lr=1.0, schedule=SCHEDULE, weight_decay=0.0, rule=AdamW(0.0, 0.0), clip_norm=1e-9)
    updates = first_update(policy.optimiser(model), params)
    size = sum(p.size for p in jax.tree.leaves(params))
    clipped = 1e-9 / np.sqrt(size)  # Adam's epsilon is 1e-8: the length of a small gradient shows
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -clipped / (clipped + 1e-8), rtol=1e-4)


def test_complex_leaves_are_refused(key):
    layer = drawn(lambda key: eqx.nn.Linear(2, 2, dtype=jnp.complex64, key=key), key)
    with pytest.raises(ValueError, match=r"must be real, but \.weight is complex64"):
        DEFAULT.optimiser(layer)


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


@pytest.mark.smoke
def test_a_dispatch_is_so_many_steps_of_plain_optax(trainer):
    """The same steps one by one, with the module."""
    policy = tiny.GROUPS
    state = trainer.unflatten(trainer.init())
    model, optimiser = state.model, policy.optimiser(state.model)
    opt_state = quick_jit(optimiser.init)(eqx.filter(model, eqx.is_inexact_array))

    @quick_jit
    def one_step(model, opt_state, step):
        key = jr.fold_in(jr.fold_in(jr.key(0), 1), step)
        batch = tiny.TASK.train_batch(step, 4)
        value_and_grad = eqx.filter_value_and_grad(lambda model: next_token(model, batch, key=key).loss)
        loss, grads = value_and_grad(model)
        updates, opt_state = optimiser.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, loss, optax.tree.norm(grads)

    losses, norms = [], []
    for step in np.arange(5, dtype=np.int32):
        model, opt_state, loss, norm = one_step(model, opt_state, step)
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
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_state_is_donated(trainer):
    leaves = trainer.init()
    trainer.run(leaves)
    assert all(leaf.is_deleted() for leaf in leaves)


@pytest.mark.slow
def test_evaluation_is_of_the_examples_asked_for(trainer):
    leaves = trainer.init()
    model = eqx.nn.inference_mode(trainer.unflatten(leaves).model)
    for count in (7, 23):
        expected = next_token(model, tiny.TASK.test(jnp.arange(count)))
        given = trainer.evaluate(leaves, count)
        assert given["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
        assert given["accuracy"] == pytest.approx(float(expected.accuracy))
    assert trainer.evaluate(leaves) == trainer.evaluate(leaves, 30) == trainer.evaluate(leaves, 99)
    with pytest.raises(ValueError, match="at least 1 example must be evaluated, got 0 of 30"):
        trainer.evaluate(leaves, 0)


@pytest.mark.slow
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
    unstable = drawn(lambda key: S5(4, 8, clip_eigs=False, key=key), key)
    unstable = eqx.tree_at(lambda s5: s5.Lambda_re, unstable, on_device(np.full(4, 0.5), np.float32))

    @quick_jit
    def run(model, unstable):
        all_Lambda = [block.mixer.bank.mixers[0].discretised()[0] for block in model.backbone.blocks]
        models = model, cast(model, jnp.dtype("bfloat16")), unstable
        return all_Lambda, [spectral_radius(each) for each in models]

    all_Lambda, (radius, of_narrow, of_unstable) = run(model, unstable)
    assert [radius, of_narrow] == pytest.approx([np.abs(all_Lambda).max()] * 2)
    assert float(of_unstable) > 1.0
    assert spectral_radius(drawn(tiny.bigram, key)) is None


@pytest.mark.slow
def test_spectral_radius_reaches_into_a_stack(key):
    build = lambda mixer: lambda key: LanguageModel(5, 4, mixer, num_layers=3, mlp_width=4, stack=True, key=key)
    model = eqx.filter_jit(build(lambda key: S5(4, 4, key=key)))(key)
    largest = max(np.abs(block.mixer.discretised()[0]).max() for block in model.backbone.blocks)
    assert float(spectral_radius(model)) == pytest.approx(largest)
    assert spectral_radius(eqx.filter_jit(build(lambda key: ShortConv(4, 2, key=key)))(key)) is None
