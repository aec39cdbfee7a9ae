"""Our own files of weights: exact round trips, and everything that is refused."""

import json
import struct

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import drawn, on_device

from s5eqx import nn
from s5eqx.interop import load, save, weights
from s5eqx.models import LanguageModel

D = 8


def mixers(key):
    """Several of them, so that most kinds of field occur: None, tuples, numbers, objects, functions."""
    keys = jr.split(key, 6)
    return (
        nn.hyena(D, 16, order=3, features=3, filter_width=4, shift=0.1, key=keys[0]),
        nn.hyena_s5(D, 4, activation=nn.HalfGLU2, dropout=0.1, key=keys[1]),
        nn.h3(D, 4, head_dim=2, key=keys[2]),
        nn.S4D(D, 4, bandlimit=0.5, activation=eqx.nn.Lambda(jax.nn.gelu), key=keys[3]),
        nn.LongConv(D, 16, smooth=nn.SmoothTime(3), key=keys[4]),
        nn.Attention(D, 2, max_length=16, rotary=nn.Rotary(4), use_bias=False, key=keys[5]),
    )


def model(key, mixer=mixers, **options):
    """A model of drawn numbers. It is not built, which takes long."""

    def build(key):
        layers = mixer(key) if mixer is mixers else mixer
        return LanguageModel(11, D, layers, mlp_width=12, max_length=16, dropout=0.1, key=key, **options)

    draw = np.random.default_rng(0).normal
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    fill = lambda leaf: on_device(draw(size=leaf.shape), leaf.dtype) if is_shape(leaf) else leaf
    return jax.tree.map(fill, eqx.filter_eval_shape(build, key))


@pytest.fixture(scope="module")
def many(key):
    return model(key)


def assert_same(ours, saved):
    """The same tree, with the same bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(saved)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(saved), strict=True):
        if eqx.is_array(b):
            assert isinstance(a, jax.Array) and a.dtype == b.dtype, path
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.shape == b.shape, path
        else:
            assert type(a) is type(b) and a == b, path


@pytest.mark.parametrize(
    "make",
    [
        lambda many, key: many,
        lambda many, key: drawn(lambda key: nn.cast(many, jnp.bfloat16), key),
        lambda many, key: model(key, lambda key: nn.RGLRU(D, key=key), num_layers=3, stack=True, remat=True),
        lambda many, key: eqx.nn.inference_mode(many),
        lambda many, key: eqx.filter(many, eqx.is_inexact_array),  # None for the other leaves
        lambda many, key: drawn(lambda key: nn.materialise(nn.hyena(D, 16, order=3, filter_width=4, key=key)), key),
        lambda many, key: drawn(lambda key: nn.BidirectionalS5(D, 4, key=key), key),
        lambda many, key: nn.Buffer(on_device(np.zeros((0, 3), np.float32))),
    ],
)
def test_round_trip(make, many, key, tmp_path):
    saved = make(many, key)
    save(tmp_path / "model", saved)
    assert_same(load(tmp_path / "model"), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.smoke
def test_what_is_read_runs(key, tmp_path):
    saved = eqx.nn.inference_mode(model(key, lambda key: nn.ShortConv(D, 3, key=key), num_layers=1))
    tokens = on_device(np.arange(5), np.int32)
    save(str(tmp_path / "model"), saved)
    logits = eqx.filter_jit(lambda model: model(tokens))
    np.testing.assert_array_equal(logits(load(str(tmp_path / "model"))), logits(saved))


def test_round_trip_of_double_precision(key, tmp_path, x64):
    saved = drawn(lambda key: nn.DiagonalSSM(3, 4, bandlimit=float("inf"), key=key), key)
    save(tmp_path / "model", saved)
    assert_same(load(tmp_path / "model"), saved)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"A_real must keep its dtype, float64.*jax_enable_x64"):
        load(tmp_path / "model")


class Private(eqx.Module):
    pass


@pytest.mark.parametrize(
    "activation, words",
    [
        (lambda y: y, r"mixer\.activation must be a public module.*lambda"),
        (eqx.nn.Lambda(jnp.exp), r"mixer\.activation\.fn must be .*exp"),
        (Private(), r"mixer\.activation must be a public module.*Private"),
        (eqx.nn.Lambda(jnp.ones(2, complex)), r"mixer\.activation\.fn must be of real numbers.*complex64.*pairs"),
    ],
)
def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(activation, words, key, tmp_path):
    (tmp_path / "model").write_bytes(b"before")
    block = drawn(lambda key: nn.Block(nn.S4D(D, 4, key=key), nn.MLP(D, D, key=key)), key)
    block = eqx.tree_at(lambda block: block.mixer.activation, block, activation)
    with pytest.raises(ValueError, match=words):
        save(tmp_path / "model", block)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model", b"before")]


@pytest.mark.smoke
def test_an_interrupted_save_leaves_the_file_of_before(key, tmp_path, monkeypatch):
    save(tmp_path / "model", nn.ShortConv(D, 3, key=key))
    before = (tmp_path / "model").read_bytes()

    def fail(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "model", nn.ShortConv(D, 4, key=key))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model", before)]


def rewrite(path, change):
    """The file with another header: `change` gets what it says of the model, and the structure of it."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["s5eqx"])
    structure = json.loads(about["structure"])
    about = change(about, structure, header) or about
    about |= {"structure": json.dumps(structure)}

    def whole():
        header["__metadata__"]["s5eqx"] = json.dumps(about)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    arrays = {name: np.frombuffer(tensor["data"], np.uint8) for name, tensor in safetensors.deserialize(whole())}
    about["crc32"] = weights._checksum(about["structure"], arrays)
    path.write_bytes(whole())


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda about, tree, header: about | {"format": "2"}, "it has format 2, of s5eqx .*reads format 1"),
        (lambda about, tree, header: tree.update({"class": "os.system"}), "the model is a os.system, .*not know"),
        (lambda about, tree, header: tree.update({"class": "s5eqx.nn.AbstractLayer"}), "AbstractLayer, .*not know"),
        (lambda about, tree, header: tree.update({"class": ["s5eqx.nn.MLP"]}), "cannot be read"),
        (
            lambda about, tree, header: tree["fields"].update(extra=1),
            "of fields weight, bias, not of .*extra",
        ),
        (lambda about, tree, header: tree["fields"].__delitem__("bias"), "of fields weight, bias, not of weight"),
        (lambda about, tree, header: tree["fields"].update(bias={"function": "os.system"}), "bias is a os.system"),
        (lambda about, tree, header: tree["fields"].update(bias={"eval": "1"}), "bias is described by .*eval"),
        (lambda about, tree, header: tree["fields"].update(bias=None), "no place for bias"),
        (lambda about, tree, header: tree["fields"]["bias"].update(shape=[4, 2]), r"bias should be float32\[4, 2\]"),
        (lambda about, tree, header: header["bias"].update(shape=[2, 4]), r"bias should be float32\[8\].*\[2, 4\]"),
        (lambda about, tree, header: header.update(b=header.pop("bias")), "the array bias is missing"),
        (lambda about, tree, header: tree.update(fields={"weight": 1, "bias": {"tuple": 3}}), "described by"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(change, words, key, tmp_path):
    save(tmp_path / "model", nn.ShortConv(D, 3, key=key))
    rewrite(tmp_path / "model", change)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "model")


@pytest.mark.parametrize("what", ["data", "structure"])
def test_damage_is_seen(what, key, tmp_path):
    """One bit of an array, or one digit of the structure."""
    path = tmp_path / "model"
    save(path, drawn(lambda key: nn.Attention(D, 2, max_length=16, key=key), key))
    data = path.read_bytes()
    if what == "data":
        damaged = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    else:
        at = data.index(b"num_heads")
        at += data[at:].index(b": 2") + 2
        damaged = data[:at] + b"4" + data[at + 1 :]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum, so it is damaged"):
        load(path)


def test_numpy_scalars_are_numbers(tmp_path):
    save(tmp_path / "model", eqx.nn.Dropout(np.float32(0.25)))
    rate = load(tmp_path / "model").p
    assert rate == 0.25 and type(rate) is float


@pytest.mark.smoke
def test_nothing_that_a_file_names_is_run(key, tmp_path, monkeypatch):
    save(tmp_path / "model", nn.ShortConv(D, 3, key=key))

    def run(*_, **__):
        raise AssertionError("a constructor ran")

    monkeypatch.setattr(nn.ShortConv, "__init__", run)
    assert load(tmp_path / "model").weight.shape == (3, D)


def test_other_files_are_refused(key, tmp_path):
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="is no file"):
        load(path)
    with pytest.raises(ValueError, match="is no file"):
        load(tmp_path)
    save(path, nn.ShortConv(D, 3, key=key))
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:100], whole[:-1], whole + b"x", b"PK\x03\x04" + bytes(200)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no safetensors file, or is damaged"):
            load(path)
    for metadata in (None, {"format": "pt"}, {"s5eqx": "no JSON"}, {"s5eqx": DEEP}):
        safetensors.numpy.save_file({"w": np.ones(3)}, path, metadata)
        with pytest.raises(ValueError, match=r"no model that `save` wrote.*from_safari"):
            load(path)
    about = {"format": "1", "s5eqx": "0", "structure": DEEP, "crc32": weights._checksum(DEEP, {})}
    safetensors.numpy.save_file({}, path, {"s5eqx": json.dumps(about)})
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
