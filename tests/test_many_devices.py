"""Training over devices and processes: the numbers of one device, and nothing gathered that need not be."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import tiny
from helpers import quick_jit, slow

import s5eqx
from s5eqx.data import AssocRecall, Batch
from s5eqx.models import LanguageModel, SequenceParallel
from s5eqx.nn import Attention, HalfGLU2, ShortConv, hyena_s5
from s5eqx.train import make_mesh, next_token
from s5eqx.train.feed import to_devices
from s5eqx.train.gradient import Scorer

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(s5eqx.__file__).parents[1], TESTS)))}


@pytest.fixture(scope="module")
def model():
    mixer = lambda key: hyena_s5(4, 4, activation=HalfGLU2, key=key)
    build = lambda key: LanguageModel(10, 4, mixer, num_layers=2, mlp_width=8, stack=True, remat=True, key=key)
    return quick_jit(build)(jr.key(0))


def packed(size, length):
    tokens = np.random.default_rng(0).integers(0, 10, (size, length + 1))
    weights = np.random.default_rng(1).uniform(0.5, 1, (size, length)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, np.random.default_rng(2).random((size, length)) < 0.1)


def gradient(model, batch, *, mesh=None, parts=1, loss=next_token, dtype=None):
    scorer = Scorer(loss, mesh=mesh, compute_dtype=dtype)
    score, gradient = quick_jit(partial(scorer.gradient, parts=parts))(model, batch, jr.split(jr.key(0), 4))
    return jax.tree.leaves((score, gradient))


@pytest.fixture(scope="module")
def expected(model):
    return gradient(model, packed(4, 12))


@pytest.mark.parametrize(
    "data, sequence, parts, loss",
    [
        (2, 1, 2, next_token),
        (1, 2, 2, partial(next_token, logits_chunk=4)),
        slow(0, 0, 4, next_token),
    ],
)
def test_parts_and_devices_have_the_gradient_of_the_whole(data, sequence, parts, loss, model, expected):
    """With weights, with resets, and with blocks in a loop that are computed again."""
    mesh = make_mesh(data, sequence) if data else None
    for ours, exact in zip(gradient(model, packed(4, 12), mesh=mesh, parts=parts, loss=loss), expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_devices_where_errors_are_checked_as_it_runs():
    """Attention and learned positions, which know only then how long a packed sequence is, in pieces."""
    mixer = lambda key: Attention(4, max_length=20, key=key)
    build = lambda key: LanguageModel(10, 4, mixer, num_layers=1, mlp_width=4, max_length=20, key=key)
    model, loss = quick_jit(build)(jr.key(0)), partial(next_token, chunk=5)
    spread, one = (gradient(model, packed(4, 10), mesh=mesh, loss=loss) for mesh in (make_mesh(2, 1), None))
    for ours, exact in zip(spread, one, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_dense_maths_in_bfloat16(model, expected):
    """Parameters, score and gradient stay float32; the gradient is near that of float32."""
    ours = gradient(model, packed(4, 12), loss=partial(next_token, logits_chunk=5), dtype=jnp.bfloat16)
    assert {a.dtype for a in ours} == {np.dtype(np.float32)}
    for name, a, b in zip(("nll", "correct", "weight"), ours, expected, strict=False):
        assert float(a) == pytest.approx(float(b), rel=1e-2 if name == "nll" else 0.2), name
    a, b = (np.concatenate([np.ravel(a) for a in leaves[3:]]) for leaves in (ours, expected))
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.05


def test_a_bfloat16_embedding_sums_its_gradient_in_float32():
    """4,096 steps that each add one part in 500 to the same entry: bfloat16 stops to count at 256 of them."""

    class Tied(eqx.Module):
        embedding: jax.Array

        def hidden(self, x, *, key=None):
            return jnp.ones((len(x), 1), self.embedding.dtype)

        def unembed(self, h):
            return jnp.matmul(h, self.embedding.T, preferred_element_type=jnp.float32)

        def __call__(self, x, *, key=None):
            return self.unembed(self.hidden(x))

    tokens = np.zeros((1, 4096), np.int32)
    batch = Batch(tokens, tokens, np.ones((1, 4096), np.float32))
    nll = lambda model: next_token(model, batch, logits_chunk=8).total
    slope = quick_jit(jax.grad(nll))(Tied(jnp.zeros((3, 1), jnp.bfloat16))).embedding
    np.testing.assert_allclose(slope[:, 0].astype(np.float32), [-2 / 3 * 4096, 4096 / 3, 4096 / 3], rtol=0.01)


@pytest.mark.smoke
def test_a_batch_on_a_mesh_is_read_once(model):
    asked = []

    def examples(indices):
        asked.append(indices.tolist())
        rows = np.broadcast_to(indices[:, None].astype(np.int32), (len(indices), 6)) + np.arange(6, dtype=np.int32)
        return Batch(rows, rows + 1, np.ones(rows.shape, np.float32), rows % 2 == 0)

    indices = np.arange(8).reshape(2, 4)
    whole, *meshes = (to_devices(examples, indices, mesh) for mesh in (None, make_mesh(2, 1), make_mesh(1, 2)))
    assert whole.inputs.shape == (2, 4, 6) and int(whole.targets[1, 2, 3]) == 6 + 3 + 1
    for batch, shape in zip(meshes, [(2, 2, 6), (2, 4, 3)], strict=True):
        assert {piece.data.shape for piece in batch.inputs.addressable_shards} == {shape}
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b)
    # A row of the first mesh is on one device, of the second on two; each is read once, and one more for its shape.
    assert asked == [[*range(8)], [0], [0, 1, 4, 5], [2, 3, 6, 7], [0], [*range(8)]]


class Odd(AssocRecall):
    sequence_length = 9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mesh": (4, 1)}, r"data=4 by sequence=1 needs 4 devices, there are 2"),
        ({"mesh": (None, 4)}, r"data=1 by sequence=4 needs 4 devices"),
        ({"mesh": (0, 1)}, r"at least 1 device along each axis, got data=0"),
        ({"mesh": (2, 1), "batch_size": 3}, r"batch_size / accumulate=3 sequences .* data=2 devices"),
        ({"mesh": (2, 1), "batch_size": 6, "accumulate": 2}, r"batch_size / accumulate=3 sequences"),
        ({"batch_size": 4, "accumulate": 3}, r"accumulate must divide batch_size=4, got 3"),
        ({"skip_nonfinite": -1}, r"skip_nonfinite .* at least 0, got -1"),
        ({"mesh": (1, 2), "task": Odd()}, r"sequences of 9 tokens .* sequence=2 devices"),
    ],
)
def test_what_does_not_divide_is_refused(options, message):
    options = dict(options)

    def build():
        if "mesh" in options:
            options["mesh"] = make_mesh(*options["mesh"])
        return tiny.trainer(**options)

    with pytest.raises(ValueError, match=message):
        build()


def test_a_mesh_has_its_two_axes():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    with pytest.raises(ValueError, match=r"axes 'data' and 'sequence', got \('batch',\); see make_mesh"):
        tiny.trainer(mesh=mesh)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    with pytest.raises(ValueError, match=r"axes of the mesh must be of type Auto, .*take s5eqx.train.make_mesh"):
        tiny.trainer(mesh=jax.make_mesh((2, 1), ("data", "sequence"), axis_types=kinds))
    with pytest.raises(ValueError, match=r"in a LanguageModel, got Bigram"):
        tiny.trainer(mesh=make_mesh(1, 2))


def in_two(model, tokens):
    run = lambda tokens: SequenceParallel(model, "sequence")(tokens)
    mesh, split = make_mesh(1, 2), jax.sharding.PartitionSpec("sequence")
    return jax.eval_shape(jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split), tokens)


@pytest.mark.smoke
def test_what_cannot_be_split_over_the_length_is_refused(key):
    model = lambda mixer, **options: LanguageModel(10, 4, (mixer,), mlp_width=4, key=key, **options)
    attention, taps = Attention(4, max_length=8, key=key), ShortConv(4, 4, key=key)
    tokens = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"S5, a short convolution .*got Attention"):
        in_two(model(attention), tokens)
    with pytest.raises(ValueError, match=r"at least the 3 samples .* got pieces of 2"):
        in_two(model(taps), tokens)
    with pytest.raises(ValueError, match="learned positions cannot be split over the length"):
        SequenceParallel(model(taps, max_length=8), "sequence")


@pytest.fixture(scope="module")
def on_eight_devices():
    command = [sys.executable, TESTS / "many_devices.py"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.xdist_group("many_devices")
@pytest.mark.parametrize(
    "mesh, gathered", [("8 x 1", 0), ("4 x 1", 0), ("2 x 4", 4 * 2 * 4 * 2), ("1 x 8", 8 * 8 * 4 * 2)]
)
def test_eight_devices_train_as_one(mesh, gathered, on_eight_devices):
    """Where the length is split, the states of all pieces are gathered: pieces x sequences x P x 2 numbers, that is
    4 x 2 x 4 x 2 and 8 x 8 x 4 x 2, of which the length is no part."""
    result = on_eight_devices[mesh]
    assert result["error"] < 1e-5
    assert result["all-gather"] == gathered


@pytest.mark.slow
@pytest.mark.xdist_group("many_devices")
def test_a_sequence_of_262144_tokens_over_eight_devices(on_eight_devices):
    result = on_eight_devices["long"]
    assert result["loss"] < 1e-6 and result["gradient"] < 2e-5 and result["leaves"] > 20


@pytest.mark.slow
def test_two_processes_train_as_one():
    """The losses of a task on the device and of a corpus; each process reads the rows of its own device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def start(number, count):
        command = [sys.executable, TESTS / "one_of_processes.py", port, str(number), str(count)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(process):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return json.loads(out.splitlines()[-1])

    both = [start(number, 2) for number in range(2)]
    (one, other), alone = map(result, both), result(start(0, 1))
    assert one["losses"] == other["losses"]
    np.testing.assert_allclose(one["losses"], alone["losses"], atol=1e-5)
    halves = [{4 * step + row for step in range(5) for row in rows} for rows in ((0, 1), (2, 3))]
    assert {*alone["asked"]} == halves[0] | halves[1]
    for process, half, tested in zip((one, other), halves, ({0, 1, 2}, {3, 4, 5}), strict=True):
        assert {*process["asked"]} == half | tested | {0}  # the first one tells the shape
