"""Generation: the tokens and logits of the official models, of the parallel pass and of every other way to step."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import but_slow, quick_jit, slow
from jax import lax
from mixers import CASES, Case, D, V, build, language_model
from safari_fixture import Fixture

from s5eqx import generate as module
from s5eqx import models, nn
from s5eqx.generate import Generation, generate, stream
from s5eqx.samplers import Temperature

MODELS = ["lm_h3_hybrid", *map(slow, ("lm_hyena", "lm_h3", "lm_s4d", "lm_transformer"))]
GROUPS = {
    "convolutions": ["hyena_implicit_3", "hyena_heads", "long_conv"],
    "more convolutions": ["convolution", "hyena_implicit_2", "h3_conv"],
    "states": ["hyena_2", "h3_heads", "modal", "lru", "rg_lru", "short_conv_4"],
    "parts of these, attention": [
        *("s5_full_gelu", "s4d_shared", "shift_ssm", "mlp"),
        *("attention", "attention_rotary", "attention_window", "hyena_3_half_glu2"),
    ],
}
"""Mixers by what compiles together in one model."""


class Recorder:
    """A sampler that keeps what it is shown, by the key it is given."""

    def __init__(self, sampler):
        self.sampler, self.seen = sampler, {}

    def __call__(self, logits, key, t):
        def keep(bits, data):
            self.seen[data.tobytes()] = np.asarray(bits).reshape(-1).view(logits.dtype)

        # As bits: the thread that runs a callback may not be in double precision.
        jax.debug.callback(keep, lax.bitcast_convert_type(logits, jnp.uint32), jr.key_data(key))
        return self.sampler(logits, key, t)

    def logits(self, key, rows, steps):
        jax.effects_barrier()
        fold = jax.vmap(jax.vmap(lambda b, t: jr.fold_in(jr.fold_in(key, b), t), (None, 0)), (0, None))
        keys = np.asarray(jr.key_data(fold(jnp.arange(rows), jnp.arange(steps))))
        return np.stack([[self.seen[data.tobytes()] for data in row] for row in keys])


def shifted(logits, key, t):
    """The rule of the fixtures."""
    return (jnp.argmax(logits).astype(jnp.int32) + t) % len(logits)


@quick_jit
def by_steps(model, prompt, steps, *, prefill):
    """Tokens and logits of the fixtures' rule, the prompt read in parallel or step by step."""

    def one(prompt):
        def step(carry, t):
            state, logits = carry
            now = shifted(logits, None, t)
            return model.step(state, now), (now, logits)

        read = model.prefill if prefill else lambda state, prompt: lax.scan(model.step, state, prompt)
        state, logits = read(model.init_state(), prompt)
        return lax.scan(step, (state, logits[-1]), steps)[1]

    return jax.vmap(one)(prompt)


@pytest.mark.parametrize("way", ["by tiles", slow("after a prefill"), slow("by steps")])
@pytest.mark.parametrize("name", MODELS)
def test_official_generation(name, way, dtype, key):
    fixture = Fixture(name)
    model = fixture.load(fixture.params(dtype))
    prompt, tokens, expected = (fixture[f"gen/{part}"] for part in ("prompt", "tokens", "logits"))
    prompt, size = prompt.astype(np.int32), tokens.shape[1]
    if way == "by tiles":
        recorder = Recorder(shifted)
        got = generate(model, prompt, size, key=key, sampler=recorder).tokens
        logits = recorder.logits(key, *tokens.shape)
    else:
        got, logits = by_steps(model, prompt, jnp.arange(size, dtype=jnp.int32), prefill=way == "after a prefill")
    np.testing.assert_array_equal(got, tokens)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=(1e-4 if dtype == np.float32 else 1e-9) * scale)


@pytest.mark.parametrize("group", but_slow(GROUPS, "more convolutions", "states", "parts of these, attention"))
def test_the_parallel_pass_gives_the_same_logits(group, key, x64, monkeypatch):
    """For every mixer, prompts of different lengths, and tiles of all sizes."""
    monkeypatch.setattr(module, "BLOCK", 8)
    mixers = lambda key: tuple(CASES[name].build(key) for name in GROUPS[group])
    model = build(Case(lambda key: language_model(key, mixers(key))), key)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, n).astype(np.uint8) for n in (6, 9)]
    recorder, size = Recorder(Temperature(1.0)), 43
    out = generate(model, prompts, size, key=key, sampler=recorder)
    logits = recorder.logits(key, 2, size)
    assert len(np.unique(out.tokens)) == V
    for row, prompt in enumerate(prompts):
        whole = quick_jit(model)(jnp.asarray(np.concatenate([prompt, out.tokens[row]])))
        expected = np.asarray(whole)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=1e-10 * np.abs(expected).max())
        log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(expected)), out.tokens[row][:, None], axis=1)
        np.testing.assert_allclose(out.log_probs[row], log_probs[:, 0], atol=1e-10)


def test_every_mixer_is_in_a_group():
    types = {name: type(eqx.filter_eval_shape(case.build, jr.key(0))) for name, case in CASES.items()}
    wholes = {models.LanguageModel, models.Backbone, nn.Block, nn.Stack}
    assert {*types.values()} - wholes == {types[name] for group in GROUPS.values() for name in group}


@pytest.fixture(scope="module")
def hyena():
    """A model whose convolutions reach over several blocks, and lie in a stack."""
    layer = lambda key: nn.hyena(D, 256, key=key)
    return build(Case(lambda key: language_model(key, layer, num_layers=2, stack=True)), jr.key(0))


def test_a_row_is_what_it_is_alone(hyena, key):
    """In a batch, with longer and shorter prompts, streamed, and in parts of any size."""
    prompts = [np.arange(n) % V for n in (5, 12, 7)]
    size, sampler = 150, Temperature(0.7)
    rows = generate(hyena, prompts, size, key=key, sampler=sampler)
    alone = generate(hyena, prompts[0], size, key=key, sampler=sampler)
    np.testing.assert_array_equal(rows.tokens[0], alone.tokens)
    np.testing.assert_allclose(rows.log_probs[0], alone.log_probs, atol=1e-5)
    for row, prompt in enumerate(prompts):
        logits = np.asarray(quick_jit(hyena)(jnp.asarray(np.concatenate([prompt, rows.tokens[row]]))))
        log_probs = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 : -1]
        log_probs = np.take_along_axis(log_probs, rows.tokens[row][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(rows.log_probs[row], log_probs, atol=1e-4)
    for every in (1, 7, 100):
        tokens, log_probs = zip(*stream(hyena, prompts[0], 80, key=key, sampler=sampler, every=every), strict=True)
        np.testing.assert_array_equal(tokens, alone.tokens[:80])
        np.testing.assert_allclose(log_probs, alone.log_probs[:80], atol=1e-6)
    assert {len(set(row.tolist())) for row in rows.tokens} == {V}
    other = generate(hyena, prompts[0], size, key=jr.key(1), sampler=sampler)
    assert (other.tokens != alone.tokens).any()


def test_stop(hyena, key):
    """A row ends with its first stop token; the others go on; nothing is computed when all have ended."""
    prompts = [np.arange(n) % V for n in (5, 12, 7)]
    free = generate(hyena, prompts, 150, key=key, sampler=Temperature(0.7))
    for stop in (3, (2, 5)):
        out = generate(hyena, prompts, 150, key=key, sampler=Temperature(0.7), stop=stop)
        for row in range(3):
            length = 1 + int(np.argmax(np.isin(free.tokens[row], stop)))
            assert out.lengths[row] == length < 64
            np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
            np.testing.assert_allclose(out.log_probs[row, :length], free.log_probs[row, :length], atol=1e-6)
            assert (out.tokens[row, length:] == out.tokens[row, length - 1]).all()
            assert (out.log_probs[row, length:] == 0).all()
        streamed = list(stream(hyena, prompts[0], 150, key=key, sampler=Temperature(0.7), stop=stop, every=9))
        assert [token for token, _ in streamed] == out.tokens[0, : out.lengths[0]].tolist()
    np.testing.assert_array_equal(free.lengths, 150)


def test_one_program_for_all(hyena, key):
    """For any number of tokens, prompt, key and stop token."""

    @eqx.debug.assert_max_traces(max_traces=1)
    def sampler(logits, key, t):
        return jr.categorical(key, logits).astype(jnp.int32)

    reads = eqx.debug.get_num_traces(sampler)
    for length, size, stop in ((5, 3, None), (8, 70, 2), (23, 150, 3)):
        generate(hyena, np.arange(length) % V, size, key=jr.key(length), sampler=sampler, stop=stop)
    assert eqx.debug.get_num_traces(sampler) == reads + 1


def test_the_clock_is_not_mapped(hyena, key, monkeypatch):
    """Of the tiles of a block, a step of four rows runs one."""
    programs, advance = [], module._advance

    def keep(fixed, carry):
        programs.append(advance.lower(fixed, carry).lowered.compile().as_text())
        return advance(fixed, carry)

    monkeypatch.setattr(module, "_advance", keep)
    generate(hyena, np.zeros((4, 3), int), 2, key=key)
    assert re.search(r"\bconditional\(", programs[0])


@pytest.mark.smoke
def test_a_model_that_is_no_language_model(key):
    """Any causal mixer from tokens to logits: here one without a state."""

    class Successor(nn.AbstractCausalMixer):
        recurrence, resets = (), True

        def __call__(self, x, *, reset=None, key=None):
            return jax.nn.one_hot((x + 1) % V, V)

        def init_state(self):
            return ()

        def prefill(self, state, x, *, reset=None, key=None):
            return state, self(x)

        def step(self, state, x_t, *, reset=None, key=None):
            return state, self(x_t)

    out = generate(Successor(), np.array([[1], [4]]), 5, key=key)
    np.testing.assert_array_equal(out.tokens, [[2, 3, 4, 5, 6], [5, 6, 0, 1, 2]])
    assert isinstance(out, Generation)


def test_bad_input(hyena, key):
    ask = lambda prompt=(1, 2), size=3, model=hyena, **options: generate(
        model, np.array(prompt), size, key=key, **options
    )
    of = lambda mixer, **options: build(Case(lambda key: language_model(key, mixer, **options)), key)
    positions = of(lambda key: nn.ShortConv(D, 2, key=key), num_layers=1, max_length=9)
    attention = of(lambda key: nn.Attention(D, max_length=8, key=key), num_layers=1)
    stack = of(lambda key: nn.hyena(D, 12, key=key), num_layers=2, stack=True)
    ask((1, 2), 7, positions)
    refused = [
        (lambda: ask(np.zeros(0, int)), r"at least one token; got shapes \[\(0,\)\]"),
        (lambda: generate(hyena, [], 3, key=key), r"at least one token"),
        (lambda: generate(hyena, [[1, 2], [1.0]], 3, key=key), "token of prompt must be an integer; got float64"),
        (lambda: ask(stop=(1, 2.5)), "token of stop must be an integer; got float64"),
        (lambda: generate(hyena, [np.ones(2, int), np.zeros(0, int)], 3, key=key), r"shapes \[\(2,\), \(0,\)\]"),
        (lambda: ask((1, V)), rf"token of prompt must lie in \[0, {V}\); got {V}"),
        (lambda: ask((-1,)), rf"token of prompt must lie in \[0, {V}\); got -1"),
        (lambda: ask(stop=V), rf"token of stop must lie in \[0, {V}\); got {V}"),
        (lambda: ask(stop=(0, -2)), rf"token of stop must lie in \[0, {V}\); got -2"),
        (lambda: ask(size=0), "num_tokens must be at least 1; got 0"),
        (lambda: ask((1, 2), 255), "at most 256 tokens; got a prompt of 2 and num_tokens=255"),
        (lambda: ask((1, 2), 8, positions), "at most 9 tokens; got a prompt of 2 and num_tokens=8"),
        (lambda: ask((1, 2), 7, attention), "at most 8 tokens; got a prompt of 2 and num_tokens=7"),
        (lambda: ask((1, 2), 11, stack), "at most 12 tokens; got a prompt of 2 and num_tokens=11"),
        (lambda: stream(hyena, np.ones(2, int), 3, key=key, every=0), "every is the number .* got 0"),
        (lambda: stream(hyena, [[1, 2], [3]], 3, key=key), "one prompt, .* got 2 of them"),
        (lambda: stream(hyena, np.ones(2, int), 300, key=key), "at most 256 tokens"),
        (lambda: jax.jit(lambda prompt: generate(hyena, prompt, 3, key=key))(jnp.ones(2, int)), "outside jax.jit"),
        (lambda: jax.jit(lambda key: generate(hyena, [1], 3, key=key))(key), "outside jax.jit"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("every", [slow(1), 6])
def test_failures(hyena, key, every):
    """Which token; what came before it is not lost in a stream."""
    nan = eqx.tree_at(lambda model: model.embedding, hyena, hyena.embedding.at[3].set(jnp.nan))
    for model, sampler, error, message, before in (
        (
            hyena,
            lambda logits, key, t: jnp.where(t == 2, V, t),
            ValueError,
            r"it drew 7 as token 2 .*\(row 0\)",
            [0, 1],
        ),
        (hyena, lambda logits, key, t: t - 1, ValueError, r"it drew -1 as token 0 .*\(row 0\)", []),
        (
            nan,
            lambda logits, key, t: t,
            FloatingPointError,
            r"logits of token 0 after the prompt \(row 0\) are NaN",
            [],
        ),
    ):
        seen = []
        with pytest.raises(error, match=message):
            for token, _ in stream(model, [1], 6, key=key, sampler=sampler, every=every):
                seen.append(token)
        assert seen == before
    for draws in (lambda logits, key, t: 0.5, lambda logits, key, t: logits.astype(int)):
        with pytest.raises(ValueError, match="must return one integer"):
            generate(hyena, [1], 6, key=key, sampler=draws)
    # Of several rows, the first that fails.
    late = lambda logits, key, t: jnp.where(t == 5, V, t)
    with pytest.raises(ValueError, match=r"it drew 7 as token 5 after the prompt \(row 1\)"):
        generate(hyena, [[1, 2, 3], [4]], 7, key=key, sampler=late)
