"""Rules: SOAP against its definition, dense weights on their own, averaged parameters, optimisers of optax."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import tiny
from helpers import drawn, on_device, quick_jit, relative_error

from s5eqx.data import Batch
from s5eqx.models import LanguageModel
from s5eqx.nn import MLP, RGLRU, Buffer, Stack
from s5eqx.train import (
    AdamW,
    DefaultGroups,
    Muon,
    Optax,
    PublishedGroups,
    ScheduleFree,
    Soap,
    WarmupConstant,
    next_token,
    scale_by_soap,
)

SCHEDULE = WarmupConstant()


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


# SOAP.

OPTIONS = {"b1": 0.9, "b2": 0.8, "precondition_frequency": 3, "max_size": 5, "shampoo_decay": 0.7}


def soap(grads, bases, sides, *, b1, b2, precondition_frequency, max_size, shampoo_decay, eps=1e-8):
    """The directions for the gradients of one matrix, step by step; `bases` are those of the first factors.

    `sides` tells whether the rows and the columns are turned; what is not keeps the basis of the identity.
    """
    Q = [basis if turned else np.eye(n) for basis, turned, n in zip(bases, sides, grads[0].shape, strict=True)]
    M, V = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    factors = [(1 - shampoo_decay) * grads[0] @ grads[0].T, (1 - shampoo_decay) * grads[0].T @ grads[0]]
    directions = [np.zeros_like(M)]
    for t, G in enumerate(grads[1:], 1):
        M = b1 * M + (1 - b1) * G
        V = b2 * V + (1 - b2) * (Q[0].T @ G @ Q[1]) ** 2
        turned = Q[0].T @ M @ Q[1] / (1 - b1**t)
        directions.append(Q[0] @ (turned / (np.sqrt(V / (1 - b2**t)) + eps)) @ Q[1].T)
        for i, outer in enumerate((G @ G.T, G.T @ G)):
            factors[i] = shampoo_decay * factors[i] + (1 - shampoo_decay) * outer
            if sides[i] and t % precondition_frequency == 0:
                order = np.argsort(-np.diag(Q[i].T @ factors[i] @ Q[i]))
                Q[i] = np.linalg.qr(factors[i] @ Q[i][:, order])[0]
                V = np.take(V, order, axis=i)
    return np.stack(directions)


@partial(jax.jit, static_argnums=0)
def directions(transformation, grads):
    """The directions of all steps, and the state after the first."""
    init = transformation.init(jax.tree.map(lambda g: g[0], grads))

    def step(state, g):
        direction, state = transformation.update(g, state)
        return state, (direction, state)

    _, (given, states) = jax.lax.scan(step, init, grads)
    return given, jax.tree.map(lambda leaf: leaf[0], states)


@pytest.mark.smoke
def test_soap_is_its_definition(x64):
    """A matrix, a stack of them, one that is turned from the left alone, one from the right, and a vector."""
    rng = np.random.default_rng(2409)
    sides = {"plain": (5, 3), "stack": (2, 3, 4), "wide": (3, 7), "tall": (6, 2), "vector": (4,)}
    grads = {name: rng.standard_normal((25, *shape)) for name, shape in sides.items()}
    given, first = directions(scale_by_soap(**OPTIONS), grads)
    for name, turned in {"plain": (True, True), "wide": (True, False), "tall": (False, True)}.items():
        moments, G = first.moments[name], grads[name]
        assert (moments.left is not None, moments.right is not None) == turned
        bases = [None if side is None else np.asarray(side.basis) for side in (moments.left, moments.right)]
        for Q, factor in zip(bases, (G[0] @ G[0].T, G[0].T @ G[0]), strict=True):
            if Q is not None:  # of a singular factor there are many, so the twin takes over the one it is given
                np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-12)
                diagonal = Q.T @ factor @ Q
                np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-12)
        assert relative_error(given[name], soap(G, bases, turned, **OPTIONS)) < 1e-9, name
    for i in range(2):
        bases = [np.asarray(side.basis)[i] for side in (first.moments["stack"].left, first.moments["stack"].right)]
        expected = soap(grads["stack"][:, i], bases, (True, True), **OPTIONS)
        assert relative_error(np.asarray(given["stack"])[:, i], expected) < 1e-9
    column = soap(grads["vector"][..., None], (None, None), (False, False), **OPTIONS)
    assert relative_error(given["vector"], column[..., 0]) < 1e-12


def test_soap_remembers_in_float32():
    grads = jax.ShapeDtypeStruct((2, 3, 2), jnp.bfloat16)
    given, state = jax.eval_shape(lambda grads: directions(scale_by_soap(), grads), grads)
    assert given.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.moments)} == {jnp.dtype("float32")}


def test_soap_beats_adam_where_the_axes_are_not_those_of_the_problem():
    """½ tr(Wᵀ A W B), condition 10⁶: the best of five rates after 100 steps."""
    rng = np.random.default_rng(0)
    eigenvectors = lambda n: np.linalg.qr(rng.normal(size=(n, n)))[0]
    A, B = ((Q * np.logspace(0, -3, len(Q))) @ Q.T for Q in (eigenvectors(6), eigenvectors(4)))
    A, B, start = (on_device(x, np.float32) for x in (A, B, rng.normal(size=(6, 4))))
    loss = lambda W: 0.5 * jnp.sum((A @ W @ B) * W)

    def final(direction, lr):
        def step(carry, t):
            W, state = carry
            update, state = direction.update(jax.grad(loss)(W), state)
            return (W - lr * (1 - t) * update, state), None

        (W, _), _ = jax.lax.scan(step, (start, direction.init(start)), jnp.linspace(0, 1, 100))
        return loss(W)

    @quick_jit
    def best():
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            lr = jnp.array([0.03, 0.1, 0.3, 1, 3])
            rules = scale_by_soap(0.9, 0.95, precondition_frequency=3), optax.scale_by_adam(0.9, 0.95)
            return [jnp.min(jax.vmap(partial(final, rule))(lr)) for rule in rules], loss(start)

    (of_soap, of_adam), before = jax.device_get(best())
    assert of_soap < 0.03 * of_adam < 1e-3 * before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"b1": 1.0}, "0 <= b1 < 1 must hold, got 1.0"),
        ({"shampoo_decay": -0.1}, "0 <= shampoo_decay < 1 must hold, got -0.1"),
        ({"precondition_frequency": 0}, "precondition_frequency must be at least 1, got 0"),
        ({"max_size": 0}, "max_size must be at least 1, got 0"),
    ],
)
def test_soap_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_soap(**options)


# Groups and rules.


def test_dense_weights_are_a_group_where_they_have_a_rule(key):
    """Neither taps and embeddings nor stacked vectors are dense weights; nothing else changes its group."""
    mixer = lambda key: RGLRU(4, key=key)
    build = lambda key: LanguageModel(5, 4, mixer, num_layers=2, mlp_width=6, stack=True, key=key)
    model = eqx.filter_eval_shape(build, key)
    plain, dense = (by_path(DefaultGroups(1.0, SCHEDULE, dense=rule).labels(model)) for rule in (None, Muon()))
    assert set(plain.values()) == {"matrices", "vectors", "recurrence"}
    moved = {path for path in plain if plain[path] != dense[path]}
    assert {plain[path] for path in moved} == {"matrices"} and {dense[path] for path in moved} == {"dense"}
    layers = (".fc1.weight", ".fc2.weight", "a_proj.weight", "x_proj.weight")
    assert len(moved) == 4 and all(path.endswith(layers) for path in moved)
    assert "matrices" in dense.values()


def test_the_dense_group_has_its_own_rate():
    policy = DefaultGroups(1e-3, WarmupConstant(2), recurrence_lr=5e-4, dense=Muon(), dense_lr=2e-2)
    rates = {name: float(rate) for name, rate in policy.learning_rates(1).items()}
    assert rates == pytest.approx({"matrices": 5e-4, "vectors": 5e-4, "recurrence": 2.5e-4, "dense": 1e-2})
    assert DefaultGroups(1e-3, SCHEDULE, dense=Muon()).groups["dense"].lr == 1e-3


@quick_jit
def step(policy, model, grads, wrap=lambda optimiser: optimiser):
    """The update of the first step, and the state after it."""
    optimiser = wrap(policy.optimiser(model))
    params = eqx.filter(model, eqx.is_inexact_array)
    return optimiser.update(grads, optimiser.init(params), params)


@pytest.mark.parametrize("rms", [0.2, None])
def test_muon_makes_each_matrix_orthogonal(rms, key):
    """Scaled by the shape of one weight, (out, in), whatever the stack; all else is AdamW's."""
    layer = drawn(lambda key: Stack.of([MLP(2, 8, key=k) for k in jr.split(key, 2)]), key)
    rng = np.random.default_rng(3)
    grads = jax.tree.map(lambda p: on_device(rng.standard_normal(p.shape), p.dtype), layer)
    lr, weight_decay = 1e-2, 0.1
    policy = DefaultGroups(1.0, SCHEDULE, weight_decay=weight_decay, dense=Muon(rms=rms), dense_lr=lr)
    updates, layer, grads = jax.device_get((step(policy, layer, grads)[0], layer, grads))
    scales = {"fc1": 2.0, "fc2": 1.0} if rms is None else dict.fromkeys(("fc1", "fc2"), rms * np.sqrt(8))
    for name, scale in scales.items():
        update, weight, grad = (getattr(tree.layer, name).weight for tree in (updates, layer, grads))
        orthogonal = -(update / lr + weight_decay * weight) / scale
        for matrix, G in zip(orthogonal, grad, strict=True):
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert singular.min() > 0.6 and singular.max() < 1.3
            U, _, V = np.linalg.svd(G, full_matrices=False)
            assert np.sum((U @ V) * matrix) > 0.95 * np.linalg.norm(U @ V) * np.linalg.norm(matrix)
        bias, grad = getattr(updates.layer, name).bias, getattr(grads.layer, name).bias
        np.testing.assert_allclose(bias, -np.sign(grad), rtol=1e-5)


class Mixed(eqx.Module):
    """A dense layer, a vector, a buffer, and a leaf that is no array."""

    dense: eqx.nn.Linear
    vector: jax.Array
    buffer: Buffer
    activation: object = jax.nn.relu


def mixed():
    dense = drawn(lambda key: eqx.nn.Linear(3, 2, key=key), jr.key(0))
    return Mixed(dense, on_device([0.1, 0.7], np.float32), Buffer(on_device([1 / 3, 0.1], np.float32)))


@pytest.mark.smoke
def test_schedule_free_evaluates_the_average():
    """Against its definition, for gradients of ½ p² and steps of SGD; buffers do not move by one bit."""
    lr, b1, steps = 0.3, 0.8, 7
    sgd = ScheduleFree(Optax(optax.sgd), b1=b1)
    model = mixed()

    @quick_jit
    def train(policy, model):
        optimiser = optax.apply_if_finite(policy.optimiser(model), 2)
        params, rest = eqx.partition(model, eqx.is_inexact_array)

        def step(carry, _):
            updates, state = optimiser.update(carry[0], carry[1], carry[0])
            return (eqx.apply_updates(carry[0], updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, optimiser.init(params)), length=steps)
        whole = policy.evaluated(eqx.combine(params, rest), state)
        return params, policy.evaluated(params, state), whole

    policy = DefaultGroups(lr, SCHEDULE, weight_decay=0.0, rule=sgd, dense=Optax(optax.sgd))
    trained, averaged, whole = train(policy, model)
    z = x = y = np.asarray(model.vector, np.float64)
    for t in range(1, steps + 1):
        z = z - lr * y
        x = (1 - 1 / t) * x + z / t
        y = b1 * x + (1 - b1) * z
    np.testing.assert_allclose(trained.vector, y, rtol=1e-5)
    np.testing.assert_allclose(averaged.vector, x, rtol=1e-5)
    np.testing.assert_allclose(trained.dense.weight, np.asarray(model.dense.weight) * (1 - lr) ** steps, rtol=1e-5)
    for tree in (trained, averaged):
        np.testing.assert_array_equal(tree.buffer.array, model.buffer.array)
        assert tree.activation is None
    np.testing.assert_array_equal(averaged.dense.weight, trained.dense.weight)
    np.testing.assert_array_equal(whole.vector, averaged.vector)
    assert whole.activation is jax.nn.relu


@pytest.mark.smoke
def test_weight_decay_of_any_optimiser_is_decoupled():
    model = mixed()
    grads = jax.tree.map(np.ones_like, eqx.filter(model, eqx.is_inexact_array))
    policy = partial(PublishedGroups, 0.5, 0.5, WarmupConstant())
    for rule in (Optax(lambda lr: optax.sgd(lr)), Optax(optax.contrib.ademamix)):
        plain, decayed = (
            np.asarray(step(policy(weight_decay=decay, rule=rule), model, grads)[0].dense.weight)
            for decay in (0.0, 0.2)
        )
        np.testing.assert_allclose(decayed - plain, -0.5 * 0.2 * np.asarray(model.dense.weight), rtol=1e-5)
        assert np.all(plain < 0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"got dense_lr=0.02 without `dense`. Give the rule too"):
        DefaultGroups(1.0, SCHEDULE, dense_lr=0.02)
    with pytest.raises(ValueError, match=r"must return an `optax.GradientTransformation`.* returned a tuple"):
        DefaultGroups(1.0, SCHEDULE, rule=Optax(lambda lr: (lr,))).optimiser(mixed())
    with pytest.raises(ValueError, match=r"0 <= beta < 1 must hold, got 1.5"):
        Muon(beta=1.5)
    with pytest.raises(ValueError, match=r"0 <= b2 < 1 must hold, got 1"):
        AdamW(b2=1.0)
    with pytest.raises(ValueError, match=r"0 < b1 < 1 must hold, got 0.0"):
        ScheduleFree(b1=0.0)


RULES = {
    "muon": {"dense": Muon(), "dense_lr": 0.1},
    "soap": {"dense": Soap(precondition_frequency=5)},
    "schedule-free": {"rule": ScheduleFree()},
    "prodigy": {"lr": 1.0, "weight_decay": 0.0, "rule": Optax(partial(optax.contrib.prodigy, estim_lr0=1e-3))},
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_each_rule_learns_and_its_state_is_arrays(options, key):
    policy = DefaultGroups(**{"lr": 0.05, "schedule": SCHEDULE, "clip_norm": 1.0, **options})
    tokens = np.random.default_rng(0).integers(0, 10, (4, 8))
    inputs, targets = (on_device(ids, np.int32) for ids in (tokens, (tokens + 3) % 10))
    batch = Batch(inputs, targets, on_device(np.ones((4, 8)), np.float32))
    model = eqx.nn.inference_mode(drawn(tiny.bigram, key))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda params: next_token(eqx.combine(params, rest), batch).loss

    @quick_jit
    def train(params):
        optimiser = policy.optimiser(model)

        def step(carry, _):
            updates, state = optimiser.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
            return (eqx.apply_updates(carry[0], updates), state), None

        (end, state), _ = jax.lax.scan(step, (params, optimiser.init(params)), length=30)
        return state, loss(params), loss(end), loss(policy.evaluated(end, state))

    state, *losses = train(params)
    before, after, evaluated = map(float, losses)
    assert after < before - 1.5 and evaluated < before - 1.5
    other = eqx.filter(state, eqx.is_array, inverse=True)
    assert jax.tree.leaves(other) == []
