"""What is compiled of the state-space step, over one device and two, and what its FFI targets refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_or_all, relative_error
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scan_problems import native
from ssm_problems import CHUNK, draw, in_dtype

import s5eqx
from s5eqx.ops import ssm, use_backend

WIDEST = 256  # channels of the layers whose states are computed again
MAPPED = (0, None, None, None, None, 0)


def everything(*inputs):
    """y, the last state, and the cotangents of all inputs."""
    outputs, pull = jax.vjp(ssm, *inputs)
    return outputs, pull(jax.tree.map(jnp.cos, outputs))


def compiled_text(f, *inputs):
    return jax.jit(f).lower(*inputs).compile().as_text()


def sizes_in(text):
    """Of all arrays of floats or complex numbers in a compiled program."""
    return [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\b[fc]\d+\[([\d,]+)\]", text)]


def test_dense_maths_is_two_dimensional():
    """Plain JAX's, however many axes a map adds: a product of rank 3 is several times slower on a CPU."""
    inputs = in_dtype(draw((2, 3), 7)[:6], "float32")
    mapped = jax.vmap(jax.vmap(ssm, in_axes=MAPPED), in_axes=MAPPED)
    with use_backend("jax"):
        text = compiled_text(jax.grad(lambda *z: jnp.sum(mapped(*z)[0] ** 2), tuple(range(6))), *inputs)
    dots = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|convolution)\(.*", text)
    assert len(dots) >= 6, "B u, C x, and for the backward pass two products and two weight gradients"
    assert all(shape.count(",") == 1 for shape in dots)
    assert "_batch_dims" not in text and "c64" not in "".join(re.findall(r".* dot\(.*", text))


@native
@pytest.mark.parametrize("mapped", [False, True])
def test_no_array_of_all_states(mapped):
    """Forward and backward hold one state a chunk, whatever maps are around."""
    batch, length, width, states = 2, 4 * CHUNK, 3, 16
    inputs = in_dtype(draw((batch,), length, width, states)[:6], "float32")
    reset = np.arange(length) % 50 == 0
    step = lambda u, *others: ssm(u, *others, reset=jnp.broadcast_to(reset, u.shape[:-1]))

    def run(*inputs):
        outputs, pull = jax.vjp(jax.vmap(step, MAPPED) if mapped else step, *inputs)
        return outputs, pull(outputs)

    text = compiled_text(run, *inputs)
    assert "s5eqx_ssm_forward" in text and "s5eqx_ssm_backward" in text and "s5eqx_scan" not in text
    assert max(sizes_in(text)) == batch * length * width < batch * length * 2 * states


@native
def test_what_is_not_wanted_is_not_computed():
    """y alone runs no backward kernel, and its gradient runs each kernel once."""
    inputs = in_dtype(draw((2,), CHUNK + 1)[:6], "float32")
    count = lambda f: [
        compiled_text(f, *inputs).count(f'target="s5eqx_ssm_{name}"') for name in ("forward", "backward")
    ]
    assert count(ssm) == [1, 0]
    assert count(jax.grad(lambda *z: jnp.sum(ssm(*z)[0] ** 2))) == [1, 1]


@pytest.mark.parametrize("width", [WIDEST, WIDEST + 1])
def test_which_kernels_run(width):
    """The fused ones, keeping one state a chunk up to a width and all above it; none where plain JAX is asked for."""
    inputs = in_dtype(draw((2,), CHUNK, width)[:6], "float32")
    live = s5eqx.backends()[0].live
    for backend in ("auto", "native", "jax") if live else ("auto", "jax"):
        with use_backend(backend):
            text = jax.jit(lambda *z: everything(*z)).lower(*inputs).as_text()
        names = {"ssm_forward", "ssm_backward"} if live and backend != "jax" else set()
        assert set(re.findall(r"@s5eqx_(\w+)\(", text)) == names
        kept = 1 if width <= WIDEST else CHUNK
        assert not names or re.search(rf"@s5eqx_ssm_forward\(.* -> .*, tensor<2x{kept}x4x2xf32>\)", text)


def over_two_devices():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("d",), ()))
    return [split, *[whole] * 4, split]


@native
@pytest.mark.parametrize("reset, width, states", [(False, 3, 4), (True, 4, 2), (True, WIDEST + 1, 4)])
def test_a_batch_over_two_devices(reset, width, states):
    """Under jit nothing is gathered, and the gradients of the weights are those of the whole batch."""
    batch = 4
    inputs = in_dtype(draw((batch,), CHUNK + 2, width, states)[:6], "float32")
    flags = np.random.default_rng(0).random((batch, CHUNK + 2)) < 0.05

    def run(*inputs):
        outputs, pull = jax.vjp(lambda *z: ssm(*z, reset=jnp.asarray(flags) if reset else None), *inputs)
        return outputs, pull(jax.tree.map(jnp.cos, outputs))

    spread = jax.device_put(inputs, over_two_devices())
    compiled = jax.jit(run).lower(*spread).compile()
    text = compiled.as_text()
    assert not re.findall(r"= [^=]* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    (y, last), (du, *weights, dx0) = compiled(*spread)
    assert all(not z.sharding.is_fully_replicated for z in (y, last, du, dx0))
    assert all(z.sharding.is_fully_replicated for z in weights)
    expected = jax.tree.leaves(jax.jit(run)(*inputs))
    for ours, exact in zip((y, last, du, *weights, dx0), expected, strict=True):
        assert relative_error(ours, exact) < 1e-6


@native
def test_donated_operands():
    """Whatever XLA writes over them, the results are the same."""
    inputs = in_dtype(draw((2,), CHUNK + 2, 4, 2)[:6], "float32")
    expected = jax.jit(everything)(*inputs)
    copies = jax.jit(lambda *z: jax.tree.map(jnp.copy, z))(*inputs)
    found = jax.jit(everything, donate_argnums=tuple(range(6)))(*copies)
    assert copies[0].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# The FFI targets themselves. Anything can be handed to them, and nothing may crash them.

F32 = jnp.float32
B, L, D, P = 2, 70, 3, 4
INPUTS = {
    "u": ((B, L, D), F32),
    "a": ((P, 2), F32),
    "w_in": ((D, 2 * P), F32),
    "w_out": ((2 * P, D), F32),
    "skip": ((D,), F32),
    "x0": ((B, P, 2), F32),
    "reset": ((1, 0), bool),
}
KEPT = {"kept": ((B, 2, P, 2), F32)}
FORWARD_RESULTS = {"y": INPUTS["u"], "last": INPUTS["x0"], **KEPT}
BACKWARD = {**INPUTS, **KEPT, "g": INPUTS["u"], "g_last": INPUTS["x0"]}
BACKWARD_RESULTS = {
    name: INPUTS[name.removeprefix("d")] for name in ("du", "da", "dw_in", "dw_out", "dskip", "dx0")
}  # fmt: skip
ALL = {"forward": INPUTS | FORWARD_RESULTS, "backward": BACKWARD | BACKWARD_RESULTS}
EACH = [("forward", name) for name in ALL["forward"]]
EACH += [("backward", name) for name in ALL["backward"] if name == "u" or name not in INPUTS]
TARGETS = {"forward": (INPUTS, FORWARD_RESULTS), "backward": (BACKWARD, BACKWARD_RESULTS)}
ATTRIBUTES = {"chunk": np.int64(CHUNK)}


def call(target, changes=(), attributes=ATTRIBUTES):
    """Calls the raw target with ones, some of its operands or results changed."""
    operands, results = ({**part, **{k: v for k, v in dict(changes).items() if k in part}} for part in TARGETS[target])
    return raw(target, [np.ones(*z) for z in operands.values()], [*results.values()], attributes)


def raw(target, operands, results, attributes):
    f = jax.ffi.ffi_call(f"s5eqx_ssm_{target}", [jax.ShapeDtypeStruct(*result) for result in results])
    return [np.asarray(z) for z in f(*operands, **attributes)]


@native
@one_or_all
@pytest.mark.parametrize("target, name", EACH)
def test_raw_targets_refuse_wrong_shapes(target, name, chosen):
    """`u` and `a` set the sizes: where these are others, it is another array that does not fit."""
    shape, dtype = ALL[target][name]
    wrong = [(), (*shape, 1), shape[1:], (shape[0] - 1, *shape[1:])]
    wrong += [(*shape[:i], n + 1, *shape[i + 1 :]) for i, n in enumerate(shape)]
    if name == "reset":
        wrong = [(), (L,), (1, L - 1), (1, L + 1), (3, L), (0, L), (B, L, 1)]
    for other in chosen(wrong, name):
        blamed = r"\w+" if name in ("u", "a") and len(other) == len(shape) else name
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"s5eqx ssm: {blamed} must be .*; got \("):
            call(target, {name: (other, dtype)})


@native
@one_or_all
@pytest.mark.parametrize("target, name", EACH)
def test_raw_targets_refuse_wrong_dtypes(target, name, chosen, x64):
    """`u` sets the type of the others."""
    shape = ALL[target][name][0]
    for dtype in chosen((jnp.float64, jnp.complex64, jnp.int32, jnp.bfloat16), name):
        blamed = r"\w+" if name == "u" else name
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"s5eqx ssm: {blamed} must be .*; got \("):
            call(target, {name: (shape, dtype)})


@native
@pytest.mark.parametrize("target", TARGETS)
def test_raw_targets_refuse_wrong_calls(target):
    """A chunk that the kernel was not built for; attributes and arrays too few, too many, mistyped."""
    for chunk in (0, 2, CHUNK - 1, 2 * CHUNK, -CHUNK, -1, 2**40):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"s5eqx ssm: chunk.* must be {CHUNK} or 1; got {chunk}"):
            call(target, attributes={"chunk": np.int64(chunk)})
    operands, results = [np.ones(*z) for z in TARGETS[target][0].values()], [*TARGETS[target][1].values()]
    for given, shapes, attributes in (
        (operands, results, {"chunk": np.int64(1)}),  # then more are kept
        (operands, results, {}),
        (operands, results, {"chunk": np.int32(7)}),  # 64 equals the int64 of a call that JAX remembers
        (operands, results, {"chunk": "64"}),
        (operands[:-1], results, ATTRIBUTES),
        ([*operands, operands[0]], results, ATTRIBUTES),
        (operands, results[:-1], ATTRIBUTES),
        (operands, [*results, results[0]], ATTRIBUTES),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError):
            raw(target, given, shapes, attributes)


@pytest.mark.smoke
@native
def test_raw_targets_take_what_fits():
    """After all that was refused: bytes as flags, one state, and nothing at all."""
    for flags in (((1, L), jnp.uint8), ((B, L), bool)):
        y, last, kept = call("forward", {"reset": flags})
        np.testing.assert_array_equal(y, np.full((B, L, D), D * 2 * P + 1))
        assert (last == D).all() and (kept == D).all()
        du, da, dw_in, dw_out, dskip, dx0 = call("backward", {"reset": flags})
        assert not da.any() and not dx0.any() and (dskip == B * L).all() and (dw_out == B * L * D).all()
        # the cotangent of the last state comes on top of D at the last step
        assert (du[:, :-1] == 2 * P * D + 1).all() and (du[:, -1] == 2 * P * (D + 1) + 1).all()
        assert (dw_in == B * (L * D + 1)).all()
    for batch, length, states in ((0, L, P), (B, 0, P), (0, 0, P), (B, L, 0)):
        u, x0 = ((batch, length, D), F32), ((batch, states, 2), F32)
        given = {"u": u, "x0": x0, "kept": ((batch, -(-length // CHUNK), states, 2), F32), "y": u, "last": x0}
        given |= {"a": ((states, 2), F32), "w_in": ((D, 2 * states), F32), "w_out": ((2 * states, D), F32)}
        given |= {"g": u, "g_last": x0, "du": u, "dx0": x0} | {
            f"d{name}": given[name] for name in ("a", "w_in", "w_out")
        }
        y, last, kept = call("forward", given)
        assert (y == 1).all() and (length or (last == 1).all())
        du, da, dw_in, dw_out, dskip, dx0 = call("backward", given)
        assert (du == 1).all() and not any(z.any() for z in (da, dw_in, dw_out)) and (dskip == batch * length).all()
        assert length or (dx0 == 1).all()
