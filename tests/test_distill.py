"""Long convolutions as small state-space models: what is exact, what is reported, whole models; and `ModalSSM` beyond
the law."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import drawn, on_device, quick_jit, relative_error, slow

from s5eqx import nn
from s5eqx.distill import distill, distill_model
from s5eqx.models import LanguageModel

ORDER, K = 4, 120


def taps(poles, residues, length=K):
    return np.sum(residues * poles ** np.arange(length)[:, None], axis=-1).real


def modes(seed, smallest=0.3, largest=0.999):
    rng = np.random.default_rng(seed)
    poles = rng.uniform(smallest, largest, ORDER) * np.exp(1j * rng.uniform(0.05, 3.1, ORDER))
    return poles, rng.standard_normal(ORDER) + 1j * rng.standard_normal(ORDER)


EXACT = {f"complex_{seed}": taps(*modes(seed)) for seed in range(5)}
EXACT |= {
    "real": taps(np.array([0.9, -0.5, 0.3, 0.99]), modes(5)[1]),
    "real_and_complex": taps(np.array([0.9, -0.5, 0.3 + 0.5j, 0.99j]), modes(6)[1]),
    "on_the_circle_almost": taps(np.exp(-1e-6 + 1j * np.array([0.1, 0.5, 2.0, 3.0])), modes(7)[1]),
    "fewer": taps(np.array([0.8 + 0.1j]), np.array([1 - 1j])),
    "small": 1e-20 * taps(*modes(8)),
    "zero": np.zeros(K),
    "constant": np.full(K, -2.5),
    "alternating": (-1.0) ** np.arange(K),
    "first_sample_alone": np.eye(K)[0],
}


def test_a_kernel_of_this_order_comes_out_exactly(dtype):
    h = np.stack(list(EXACT.values()), axis=1).astype(dtype)
    ssm, errors = distill(h, ORDER, steps=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(ssm)} == {dtype}
    assert np.max(np.abs(ssm.poles())) < 1
    for name, error in zip(EXACT, errors, strict=True):
        assert error <= (1e-11 if dtype == np.float64 else 2e-5), name
    if dtype == np.float32:
        return
    used = np.count_nonzero(np.any(np.asarray(ssm.R)[0] != 0, axis=-1), axis=-1)
    expected = {"zero": 0, "first_sample_alone": 0, "constant": 1, "alternating": 1, "fewer": 1, "real": ORDER}
    assert {name: int(n) for name, n in zip(EXACT, used, strict=True) if name in expected} == expected


@pytest.mark.smoke
def test_delays(x64):
    """They have no such form; it comes as near as double precision allows."""
    _, errors = distill(np.eye(K)[:, 1:8], ORDER, steps=0)
    assert np.max(errors) < 3e-8


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_short_kernels(length, x64):
    """With as many modes as taps after the first, whatever they are."""
    h = taps(*modes(length, largest=0.9), length)[:, None]
    ssm, errors = distill(h, ORDER, steps=0)
    assert errors < 1e-12
    np.testing.assert_allclose(np.asarray(impulse_response(ssm, 5))[:length], h, rtol=0, atol=1e-12)


@quick_jit
def impulse_response(mixer, length):
    width = len(mixer.poles()) if isinstance(mixer, nn.ModalSSM) else mixer.kernel.shape[-1]
    return mixer(jnp.zeros((length, width)).at[0].set(1))


@quick_jit
def hyena_filter(key):
    """As after training: smoother than a random network is."""
    bank = nn.ImplicitFilter(7, K, filter_width=16, key=key)
    weights = lambda bank: [layer.weight for layer in bank.layers]
    (conv,) = eqx.tree_at(weights, bank, [weight / 2 for weight in weights(bank)]).operators()
    return conv


@pytest.mark.parametrize("steps", [slow(0), 40])
def test_the_reported_error_is_the_measured_one(steps, key, x64):
    conv = hyena_filter(key)
    ssm, errors = distill(conv.kernel, ORDER, skip=conv.skip, steps=steps)
    wrong = np.asarray(impulse_response(ssm, K)) - np.asarray(impulse_response(conv, K))
    measured = np.linalg.norm(wrong, axis=0) / np.linalg.norm(conv.kernel, axis=0)
    np.testing.assert_allclose(measured, errors, rtol=1e-9)
    np.testing.assert_allclose(wrong[0], 0, atol=1e-12)
    assert np.all(errors > 1e-4)


def test_more_modes_and_gradient_steps_are_nearer(key, x64):
    h = np.array(hyena_filter(key).kernel)
    h[:, 4:] = np.stack([EXACT["real"], EXACT["zero"], 1.05 ** np.arange(K)], axis=1)
    two, closed, eight = (distill(h, order, steps=0)[1] for order in (2, ORDER, 8))
    assert np.all(closed[:4] < 0.8 * two[:4]) and np.all(eight[:4] < 0.7 * closed[:4])
    _, refined = distill(h, ORDER, steps=40)
    assert np.all(refined <= closed)
    assert np.all(refined[:4] < 0.99 * closed[:4])
    assert refined[4] < 1e-11 and refined[5] == 0


def test_many_taps_and_channels_that_decay_at_different_rates():
    """Longer than a block of rows, by a length that is no power of two."""
    h = np.stack([taps(*modes(seed, 0.999, 0.9999), 3001) for seed in range(2)], axis=1)
    _, errors = distill(h.astype(np.float32), ORDER, steps=0)
    assert np.max(errors) < 1e-4


def test_outputs_of_a_channel_share_its_poles(key, x64):
    shared = [modes(seed)[0] for seed in range(2)]
    kernel = np.array([[taps(poles, modes(2 * c + d)[1]) for d, poles in enumerate(shared)] for c in range(3)])
    conv = drawn(lambda key: nn.SquashedConvolution(2, K, channels=3, lam=0.0, dropout=0.5, key=key), key)
    conv = eqx.tree_at(lambda conv: conv.kernel, conv, on_device(kernel))
    ssm, errors = distill_model(conv, ORDER, steps=0)
    assert errors.keys() == {""} and errors[""].shape == (6,)
    x = np.random.default_rng(0).standard_normal((K, 2))
    expected = quick_jit(eqx.nn.inference_mode(conv))(x)
    assert relative_error(quick_jit(ssm)(x), expected) < 1e-11
    _, alone = distill(kernel[1].T, 1, steps=0)
    _, together = distill_model(conv, 1, steps=0)
    assert np.all(together[""][2:4] >= alone - 1e-12)  # poles that serve three outputs serve one less well


def language_model(key, **options):
    mixer = lambda key: nn.hyena(4, 32, order=3, filter_width=8, key=key)
    return LanguageModel(7, 4, mixer, num_layers=2, mlp_width=4, key=key, **options)


def logits(model, tokens):
    return quick_jit(lambda model, tokens: model(tokens))(model, tokens)


@pytest.mark.slow
def test_language_model(key, x64):
    """As near to the original as the report says, exact in chunks and steps, and without a longest sequence."""
    model, tokens = language_model(key), jr.randint(key, (32,), 0, 7, jnp.int32)
    expected = logits(model, tokens)
    far, near = (distill_model(model, order, steps=0) for order in (10, 16))
    paths = {f".backbone.blocks[{i}].mixer.bank.mixers[{n}]" for i in range(2) for n in range(2)}
    assert far[1].keys() == near[1].keys() == paths
    worst = [max(map(np.max, errors.values())) for _, errors in (far, near)]
    wrong = [relative_error(logits(distilled, tokens), expected) for distilled, _ in (far, near)]
    assert worst[0] > 1e-3 and worst[1] < 1e-9
    assert 1e-2 * worst[0] < wrong[0] < 10 * worst[0] and wrong[1] < 1e-9

    @quick_jit
    def streamed(model, tokens):
        state, first = model.prefill(model.init_state(), tokens[:20])
        _, rest = jax.lax.scan(lambda state, token: model.step(state, token), state, tokens[20:])
        return jnp.concatenate([first, rest])

    tokens = jr.randint(key, (50,), 0, 7, jnp.int32)
    distilled, _ = far
    np.testing.assert_allclose(streamed(distilled, tokens), logits(distilled, tokens), atol=1e-12)
    assert nn.takes_reset(distilled)


@pytest.mark.slow
def test_stack(key, x64):
    plain, stacked = (distill_model(language_model(key, stack=stack), 3, steps=0) for stack in (False, True))
    assert isinstance(stacked[0].backbone.blocks, nn.Stack)
    assert stacked[1].keys() == plain[1].keys()
    for path, errors in plain[1].items():
        np.testing.assert_allclose(stacked[1][path], errors, rtol=1e-6)
    tokens = jr.randint(key, (20,), 0, 7, jnp.int32)
    np.testing.assert_allclose(logits(stacked[0], tokens), logits(plain[0], tokens), atol=1e-9)


@pytest.mark.parametrize(
    ("build", "paths"),
    [
        slow(lambda key: nn.hyena(6, 16, num_heads=3, filter_width=8, key=key), {".bank.mixers[0]": 3}),
        (lambda key: nn.h3_conv(6, 16, kernel_dropout=0.0, key=key), {".shift": 6, ".ssm": 6}),
        slow(lambda key: nn.LongConv(6, 16, channels=2, key=key), {".conv": 12}),
    ],
)
def test_layers(build, paths, key, x64):
    """With half as many modes as taps, any kernel comes out."""
    layer = drawn(build, key)
    distilled, errors = distill_model(layer, 8, steps=0)
    assert {path: len(error) for path, error in errors.items()} == paths
    assert max(map(np.max, errors.values())) < 1e-9
    x = on_device(np.random.default_rng(0).standard_normal((16, 6)))
    assert relative_error(quick_jit(distilled)(x), quick_jit(layer)(x)) < 1e-9


def test_errors(key):
    h = np.ones((8, 2), np.float32)
    with pytest.raises(ValueError, match="order must be at least 1 and steps at least 0; got order=0"):
        distill(h, 0)
    with pytest.raises(ValueError, match="got order=2, steps=-1"):
        distill(h, 2, steps=-1)
    with pytest.raises(ValueError, match=r"kernel must be finite; got \[nan\] at tap 3 of channel 1"):
        distill(np.where(np.arange(16).reshape(8, 2) == 7, np.float32(np.nan), h), 2)
    with pytest.raises(ValueError, match=r"at least one tap and one channel; got shape \(0, 2\)"):
        distill(h[:0], 2)
    convolution = nn.Convolution(np.full((4, 2), np.inf, np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"the kernel at \.mixers\[0\] must be finite"):
        distill_model(nn.MixerBank((convolution,)), 2)
    for build in (lambda key: nn.S5(4, 4, key=key), lambda key: nn.BidirectionalLongConv(4, 8, key=key)):
        model = drawn(build, key)
        with pytest.raises(ValueError, match=f"must hold a long convolution: .* a {type(model).__name__} came"):
            distill_model(model, 2)


# ModalSSM


def test_initial_poles_and_residues(key):
    @quick_jit
    def initial(key):
        ring = nn.ModalSSM(40, 50, r_min=0.6, r_max=0.9, max_phase=0.5, key=key)
        return ring.poles(), nn.ModalSSM(40, 50, key=key).kernel(200)

    poles, kernel = map(np.asarray, initial(key))
    size, phase = np.abs(poles), np.angle(poles)
    assert 0.6 <= np.min(size) < 0.61 and 0.89 < np.max(size) <= 0.9
    assert abs(np.mean(size**2) - (0.36 + 0.81) / 2) < 0.01
    assert 0 <= np.min(phase) < 0.01 and 0.49 < np.max(phase) <= 0.5
    assert abs(np.mean(np.sum(kernel**2, axis=1)) - 1) < 0.15


@pytest.mark.smoke
def test_poles_and_residues_come_back(key, x64):
    poles = np.stack([np.append(modes(seed)[0], [0.0, -0.5]) for seed in range(2)])
    residues = np.stack([np.append(modes(seed)[1], [1.0, 2j]) for seed in range(4)]).reshape(2, 2, -1)
    ssm = nn.ModalSSM.from_poles(poles, residues, np.zeros((2, 2)))
    np.testing.assert_allclose(ssm.poles(), poles, atol=1e-15)
    kernel = np.sum(residues[:, None] * poles ** np.arange(9)[:, None, None], axis=-1).real
    np.testing.assert_allclose(quick_jit(ssm.kernel)(9), kernel, atol=1e-13)


@pytest.mark.parametrize("pole", [1.0, -1.5, 0.6 + 0.8j, np.nan])
def test_poles_that_do_not_decay_are_refused(pole):
    with pytest.raises(ValueError, match="inside the unit circle"):
        nn.ModalSSM.from_poles(np.array([[0.5, pole]], complex), np.ones((1, 1, 2), complex), np.zeros((1, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 0}, "positive"),
        ({"channels": 0}, "positive"),
        ({"r_max": 1.1}, "ring"),
        ({"r_min": 2.0}, "ring"),
    ],
)
def test_errors_of_the_modal_form(options, message, key):
    with pytest.raises(ValueError, match=message):
        nn.ModalSSM(3, **{"state_size": 2, **options}, key=key)
