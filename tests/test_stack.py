"""Layers stacked along their arrays, and blocks that are computed twice: the same model as a plain tuple of blocks."""

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, slow

from s5eqx import nn
from s5eqx.models import DefaultInit, GPT2Init, LanguageModel, S5Init

V, D, L = 7, 6, 9


def mixer(key, state_size=4, **options):
    return nn.S5(D, state_size, key=key, **options)


def conv(key):
    return nn.ShortConv(D, 3, key=key)


def language_model(key, mixer=mixer, **options):
    return LanguageModel(V, D, mixer, **({"num_layers": 2, "mlp_width": 8, "max_length": L} | options), key=key)


def compiled(key, *args, **options):
    return quick_jit(lambda key: language_model(key, *args, **options))(key)


def tokens(length=L):
    return on_device(np.random.default_rng(0).integers(0, V, length))


def unstack(model):
    """The model, its state or a gradient of it, with its blocks in a tuple."""
    model = jax.tree.map(lambda a: np.asarray(a) if eqx.is_array(a) else a, model)
    return eqx.tree_at(lambda m: m.backbone.blocks, model, tuple(model.backbone.blocks))


def assert_close(got, expected, tolerance=1e-12):
    got, expected = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max(initial=0)))


def each_layer(state):
    """The states of the blocks, one by one, of either form."""
    position, states = state
    if isinstance(states, tuple) and len(states) == 2:
        return position, list(states)
    return position, [jax.tree.map(lambda a, i=i: a[i], states) for i in range(2)]


@quick_jit
def everything(model, x, key):
    """The outputs of all three ways with their state, the output in training, and its gradient."""
    quiet = eqx.nn.inference_mode(model)
    reset = jnp.arange(len(x)) == 4

    def chunks(state):
        state, first = quiet.prefill(state, x[:2], reset=reset[:2])
        state, second = quiet.prefill(state, x[2:], reset=reset[2:])
        return state, jnp.concatenate([first, second])

    step = lambda state, t: quiet.step(state, t[0], reset=t[1])
    ways = [chunks(quiet.init_state()), jax.lax.scan(step, quiet.init_state(), (x, reset))]
    loss = lambda model: jnp.sum(jnp.sin(model(x, reset=reset, key=key)))
    return [quiet(x), *[(each_layer(state), y) for state, y in ways]], eqx.filter_value_and_grad(loss)(model)


@pytest.mark.slow
def test_all_forms_are_one_model(key, x64):
    """Stacked or not, rematerialised or not: weights, outputs, states, and with dropout the loss and its gradient."""
    build = lambda **options: compiled(key, dropout=0.2, drop_path=0.1, embed_dropout=0.1, **options)
    plain = build()
    outputs, (loss, gradient) = everything(plain, tokens(), key)
    for options in ({"stack": True}, {"remat": True}, {"stack": True, "remat": True}):
        model = build(**options)
        same_form = unstack if options.get("stack") else lambda model: model
        assert_close(same_form(model), plain, 1e-15)
        got, (got_loss, got_gradient) = everything(model, tokens(), key)
        assert_close(got, outputs)
        assert_close(got_loss, loss)
        assert_close(same_form(got_gradient), gradient)


@pytest.mark.slow
def test_convolutions_and_their_networks_stack(key, x64):
    """A filter bank, whose buffers are stacked too, and whose position is checked inside the scan."""
    implicit = lambda key: nn.hyena(D, L, filter_width=3, key=key)
    plain, stacked = (compiled(key, implicit, stack=stack, remat=stack) for stack in (False, True))
    assert_close(unstack(stacked), plain, 1e-15)
    forward = quick_jit(lambda model: (model(tokens()), model.prefill(model.init_state(), tokens())[1]))
    assert_close(forward(stacked), forward(plain))


def test_a_tuple_of_equal_mixers_stacks(key):
    mixers = drawn(lambda key: tuple(conv(k) for k in jr.split(key)), key)
    build = lambda stack: compiled(key, mixers, num_layers=None, stack=stack, init=GPT2Init())
    plain, stacked = build(False), build(True)
    assert isinstance(stacked.backbone.blocks, nn.Stack)
    assert_close(unstack(stacked), plain, 0)


@pytest.mark.parametrize(
    "other",
    [
        conv,
        lambda key: mixer(key, state_size=6),
        lambda key: mixer(key, activation=nn.Gelu()),
        lambda key: mixer(key, clip_eigs=False),
    ],
)
def test_layers_that_differ_do_not_stack(other, key):
    with pytest.raises(ValueError, match=r"equal types, options and shapes.*layer 1.*Keep such layers in a tuple"):
        eqx.filter_eval_shape(lambda key: nn.Stack.of([mixer(key), other(key)]), key)


def test_what_does_not_stack(key):
    bidirectional = drawn(lambda key: nn.BidirectionalS5(D, 4, key=key), key)
    with pytest.raises(ValueError, match="mixer must be causal"):
        eqx.filter_eval_shape(lambda key: language_model(key, lambda key: bidirectional, stack=True), key)
    with pytest.raises(ValueError, match="at least one layer"):
        nn.Stack.of(())
    with pytest.raises(RuntimeError, match="key"):
        eqx.filter_eval_shape(lambda key: language_model(key, stack=True, dropout=0.1)(tokens()), key)
    convolutions = drawn(lambda key: nn.Stack.of([nn.Convolution(jnp.ones((L, D)), jnp.ones(D))] * 2), key)
    assert not nn.takes_reset(convolutions)
    with pytest.raises(ValueError, match="takes no `reset`, since a Convolution"):
        convolutions(np.ones((L, D)), reset=np.zeros(L, bool))


def test_a_stack_reads_like_a_tuple(key):
    layers = [conv(k) for k in jr.split(key, 3)]
    stack = nn.Stack.of(layers)
    assert len(stack) == 3
    assert_close(list(stack), layers, 0)
    assert_close(stack[-1], layers[2], 0)
    with pytest.raises(IndexError):
        stack[3]


def size(jaxpr):
    """The number of operations, those inside of others included."""
    inside = (sub for equation in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(equation.params))
    return len(jaxpr.eqns) + sum(map(size, inside))


def programs(num_layers, stack):
    """What it takes to build a model and to differentiate it."""
    build = lambda key: language_model(key, conv, num_layers=num_layers, stack=stack)
    built, arrays, rest = eqx.filter_make_jaxpr(build)(jr.key(0))
    loss = lambda model: jnp.sum(model(tokens()))
    differentiated, *_ = eqx.filter_make_jaxpr(eqx.filter_grad(loss))(eqx.combine(arrays, rest))
    return built, differentiated


def test_a_stack_compiles_alike_at_every_depth():
    shallow, deep = ([size(program.jaxpr) for program in programs(n, stack=True)] for n in (4, 12))
    assert shallow == deep
    shallow, deep = ([size(program.jaxpr) for program in programs(n, stack=False)] for n in (1, 2))
    assert deep > shallow  # the count sees what grows


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.slow
def test_rematerialisation_keeps_less(stack, key):
    def kept(remat):
        model = compiled(key, stack=stack, remat=remat)
        arrays, rest = eqx.partition(model, eqx.is_array)
        pull_back = jax.eval_shape(lambda arrays: jax.vjp(lambda a: eqx.combine(a, rest)(tokens()), arrays)[1], arrays)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back) if L in leaf.shape)

    assert 3 * kept(True) < kept(False)


@pytest.mark.parametrize("init", [DefaultInit(), *map(slow, (S5Init(), GPT2Init()))])
def test_initialisers_know_the_depth_of_a_stack(init, key):
    """Each layer of a stack is drawn for itself, and the ends of branches for the whole depth."""
    stacked, plain = (compiled(key, conv, stack=stack, init=init) for stack in (True, False))
    assert_close(unstack(stacked), plain, 1e-6)


@pytest.mark.slow
def test_casts_and_masks_reach_into_a_stack(key):
    stacked, plain = (compiled(key, stack=stack) for stack in (True, False))
    cast = lambda model: nn.cast(model, jnp.bfloat16)
    assert_close(unstack(cast(stacked)), cast(plain), 1e-2)
    mask = nn.recurrence_mask(stacked.backbone.blocks)
    assert jax.tree.leaves(mask) == jax.tree.leaves(nn.recurrence_mask(plain.backbone.blocks[0]))
    assert any(jax.tree.leaves(mask))
