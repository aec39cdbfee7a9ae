"""The law of a mixer: parallel, in chunks and step by step are one function. One suite for all of them."""

import functools
import random

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, slow
from jax import lax
from mixers import CASES, D, L, V, assert_close, build, every_case, forms, inputs, used_state, without_flags

from s5eqx import nn


def whole(mixer, state, x, each):
    return mixer.prefill(state, x, **each)


def chunks(mixer, state, x, each):
    """Two pieces; one may be a single step."""
    cut = random.Random(str(jax.tree.structure(mixer))).choice([1, 2, 7, L - 1])
    state, first = mixer.prefill(state, x[:cut], **{name: a[:cut] for name, a in each.items()})
    state, rest = mixer.prefill(state, x[cut:], **{name: a[cut:] for name, a in each.items()})
    return state, jnp.concatenate([first, rest])


def steps(mixer, state, x, each):
    return lax.scan(lambda state, t: mixer.step(state, t[0], **t[1]), state, (x, each))


def weights_like(mixer, state, x, each):
    """A weight for every number of the final state and the output: their weighted sum has all gradients."""
    out = eqx.filter_eval_shape(whole, mixer, state, x, each)
    rng = np.random.default_rng(17)

    def draw(a):
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return None
        real, imaginary = rng.standard_normal((2, *a.shape))
        return on_device(real + 1j * imaginary if jnp.iscomplexobj(a) else real, a.dtype)

    return jax.tree.map(draw, out)


@quick_jit
def run(way, mixer, state, x, each, weights):
    """Final state and output; gradients of their weighted sum to the mixer, the state that enters and `x`."""

    def loss(differentiable):
        out = way(*differentiable, each)
        terms = jax.tree.map(lambda w, a: jnp.sum((w * a).real), weights, eqx.filter(out, eqx.is_inexact_array))
        return sum(jax.tree.leaves(terms)), out

    gradients, out = eqx.filter_grad(loss, has_aux=True)((mixer, state, x))
    return out, gradients


def assert_zero(tree):
    for a in jax.tree.leaves(tree):
        np.testing.assert_array_equal(a, jnp.zeros_like(a))


@every_case
def test_chunks_and_steps_equal_the_whole(case, key, x64):
    mixer = build(case, key)
    state = used_state(mixer, key)
    x, each = inputs(case)
    weights = weights_like(mixer, state, x, each)
    several = list(forms(case, each))
    if case.resets:
        several.append({**each, "reset": each["reset"].at[jnp.array([3, 4, 9])].set(True)})
    for each in several:
        expected = run(whole, mixer, state, x, each, weights)
        assert_close(run(chunks, mixer, state, x, each, weights), expected)
        assert_close(run(steps, mixer, state, x, each, weights), expected)


@every_case
def test_law_as_it_is_written(case, key, x64):
    """From the empty state and without flags; `step` is what `scan` takes."""
    mixer = build(case, key)
    x, each = inputs(case)
    weights = weights_like(mixer, mixer.init_state(), x, each)
    (_, y), _ = run(whole, mixer, mixer.init_state(), x, each, weights)
    each = without_flags(each)

    @quick_jit
    def both(mixer, x):
        in_steps = None if case.intervals else lax.scan(mixer.step, mixer.init_state(), x)[1]
        return mixer(x, **each), in_steps

    at_once, in_steps = both(mixer, x)
    assert_close(at_once, y)
    if not case.intervals:
        assert_close(in_steps, y)


@every_case
@pytest.mark.parametrize("way", [whole, chunks, steps])
def test_no_output_depends_on_the_future(case, way, key, x64):
    mixer = build(case, key)
    state = used_state(mixer, key)
    x, flags = inputs(case)
    weights = weights_like(mixer, state, x, flags)
    no_state = jax.tree.map(jnp.zeros_like, weights[0])
    for each in forms(case, flags):
        tolerance = 1e-12 if case.fft and "reset" not in each else 0
        (_, y), _ = run(way, mixer, state, x, each, weights)
        for t in (0, 4, L - 2):
            known = jnp.arange(L) <= t
            splice = lambda a, b, known=known: jnp.where(known if a.ndim == 1 else known[:, None], a, b)
            other, other_each = inputs(case, seed=1)
            other_each = {name: splice(each[name], other_each[name]) for name in each}
            (_, other_y), _ = run(way, mixer, state, splice(x, other), other_each, weights)
            np.testing.assert_allclose(other_y[: t + 1], y[: t + 1], rtol=0, atol=tolerance)
            past = (no_state, weights[1].at[t + 1 :].set(0))
            _, (_, _, to_x) = run(way, mixer, state, x, each, past)
            if not case.tokens:
                np.testing.assert_allclose(to_x[t + 1 :], jnp.zeros_like(to_x[t + 1 :]), rtol=0, atol=tolerance)
                assert jnp.all(jnp.any(jnp.abs(to_x[t]) > 1e-9))


@every_case
@pytest.mark.parametrize("way", [whole, chunks, steps])
def test_a_reset_starts_a_new_sequence(case, way, key, x64):
    mixer = build(case, key)
    assert nn.takes_reset(mixer) == case.resets
    if not case.resets:
        refuses_flags(case, way, mixer)
        return
    state, empty = used_state(mixer, key), mixer.init_state()
    x, each = inputs(case)
    weights = weights_like(mixer, state, x, each)

    # At the start it drops the state, to the last bit.
    flags = {**each, "reset": each["reset"].at[0].set(True)}
    assert_close(run(way, mixer, state, x, flags, weights)[0], run(way, mixer, empty, x, each, weights)[0], 0)

    for t in (3, 4):
        flags = {**each, "reset": each["reset"].at[t].set(True)}
        after = (weights[0], weights[1].at[:t].set(0))
        (final, y), (_, to_state, to_x) = run(way, mixer, state, x, flags, after)

        # What comes after does not know what came before, and has no gradient to it.
        other = x.at[:t].set(inputs(case, seed=1)[0][:t])
        (other_final, other_y), _ = run(way, mixer, empty, other, flags, after)
        assert_close((other_final, other_y[t:]), (final, y[t:]), 0)
        assert_zero(to_state)
        if not case.tokens:
            assert_zero(to_x[:t])

        # It is what a sequence that begins there gives.
        alone, alone_each = jax.tree.map(functools.partial(jnp.roll, shift=-t, axis=0), (x, each))
        (_, alone_y), _ = run(way, mixer, empty, alone, alone_each, after)
        assert_close(y[t:], alone_y[:-t])


def refuses_flags(case, way, mixer):
    x, each = inputs(case)
    with pytest.raises(ValueError, match="takes no `reset`"):
        way(mixer, mixer.init_state(), x, {**each, "reset": jnp.zeros(L, bool)})
    if way is whole:
        with pytest.raises(ValueError, match=f"^{type(mixer).__name__} takes no `reset`"):  # itself: before any work
            mixer(x, reset=jnp.zeros(L, bool))


@every_case
def test_empty_sequence(case, key, x64):
    mixer = build(case, key)
    state = used_state(mixer, key)
    x, each = jax.tree.map(lambda a: a[:0], inputs(case))
    several = each, without_flags(each)

    @quick_jit
    def both(mixer, state):
        return [(mixer.prefill(state, x, **kept), mixer(x, **kept)) for kept in several]

    for (after, y), alone in both(mixer, state):
        assert_close(after, state, 0)
        assert y.shape == alone.shape == (0, V if case.tokens else D)


@every_case
def test_vmap(case, key, x64):
    mixer = build(case, key)
    states = [used_state(mixer, k) for k in jr.split(key, 3)]
    examples = [inputs(case, seed) for seed in range(3)]
    for t, (_, each) in enumerate(examples):
        if case.resets:
            each["reset"] = each["reset"].at[3 * t].set(True)
    batch = lambda trees: jax.tree.map(lambda *leaves: on_device(np.stack(leaves)), *trees)
    weights = weights_like(mixer, states[0], *examples[0])
    expected = [run(whole, mixer, s, x, each, weights)[0] for s, (x, each) in zip(states, examples, strict=True)]
    mapped = lambda *args: [eqx.filter_vmap(way, in_axes=(None, 0, 0, 0))(*args) for way in (whole, steps)]
    for got in quick_jit(mapped)(mixer, batch(states), *batch(examples)):
        assert_close(got, batch(expected))


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, *map(slow, (jnp.float32, jnp.float64))])
def test_dtypes_follow_the_parameters(case, dtype, key, x64):
    """Not the x64 flag, which is on here: recurrent states are at least float32 or complex64, all else is `dtype`."""
    wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    as_wide = lambda model: jax.tree.map(lambda a: a.astype(wide) if eqx.is_inexact_array(a) else a, model)
    mixer = drawn(lambda key: nn.cast(as_wide(case.build(key)), dtype), key)
    x, each = inputs(case, dtype=dtype)
    state = mixer.init_state()
    assert len({id(a) for a in jax.tree.leaves(state)}) == len(jax.tree.leaves(state)), "each can be donated"
    complex_dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    assert {a.dtype for a in jax.tree.leaves(state)} <= {jnp.dtype(d) for d in (dtype, wide, complex_dtype, jnp.int32)}
    for way in (whole, steps):  # chunks are several wholes
        after, y = eqx.filter_eval_shape(way, mixer, state, x, each)
        assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
        assert y.dtype == (wide if case.tokens else dtype)


@pytest.mark.parametrize("name", ["hyena_3_half_glu2", "language_model"])
def test_steps_equal_the_whole_in_bfloat16(name, key):
    mixer = nn.cast(build(CASES[name], key), jnp.bfloat16)
    x, each = inputs(CASES[name], dtype=jnp.bfloat16)
    forward = quick_jit(lambda way: way(mixer, mixer.init_state(), x, each)[1].astype(jnp.float32))
    assert_close(forward(steps), forward(whole), 0.02)
