"""Long convolutions by matrix products, in three passes, in groups of channels: exact, differentiable, chosen."""

import functools
import time
from typing import ClassVar

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import jax.random as jr
import mixers
import numpy as np
import pytest
import test_mixer_law
from helpers import but_slow, on_device, quick_jit, slow
from jax.test_util import check_grads

from s5eqx import nn, ops
from s5eqx.ops import FFT, Chunked, Measured, Monarch, ThreePass

ALGORITHMS = [Monarch(2), Monarch(3), Monarch(4), ThreePass(2), ThreePass(7), Chunked(FFT(), 2), Measured(Monarch(2))]
every_algorithm = pytest.mark.parametrize("algorithm", but_slow(ALGORITHMS, Monarch(4), ThreePass(2)), ids=repr)


def drawn(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def by_definition(u, k):
    """`y[t] = sum_j k[j] u[t-j]`."""
    y = np.zeros_like(u)
    for j in range(min(len(k), u.shape[-2])):
        y[..., j:, :] += k[j] * u[..., : u.shape[-2] - j, :]
    return y


@pytest.mark.parametrize(
    "factors, length, taps",
    [
        ((1,), 1, 1),
        ((2,), 2, 1),
        ((7,), 7, 7),
        ((6, 4), 24, 24),
        ((5, 3), 11, 15),
        ((3, 2, 5), 30, 8),
        ((4, 3, 2, 2), 41, 48),
    ],
)
def test_circular(factors, length, taps, x64):
    """With the Fourier transform's blocks, against numpy's transform; inputs may be shorter than the period."""
    u, k = drawn((2, length, 3), (taps, 3))
    blocks = ops.dft_blocks(factors)
    size = np.prod(factors)
    exact = np.fft.irfft(np.fft.rfft(u, size, axis=-2) * np.fft.rfft(k, size, axis=-2), size, axis=-2)
    got = jax.jit(lambda u, k: ops.butterfly_conv(u, k, blocks, blocks))(u, k)
    np.testing.assert_allclose(got, exact[:, :length], rtol=0, atol=1e-12)


@every_algorithm
def test_causal(algorithm, x64):
    """Lengths about a power of two, kernels shorter and longer than the sequence, after a past."""
    sizes = [(1, 1, 0), (31, 31, 0), (64, 64, 0), (65, 9, 0), (9, 65, 0), (13, 20, 6)]
    problems = [drawn((2, past + length, 3), (taps, 3)) for length, taps, past in sizes]
    convolve = functools.partial(ops.causal_convolution, algorithm=algorithm)

    @jax.jit
    def program(problems):
        return [
            convolve(inputs[:, past:], k, inputs[:, :past] if past else None)
            for (inputs, k), (_, _, past) in zip(problems, sizes, strict=True)
        ]

    for got, (inputs, k), (_, _, past) in zip(program(problems), problems, sizes, strict=True):
        np.testing.assert_allclose(got, by_definition(inputs, k)[:, past:], rtol=0, atol=1e-11)


@every_algorithm
def test_empty(algorithm):
    for length, taps in ((0, 3), (3, 0)):
        y = ops.causal_convolution(jnp.ones((length, 2)), jnp.ones((taps, 2)), algorithm=algorithm)
        np.testing.assert_array_equal(y, np.zeros((length, 2)))


@pytest.mark.parametrize("shape, taps", [((0, 2), 3), ((2, 0), 3), ((4, 2), 0), ((0, 4, 2), 3)])
def test_empty_blocks(shape, taps):
    blocks = ops.dft_blocks((4, 2), np.float32)
    y = ops.butterfly_conv(jnp.ones(shape), jnp.ones((taps, shape[-1])), blocks, blocks)
    np.testing.assert_array_equal(y, np.zeros(shape))


def test_three_passes_take_no_long_prime():
    """Whose transform would take several times as long."""
    shape = jax.ShapeDtypeStruct((65_528, 1), jnp.float32)  # 8,191 for each of 16 rows, were it not rounded up
    convolve = functools.partial(ops.causal_convolution, algorithm=ThreePass(16))
    assert "8192" in str(jax.make_jaxpr(convolve)(shape, shape))
    assert "8191" not in str(jax.make_jaxpr(convolve)(shape, shape))


@pytest.mark.smoke
@every_algorithm
def test_gradients(algorithm, x64):
    """Of input and kernel, and values where both are mapped."""
    u, k, g = drawn((23, 3), (17, 3), (23, 3))
    convolve = functools.partial(ops.causal_convolution, algorithm=algorithm)
    du, dk = jax.jit(lambda u, k: jax.vjp(convolve, u, k)[1](g))(u, k)
    np.testing.assert_allclose(du, by_definition(g[::-1], k)[::-1], rtol=0, atol=1e-11)
    correlation = [np.sum(g[j:] * u[: len(u) - j], axis=0) for j in range(len(k))]
    np.testing.assert_allclose(dk, correlation, rtol=0, atol=1e-11)
    us, ks = drawn((4, 23, 3), (4, 17, 3), seed=1)
    mapped = jax.jit(jax.vmap(convolve))(us, ks)
    np.testing.assert_allclose(mapped, [by_definition(*pair) for pair in zip(us, ks, strict=True)], rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [Monarch(3), Chunked(ThreePass(4), 2)], ids=repr)
def test_second_derivatives(algorithm, x64):
    u, k = (jnp.asarray(a) for a in drawn((23, 3), (17, 3)))
    convolve = functools.partial(ops.causal_convolution, algorithm=algorithm)
    check_grads(jax.jit(convolve), (u, k), order=2, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("algorithm", [FFT(), Monarch(2), Monarch(3), ThreePass(16)], ids=repr)
def test_float32_over_a_long_sequence(algorithm):
    u, k = drawn((50_021, 1), (50_021, 1))
    size = 1 << 17
    exact = np.fft.irfft(np.fft.rfft(u, size, axis=0) * np.fft.rfft(k, size, axis=0), size, axis=0)[: len(u)]
    convolve = jax.jit(functools.partial(ops.causal_convolution, algorithm=algorithm))
    y = convolve(u.astype(np.float32), k.astype(np.float32))
    assert y.dtype == jnp.float32
    assert np.abs(y - exact).max() < 2e-6 * np.abs(exact).max()


def uses_fft(function, *args):
    return "fft" in str(jax.make_jaxpr(function)(*args))


def test_layers_use_what_is_chosen(x64):
    """A jitted function is compiled anew, and steps agree with what the algorithm computes."""
    x = drawn((20, 4))[0]
    layer = helpers.drawn(lambda key: nn.S4D(4, 6, key=key), jr.key(0))
    call = jax.jit(lambda x: layer(x))
    steps = quick_jit(lambda x: jax.lax.scan(layer.step, layer.init_state(), x)[1])(x)
    with_fft = call(x)
    for already, algorithm in enumerate((Chunked(Monarch(2), 3), ThreePass(4)), start=1):
        with ops.use_convolution(algorithm):
            assert call._cache_size() == already
            y = call(x)
            np.testing.assert_allclose(y, steps, rtol=0, atol=1e-12)
            assert uses_fft(lambda x: layer(x), x) == isinstance(algorithm, ThreePass)
    assert call._cache_size() == 3
    np.testing.assert_array_equal(call(x), with_fft)
    assert uses_fft(lambda x: layer(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in mixers.CASES.items() if case.fft])
def test_the_law_of_a_mixer(name, key, x64):
    """Parallel, in chunks and step by step, with all gradients, of every layer that convolves."""
    with ops.use_convolution(Monarch(3)):
        test_mixer_law.test_chunks_and_steps_equal_the_whole(mixers.CASES[name], key, x64)


def temporaries(algorithm, channels):
    def program(u, k):
        y, pullback = jax.vjp(functools.partial(ops.causal_convolution, algorithm=algorithm), u, k)
        return y, pullback(y)

    shapes = [jax.ShapeDtypeStruct((4096, channels), jnp.float32)] * 2
    return jax.jit(program).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / (4096 * channels * 4)


@pytest.mark.parametrize("algorithm", [FFT(), Monarch(3)], ids=repr)
def test_groups_of_channels_bound_the_memory(algorithm):
    """Of value and gradient: what is put in groups and what comes out of them, and next to nothing beside."""
    assert temporaries(Chunked(algorithm, 1), 32) < 0.6 * temporaries(algorithm, 32)


class Slow(ops.AbstractConvAlgorithm):
    """Waits when it is run, and counts how often it is traced."""

    traced: ClassVar[list] = []

    def __call__(self, u, k, period):
        self.traced.append(u.shape)

        def late(a):
            time.sleep(0.02)
            return a

        last = jax.lax.stop_gradient(u[-1, -1])
        return FFT()(u, k, period) + jax.pure_callback(late, jax.ShapeDtypeStruct((), u.dtype), last)


@pytest.mark.parametrize("candidates", [(Slow(), Monarch(2)), slow((Monarch(2), Slow()))])
def test_measured_takes_the_fastest(candidates):
    """Once for each size, also under jit, grad and vmap."""
    measured = Measured(*candidates)
    u, k = (a.astype(np.float32) for a in drawn((3, 30, 2), (30, 2)))
    Slow.traced.clear()
    loss = lambda u, k: jnp.sum(ops.causal_convolution(u, k, algorithm=measured) ** 2)
    mapped = jax.jit(jax.vmap(jax.grad(loss), (0, None)))
    for _ in range(2):
        mapped(u, k)
    jax.eval_shape(jax.grad(loss), u[0], k)
    assert measured.fastest((30, 2), (30, 2), 59) == Monarch(2)
    assert Slow.traced == [(30, 2)]
    assert Measured().candidates == (FFT(), Monarch(2), Monarch(3))


@pytest.mark.smoke
def test_measured_is_for_one_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="give all of them the algorithm that `fastest` returned"):
        ops.causal_convolution(jnp.ones((4, 1)), jnp.ones((4, 1)), algorithm=Measured())


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Monarch(1), "at least 2; got 1"),
        (lambda: ThreePass(1), "at least 2; got 1"),
        (lambda: Chunked(FFT(), 0), "at least 1; got 0"),
        (lambda: ops.dft_blocks((4, 0)), r"at least 1; got \(4, 0\)"),
        (lambda: nn.ButterflyConv(0, 8, key=jr.key(0)), "positive; got width=0, max_length=8"),
        (lambda: nn.ButterflyConv(2, 0, key=jr.key(0)), "positive; got width=2, max_length=0"),
        (lambda: nn.ButterflyConv(2, 8, block_size=1, key=jr.key(0)), "at least 2; got 1"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_blocks_that_do_not_fit():
    u, blocks = jnp.ones((9, 1)), ops.dft_blocks((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"of up to 8 steps; got 9 and a kernel of 3\. Take larger blocks, or more"):
        ops.butterfly_conv(u, u[:3], blocks, blocks)
    whole = (np.ones((4, 4, 2), np.float32), blocks[1])
    for one, other, name in (
        (whole, blocks, "blocks"),
        (blocks, whole, "kernel_blocks"),
        (blocks, blocks[:1], "kernel_blocks"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must have the shapes \[\(3, 4, 2\), \(2, 2, 2\)\]"):
            ops.butterfly_conv(u[:3], u[:3], one, other)
    with pytest.raises(ValueError, match="blocks must have the shapes"):
        ops.butterfly_conv(u, u, (), ())


# The learned butterfly.


def layer(key=0, width=3, max_length=20, **options):
    return quick_jit(lambda key: nn.ButterflyConv(width, max_length, key=key, **options))(jr.key(key))


@pytest.mark.parametrize(
    "block_size, sizes", [(2, (2,) * 6), slow(3, (3, 3, 3, 2)), (4, (4, 4, 3)), slow(16, (6, 7)), slow(40, (40,))]
)
def test_it_starts_as_the_causal_convolution(block_size, sizes, x64):
    mixer = layer(block_size=block_size)
    assert sorted(block.shape[1] for block in mixer.blocks) == sorted(sizes) and np.prod(sizes) >= 39
    mixer = eqx.tree_at(lambda m: m.skip, mixer, on_device(np.arange(3.0)))
    both = quick_jit(lambda mixer, x: (mixer(x), nn.Convolution(mixer.kernel, mixer.skip)(x)))
    for length in (20, 7):
        np.testing.assert_allclose(*both(mixer, drawn((length, 3))[0]), rtol=0, atol=1e-12)


def test_every_block_learns(x64):
    """Gradients of all parameters against finite differences, and steps along them."""
    mixer = layer(block_size=4)
    x, target = drawn((20, 3), (20, 3))
    params, rest = eqx.partition(mixer, eqx.is_array)
    loss = jax.jit(lambda params: jnp.mean((eqx.combine(params, rest)(x) - target) ** 2))
    check_grads(loss, (params,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)

    @jax.jit
    def train(params):
        def descend(params, _):
            value, gradient = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.03 * g, params, gradient), (value, gradient)

        return jax.lax.scan(descend, params, length=200)[1]

    values, gradients = jax.device_get(train(params))
    assert all(np.abs(g[0]).max() > 0 for g in jax.tree.leaves(gradients))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.smoke
def test_it_hears_what_is_to_come(x64):
    """Once a block has moved. So a language model refuses it."""
    from s5eqx import models

    mixer = layer()
    hears = jax.jit(lambda mixer: jax.jacobian(lambda x: mixer(x)[0, 0])(np.zeros((20, 3)))[1:, 0])
    assert np.abs(hears(mixer)).max() < 1e-15
    block = np.array(mixer.blocks[0])
    block[1] += 0.1
    moved = eqx.tree_at(lambda m: m.blocks[0], mixer, on_device(1.01 * block))
    assert np.abs(hears(moved)).max() > 1e-6
    with pytest.raises(ValueError, match="causal"):
        build = functools.partial(models.LanguageModel, 5, 3, lambda key: mixer, num_layers=1, mlp_width=4)
        eqx.filter_eval_shape(build, key=jr.key(0))


def test_a_layer_like_others(tmp_path):
    from s5eqx.interop import load, save

    mixer = layer()
    save(tmp_path / "layer.safetensors", mixer)
    loaded, narrow = load(tmp_path / "layer.safetensors"), nn.cast(mixer, jnp.bfloat16)
    assert eqx.tree_equal(*jax.device_get((mixer, loaded, narrow)))
    assert eqx.filter_eval_shape(mixer, on_device(np.ones((20, 3)), jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"no longer than max_length, 20 steps; got 21\. Build the layer"):
        mixer(np.ones((21, 3), np.float32))
    with pytest.raises(ValueError, match="takes no `reset`"):
        mixer(np.ones((20, 3), np.float32), reset=np.zeros(20, bool))
