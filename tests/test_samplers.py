"""Samplers against probabilities computed in numpy: what is kept, what is drawn, and what they refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_jit

from s5eqx.samplers import AbstractSampler, Chain, Greedy, MinP, Temperature, TopK, TopP

PROBS = np.array([0.08, 0.3, 0.02, 0.3, 0.0, 0.2, 0.1])
LOGITS = np.where(PROBS > 0, np.log(np.maximum(PROBS, 1e-9)) + 3, -np.inf)
INF = np.inf


@quick_jit
def filtered(sampler, logits):
    return sampler.filter(logits)


@quick_jit
def draws(sampler, logits, key, number):
    return jax.vmap(lambda key: sampler(logits, key, jnp.int32(0)))(jr.split(key, number))


def nucleus(probs, p):
    """Which tokens are kept, by a sort, in double precision."""
    order = np.argsort(-probs, kind="stable")
    number = 1 + np.searchsorted(np.cumsum(probs[order]), p - 1e-12)
    return np.isin(np.arange(len(probs)), order[:number])


def warmed(temperature):
    return PROBS ** (1 / temperature) / np.sum(PROBS ** (1 / temperature))


def only(*tokens, of=PROBS):
    return np.where(np.isin(np.arange(len(of)), tokens), of, 0.0)


@pytest.mark.parametrize(
    "sampler, probs",
    [
        (Chain(), PROBS),
        (Temperature(0.5), warmed(0.5)),
        (Temperature(2.0), warmed(2.0)),
        (Temperature(0.0), only(1)),
        (TopK(3), only(1, 3, 5)),
        (TopP(0.75), only(1, 3, 5)),
        (MinP(0.3), only(1, 3, 5, 6)),
        # At this temperature the nucleus has one token more than it has at 1, and the last filter drops another.
        (Chain(Temperature(2.0), TopK(5), TopP(0.75), MinP(0.6)), only(1, 3, 5, of=warmed(2.0))),
        (Chain(TopP(0.75), Chain(Temperature(2.0))), only(1, 3, 5, of=warmed(2.0))),
    ],
)
def test_draws(sampler, probs, key):
    number = 20_000
    tokens = draws(sampler, np.float32(LOGITS), key, number)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(tokens, minlength=len(PROBS))
    assert np.all(counts[probs == 0] == 0), "what is dropped is never drawn"
    expected = number * probs[probs > 0] / probs.sum()
    # One in ten thousand fair draws of as many tokens is worse, for any number of them up to seven.
    assert np.sum((counts[probs > 0] - expected) ** 2 / expected) < 28


def test_greedy_takes_the_first_of_equals(key):
    logits = np.array([-INF, 2.0, 3.0, 3.0], jnp.bfloat16)
    for token in quick_jit(lambda: [draw(logits, key, jnp.int32(5)) for draw in (Greedy(), Temperature(0.0))])():
        assert int(token) == 2 and token.dtype == jnp.int32


def kept(sampler, logits):
    """The tokens that are kept, none of whose logits may have changed."""
    result = np.asarray(filtered(sampler, np.asarray(logits, np.float32)))
    stays = result > -INF
    np.testing.assert_array_equal(result[stays], np.float32(logits)[stays])
    return list(np.flatnonzero(stays))


@pytest.mark.smoke
def test_top_k_keeps_so_many_tokens():
    assert kept(TopK(2), [1.0, 5.0, 5.0, 5.0]) == [1, 2], "of equal ones the first"
    assert kept(TopK(3), [-INF, 1.0, -INF, 2.0]) == [1, 3]
    assert kept(TopK(1), [0.0, 0.0]) == [0]
    assert kept(TopK(9), [0.0, 4.0, -300.0]) == [0, 1, 2]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "p, logits, expected",
    [
        (0.5, [0.0, 0.0, 0.0, 0.0], [0, 1]),
        (0.51, [0.0, 0.0, 0.0, 0.0], [0, 1, 2]),
        (0.6, np.log([0.1, 0.5, 0.2, 0.2]), [1, 2]),
        (1e-9, [0.0, 1.0, 1.0, 0.5], [1]),
        (1.0, [0.0, 9.0, -200.0, -INF], [0, 1, 2]),
        (0.9, [-INF, 2.0, -INF, -INF], [1]),
        (0.9, [0.0, 0.0, 200.0, 0.0], [2]),
    ],
)
def test_the_nucleus_by_hand(p, logits, expected):
    assert kept(TopP(p), logits) == expected


@pytest.mark.smoke
@pytest.mark.parametrize("p, expected", [(0.0, [0, 1, 2, 3]), (0.2, [0, 2, 3]), (0.5, [0, 2]), (1.0, [0, 2])])
def test_min_p_by_hand(p, expected):
    assert kept(MinP(p), [1000.0, 998.0, 1000.0, 999.0]) == expected


def test_the_nucleus_of_many_tokens(dtype):
    """One filter for each p, mapped over; with coarse logits, so that most tokens have equals."""
    rng = np.random.default_rng(0)
    logits = np.round(4 * rng.standard_normal(1000)).astype(dtype) / 2
    levels = np.array([0.003, 0.1, 0.33, 0.5, 0.9, 0.99, 0.9999])
    filters = jax.tree.map(lambda *numbers: np.stack(numbers), *[TopP(p) for p in levels])
    results = quick_jit(jax.vmap(lambda sampler: sampler.filter(logits)))(filters)
    assert results.dtype == dtype
    probs = np.exp(logits.astype(np.float64)) / np.sum(np.exp(logits.astype(np.float64)))
    for p, result in zip(levels, np.asarray(results), strict=True):
        np.testing.assert_array_equal(result > -INF, nucleus(probs, p))


def test_a_temperature_divides_the_logits(x64):
    logits = np.array([1.0, -2.0, -INF, 3.0])
    np.testing.assert_allclose(filtered(Temperature(0.7), logits), (logits - 3.0) / 0.7, rtol=1e-14)
    cold, hot = (np.asarray(filtered(Temperature(t), logits.astype(np.float32))) for t in (1e-40, 3e38))
    assert cold[3] == 0 and np.all(cold[:3] < -1e37), "float32 has no such number"
    np.testing.assert_allclose(hot, [0, 0, -INF, 0], atol=1e-37)


def test_bfloat16_is_computed_in_float32():
    samplers = Chain(), Temperature(0.7), TopK(2), TopP(0.75), MinP(0.3)
    narrow = LOGITS.astype(jnp.bfloat16)
    filtered = quick_jit(lambda logits: [sampler.filter(logits) for sampler in samplers])
    for result, expected in zip(filtered(narrow), filtered(narrow.astype(np.float32)), strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)


def test_the_same_key_draws_the_same_and_another_number_is_no_other_program(key):
    traces = []

    @eqx.filter_jit
    def draw(sampler, logits, key):
        traces.append(sampler)
        return jax.vmap(sampler, (0, 0, None))(logits, jr.split(key, 50), jnp.int32(0))

    logits = np.zeros((50, 7), np.float32)
    chain = lambda temperature, p: Chain(Temperature(temperature), TopP(p), MinP(p / 9))
    first = draw(chain(1.0, 1.0), logits, key)
    np.testing.assert_array_equal(draw(chain(1.0, 1.0), logits, key), first)
    assert len(np.unique(first)) > 3 and len(np.unique(draw(chain(1.0, 0.1), logits, key))) == 1
    assert not np.asarray(draw(chain(0.0, 1.0), logits, key)).any()
    assert len(traces) == 1


@pytest.mark.parametrize(
    "build, complaint",
    [
        (lambda: Temperature(-0.1), "at least 0, where 0 is greedy; got -0.1"),
        (lambda: Temperature(INF), "finite"),
        (lambda: Temperature(float("nan")), "got nan"),
        (lambda: TopK(0), "at least 1, the number of tokens to keep; got 0"),
        (lambda: TopP(0.0), r"\(0, 1\].*got 0.0"),
        (lambda: TopP(1.5), "got 1.5"),
        (lambda: TopP(float("nan")), "got nan"),
        (lambda: MinP(-0.5), r"\[0, 1\].*got -0.5"),
        (lambda: MinP(1.5), "got 1.5"),
    ],
)
def test_refused(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


def test_a_chain_is_of_filters():
    sampler: AbstractSampler = Greedy()
    with pytest.raises(Exception, match="Greedy"):
        Chain(sampler)
