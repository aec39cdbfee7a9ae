"""Generation: the tokens that a model goes on with, each drawn from what the parallel pass would give at its place.

A state-space model takes the same time for every token, attention what its cache takes. Long convolutions take
O(log^2 L) a token in the mean, most of it at a few of the tokens: all of a model share the tiles of
`s5eqx.ops.online_conv`, whose clock starts where the prompt ends.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from s5eqx import ops
from s5eqx._prompts import Prompt, check_request, is_batch, read_prompts, read_stop, refuse_tracers
from s5eqx._typing import Array, Bool, Float, Int, Integer, PRNGKeyArray, PyTree, checked
from s5eqx.models._pieces import each_row
from s5eqx.nn import AbstractCausalMixer, materialise
from s5eqx.nn._tiles import get_row, in_tiles, lay_tape, set_row
from s5eqx.ops.online_conv import BLOCK
from s5eqx.samplers import Greedy

Sampler = Callable[[Float[Array, " V"], PRNGKeyArray, Int[Array, ""]], Int[Array, ""]]


class Generation(NamedTuple):
    """What `generate` returns, on the host. Without a batch there is no `B`.

    - `tokens`: after a stop token, that token again.
    - `log_probs`: of each token under the model itself, whatever the sampler, in nats; 0 after a stop token.
    - `lengths`: how many tokens there are up to a stop token, this one included.
    """

    tokens: Int[np.ndarray, "*B T"]
    log_probs: Float[np.ndarray, "*B T"]
    lengths: Int[np.ndarray, "*B"]


class Token(NamedTuple):
    """What `stream` yields. The log-probability is that under the model itself, in nats."""

    token: int
    log_prob: float


@checked
def generate(
    model: AbstractCausalMixer,
    prompt: Prompt,
    num_tokens: int,
    *,
    key: PRNGKeyArray,
    sampler: Sampler = Greedy(),
    stop: int | Sequence[Any] | None = None,
) -> Generation:
    """`num_tokens` tokens that follow each prompt.

    **Arguments:**

    - `model`: a `LanguageModel`, or another causal mixer from tokens to logits. It runs in inference mode.
    - `prompt`: a sequence of tokens, a batch of such, or a list of sequences that may differ in length.
    - `num_tokens`: after each prompt; prompt and tokens together must not be longer than the model takes.
    - `key`: row `b` draws token `t` with `fold_in(fold_in(key, b), t)`.
    - `sampler`: `sampler(logits, key, t) -> token`, `t` counted from the end of the prompt; see `s5eqx.samplers`.
    - `stop`: a token, or several, that end a row. When all rows have ended, the rest is not computed.

    The common part of the prompts is read in parallel, in pieces whose lengths are powers of two; then each row goes on
    with its own, token by token. Programs are compiled for each of these lengths and for the step, and for long
    convolutions one for each size of tile, for each power of two that `num_tokens` is rounded up to. They serve all
    prompts, keys and numbers of tokens; not another number of rows. The loop over them runs on the host, so it cannot
    be inside `jax.jit` or `jax.vmap`. Implicit filters are evaluated in each call: `s5eqx.nn.materialise` does it once.

    **Raises:** `ValueError` for a prompt or settings that the model cannot take and for a sampler that draws no token,
    `FloatingPointError` where logits are NaN.

    Source: for long convolutions Oncescu et al., "Flash Inference" (arXiv 2410.12982).
    """
    rows, stops = read_prompts(prompt), read_stop(stop)
    pieces = list(_run(model, rows, num_tokens, key, sampler, stops, every=BLOCK))
    tokens, log_probs = (np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True))
    starts = [len(row) - min(map(len, rows)) for row in rows]
    rest = (0, 0), (0, max(starts) + num_tokens - tokens.shape[1])  # where all rows have ended before
    own = lambda a: np.stack([row[start : start + num_tokens] for row, start in zip(a, starts, strict=True)])
    tokens, log_probs = own(np.pad(tokens, rest, "edge")), own(np.pad(log_probs, rest))
    ended = np.isin(tokens, stops)
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, num_tokens)
    out = Generation(tokens, log_probs, lengths)
    return out if is_batch(prompt) else Generation(*(a[0, ...] for a in out))


@checked
def stream(
    model: AbstractCausalMixer,
    prompt: Integer[Array, " L"] | Sequence[Any],
    num_tokens: int,
    *,
    key: PRNGKeyArray,
    sampler: Sampler = Greedy(),
    stop: int | Sequence[Any] | None = None,
    every: int = 1,
) -> Iterator[Token]:
    """The tokens of `generate` for one prompt, one by one as they come; the last one is the stop token, if one comes.

    **Arguments:** those of `generate`, and `every`, how many tokens are computed at a time: more are faster, and each
    waits for the others.
    """
    if every < 1:
        raise ValueError(f"every is the number of tokens that are computed at a time, at least 1; got {every}.")
    if is_batch(prompt):
        raise ValueError(f"stream takes one prompt, a sequence of tokens; got {len(prompt)} of them. Use generate.")
    stops = read_stop(stop)
    return _one_by_one(_run(model, read_prompts(prompt), num_tokens, key, sampler, stops, every=every), stops)


def _one_by_one(pieces, stop):
    for tokens, log_probs in pieces:
        for token, log_prob in zip(tokens[0].tolist(), log_probs[0].tolist(), strict=True):
            yield Token(token, log_prob)
            if token in stop:
                return


class _Carry(eqx.Module):
    """What goes from step to step, for all rows: `t` counts tokens from the end of a row's prompt, `token` is the last
    one drawn, `failed` the `t` at which logits were NaN or no token was drawn, or -1."""

    state: PyTree[Array]
    slots: Float[Array, "B K C"]
    t: Int[Array, " B"]
    token: Int[Array, " B"]
    ended: Bool[Array, " B"]
    failed: Int[Array, " B"]


def _run(model, rows, num_tokens, key, sampler, stop, every):
    """Checks what is asked, at once. The iterator that it returns gives tokens and log-probabilities of all rows, those
    in the longer prompts too, at each step from the end of the common prompt."""
    model = materialise(eqx.nn.inference_mode(model))
    refuse_tracers((model, key))
    state, vocab_size = _start(model, len(rows))
    check_request(model, vocab_size, rows, num_tokens, stop)
    rows, stop = [row.astype(np.int32) for row in rows], stop.astype(np.int32)
    return _dispatch(model, vocab_size, state, rows, num_tokens, key, sampler, stop, every)


def _dispatch(model, vocab_size, state, rows, num_tokens, key, sampler, stop, every):
    lengths = np.array([len(row) for row in rows])
    shortest = lengths.min()
    steps = int(lengths.max() - shortest) + num_tokens
    state = _prefill(model, state, np.stack([row[: shortest - 1] for row in rows]))
    # The last common token is the first one that is stepped, with what follows it in longer prompts.
    given = np.zeros((len(rows), steps + BLOCK), np.int32)
    for line, row in zip(given, rows, strict=True):
        line[: len(row) - shortest + 1] = row[shortest - 1 :]
    starts = np.int32(lengths - shortest)
    carry, slots, kernel = _lay_tapes(model, -starts, state, max(BLOCK, 1 << (steps - 1).bit_length()), BLOCK)
    keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, jnp.arange(len(rows), dtype=jnp.int32))
    room = 1 << max(len(stop) - 1, 0).bit_length()  # not a program for each number of them
    stop = np.pad(stop, (0, room - len(stop)), constant_values=-1)
    fixed = model, sampler, kernel[:, :BLOCK].T, keys, stop
    spectra = {}
    for done in range(0, steps, BLOCK):
        if done and len(kernel):
            size = done & -done
            if size not in spectra:
                spectra[size] = _spectrum(kernel, size)
            slots, block = _end_block((spectra[size], np.int32(done)), slots, carry.slots)
            carry = eqx.tree_at(lambda carry: carry.slots, carry, block)
        for first in range(0, min(BLOCK, steps - done), every):
            last = min(first + every, BLOCK, steps - done)
            now = given[:, done : done + BLOCK], np.int32(first), np.int32(last), np.int32(num_tokens)
            carry, tokens, log_probs = _advance((*fixed, *now), carry)
            ended, failed, tokens, log_probs = jax.device_get((carry.ended, carry.failed, tokens, log_probs))
            until = np.where(failed < 0, last, starts + failed - done)
            row = int(np.argmin(until))
            yield tokens[:, first : until[row]], log_probs[:, first : until[row]]
            if failed[row] >= 0:
                _fail(row, failed[row], tokens[row, until[row]], vocab_size)
            if ended.all():
                return


@eqx.filter_jit
def _start(model, num_rows):
    """The empty states, and the size of the vocabulary."""
    state = model.init_state()
    logits = jax.eval_shape(lambda state: model.step(state, jnp.zeros((), jnp.int32))[1], state)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (num_rows, *a.shape)), state), logits.shape[0]


def _prefill(model, state, tokens):
    """The states after the common prompt, in pieces of all the powers of two in its length, the largest first."""
    start = 0
    for exponent in reversed(range(tokens.shape[1].bit_length())):
        if tokens.shape[1] >> exponent & 1:
            state = _read((model, tokens[:, start : start + (1 << exponent)]), state)
            start += 1 << exponent
    return state


@eqx.filter_jit(donate="all-except-first")
def _read(model_and_tokens, state):
    model, tokens = model_and_tokens
    return each_row(lambda state, tokens: model.prefill(state, tokens)[0], state, tokens)


@eqx.filter_jit
def _lay_tapes(model, t, state, size, block):
    """What steps in tiles start from; for all steps to come what the prompt adds to them, and the kernels."""
    one = lambda t, state: lay_tape(model, state, jnp.zeros_like(t), size)
    _, _, kernel = one(t[0], jax.tree.map(lambda a: a[0], state))
    state, slots = each_row(lambda t, state: one(t, state)[:2], t, state)
    t = jnp.asarray(t)
    carry = _Carry(state, _block(slots, 0, block), t, jnp.zeros_like(t), t != t, jnp.full_like(t, -1))
    return carry, slots, kernel


@eqx.filter_jit(donate="all-except-first")
def _advance(fixed, carry):
    """The steps from `first` to `last` of a block. Tokens and log-probabilities stand where their steps do."""
    model, sampler, kernel, keys, stop, given, first, last, num_tokens = fixed

    def step(i, loop):
        carry, tokens, log_probs = loop
        fed = jnp.where(carry.t <= 0, given[:, i], carry.token)
        state, row, logits = jax.vmap(one)(carry.state, carry.slots[:, i], fed)
        slots = carry.slots
        if kernel.size:
            slots = ops.tile_in_block(slots.at[:, i].set(row), kernel, i)
        drawn = jax.vmap(draw)(logits, keys, jnp.maximum(carry.t, 0))
        token = jnp.where(carry.ended, carry.token, drawn)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        log_prob = jnp.where(carry.ended, 0, log_prob)
        counts = (carry.t >= 0) & ~carry.ended
        fails = jnp.any(jnp.isnan(logits), axis=1) | (token < 0) | (token >= logits.shape[1])
        failed = jnp.where(counts & fails & (carry.failed < 0), carry.t, carry.failed)
        ends = counts & (jnp.any(token[:, None] == stop[None], axis=1) | (carry.t + 1 >= num_tokens))
        carry = _Carry(state, slots, carry.t + 1, token, carry.ended | ends, failed)
        return carry, tokens.at[:, i].set(token), log_probs.at[:, i].set(log_prob.astype(log_probs.dtype))

    def one(state, row, token):
        state, logits = in_tiles(model, set_row(state, row), token, None)
        return state, get_row(state), logits.astype(np.promote_types(logits.dtype, np.float32))

    def draw(logits, key, t):
        token = jnp.asarray(sampler(logits, jr.fold_in(key, t), t))
        if token.shape or not jnp.issubdtype(token.dtype, jnp.integer):
            raise ValueError(f"A sampler must return one integer, a token; got {token.dtype}{list(token.shape)}.")
        return token.astype(jnp.int32)

    tokens = jnp.zeros(given.shape, jnp.int32)
    return lax.fori_loop(first, last, step, (carry, tokens, jnp.zeros(given.shape)))


@eqx.filter_jit
def _spectrum(kernel, size):
    return ops.tile_spectrum(kernel, size)


@eqx.filter_jit(donate="all-except-first")
def _end_block(fixed, slots, block):
    """The slots after `done` steps, of which `block` holds the last, and the next block."""
    spectrum, done = fixed
    slots = lax.dynamic_update_slice_in_dim(slots, block.swapaxes(1, 2), done - block.shape[1], axis=2)
    slots = ops.tile_of_blocks(slots, spectrum, done)
    return slots, _block(slots, done, block.shape[1])


def _block(slots, done, size):
    return lax.dynamic_slice_in_dim(slots, done, size, axis=2).swapaxes(1, 2)


def _fail(row, t, token, vocab_size):
    where = f"token {t} after the prompt (row {row})"
    if not 0 <= token < vocab_size:
        raise ValueError(f"A sampler must draw tokens in [0, {vocab_size}); it drew {token} as {where}.")
    raise FloatingPointError(f"The logits of {where} are NaN. Look for parameters that are not finite.")
