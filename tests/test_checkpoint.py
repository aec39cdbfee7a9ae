"""Checkpoints: what is written comes back, from however many devices to however many, or is named as damaged."""

import errno
import os
import pathlib
import re
import shutil
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from helpers import on_device
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Split

from s5eqx.train import Checkpoints
from s5eqx.train.checksum import checksum


def state(scale=1.0):
    return {
        "weights": on_device(np.arange(6).reshape(2, 3) * scale, np.float32),
        "half": on_device(np.full(4, scale / 3), jnp.bfloat16),
        "count": on_device(7, np.int32),
        "name": "not an array",
    }


def assert_same_leaves(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if eqx.is_array(a):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def save_three(folder, keep=3):
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state(step), {"step": step})


def restore(folder, like=None):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(eqx.filter_eval_shape(state) if like is None else like)


# What is kept.


@pytest.mark.smoke
def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_three(tmp_path / "checkpoints")
    found, metadata = restore(tmp_path / "checkpoints")
    assert_same_leaves(found, state(30))
    assert found["name"] == "not an array"
    assert metadata == {"step": 30}
    assert restore(tmp_path / "none") is None


def test_the_newest_are_kept(tmp_path):
    save_three(tmp_path, keep=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [20, 30]
        checkpoints.save(15, state(15), {})  # a run that went back writes its future anew
        assert checkpoints.steps() == [15]


def test_the_best_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best() is None
        for step, loss in ((10, 0.5), (20, None), (30, 0.2)):
            checkpoints.save(step, state(), {}, loss=loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(40, state(), {}, loss=0.3)
        checkpoints.save(50, state(), {})
        assert checkpoints.best() == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30", "50"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(25, state(), {}, loss=0.9)  # a run that went back forgets what it will do again
        assert checkpoints.best() == 25


def test_a_save_owns_what_it_writes(tmp_path, writes_wait):
    train = jax.jit(lambda state: jax.tree.map(lambda x: -x, state), donate_argnums=0)
    leaves = jax.tree.leaves(eqx.filter(state(), eqx.is_array))
    as_saved, metadata = [np.array(leaf) for leaf in leaves], {"history": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, leaves, metadata)
        metadata["history"].append(2)
        now = train(leaves)
        jax.block_until_ready(now)
        assert all(leaf.is_deleted() for leaf in leaves)  # their memory is the next step's, ...
        assert not (tmp_path / "10").exists()  # ... and nothing is written yet
        writes_wait.set()
    found, read = restore(tmp_path, now)
    assert_same_leaves(found, as_saved)
    assert read == {"history": [1]}


@pytest.fixture
def writes_wait(monkeypatch):
    """No array is written before this event."""
    gate, open_array = threading.Event(), tensorstore.open

    def slow(*arguments, **options):
        assert gate.wait(30)
        return open_array(*arguments, **options)

    monkeypatch.setattr(tensorstore, "open", slow)
    yield gate
    gate.set()


# Over devices.

LINE = Mesh(np.array(jax.devices()[:2]), ("data",))


@pytest.mark.parametrize("saved, restored", [(Split(), Split("data")), (Split("data"), None), (Split("data"), Split())])
def test_a_checkpoint_goes_to_other_devices(tmp_path, saved, restored):
    place = NamedSharding(LINE, saved)
    spread = {"weights": jax.device_put(np.arange(6, dtype=np.float32).reshape(2, 3), place)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, spread, {})
    wanted = None if restored is None else NamedSharding(LINE, restored)
    found, _ = restore(tmp_path, {"weights": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=wanted)})
    assert_same_leaves(found, spread)
    assert found["weights"].devices() == (set(jax.devices()[:1]) if wanted is None else set(LINE.devices))
    assert found["weights"].sharding.is_fully_replicated == (restored != Split("data"))


compiled_checksum = jax.jit(checksum)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_checksum_sees_a_bit_and_an_exchange(dtype):
    values = np.asarray([[1, 2, -2], [3, 0, 5]], dtype)
    bits = values.view(np.uint8)
    with_a_bit = [
        bits ^ np.where(np.arange(bits.size).reshape(bits.shape) == i, 128, 0).astype(np.uint8) for i in (0, 5)
    ]
    exchanged = [values[::-1], values[:, ::-1], np.asarray([[1, -2, 2], [3, 0, 5]], dtype)]
    others = [b.view(values.dtype) for b in with_a_bit] + exchanged
    sums = {int(compiled_checksum(other)) for other in [values, *others]}
    assert len(sums) == 1 + len(others)


def test_a_checksum_takes_every_type(x64):
    for value in ([1.0, 2.0], [1 + 2j, 2 + 1j], [True, False], [2**40, 1]):
        one, other = on_device(value), on_device(value[::-1])
        assert int(compiled_checksum(one)) != int(compiled_checksum(other))


# What goes wrong.


def data_files(folder):
    return [p for p in pathlib.Path(folder).rglob("*") if p.is_file() and p.parent.name == "d"]


def flip_a_byte(folder):
    for file in data_files(folder):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def cut(folder):
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[:20])


def lose_arrays(folder):
    shutil.rmtree(folder / "state")


def lose_metadata(folder):
    shutil.rmtree(folder / "metadata")


def spoil_metadata(folder):
    (folder / "metadata" / "metadata").write_text('{"leaves": [')


def exchange(folder):
    """Both are whole, and neither is what its page says."""
    other = folder.parent / "20" / "state"
    shutil.rmtree(folder / "state")
    shutil.copytree(other, folder / "state")


@pytest.mark.parametrize("damage", [flip_a_byte, cut, lose_arrays, lose_metadata, spoil_metadata, exchange])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    save_three(tmp_path)
    damage(tmp_path / "30")
    with pytest.warns(UserWarning, match=r"checkpoint .*/30 is damaged"):
        found, metadata = restore(tmp_path)
    assert_same_leaves(found, state(20))
    assert metadata == {"step": 20}


def test_if_all_are_damaged_it_is_an_error(tmp_path):
    save_three(tmp_path)
    for step in ("10", "20", "30"):
        cut(tmp_path / step)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(steps \[10, 20, 30\]\)"),
    ):
        restore(tmp_path)


def test_a_save_that_was_killed_is_not_there(tmp_path):
    save_three(tmp_path)
    shutil.move(tmp_path / "30", tmp_path / "30.orbax-checkpoint-tmp")
    assert restore(tmp_path)[1] == {"step": 20}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(40, state(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20", "40"]


@pytest.mark.parametrize("told", ["at the next save", "at the end", "beside another error"])
def test_a_save_that_fails_is_told_and_the_one_before_is_there(tmp_path, monkeypatch, told):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"checkpoint of step 20 could not be written to .*No space left.*the last good one is .*/10\."
    expected = ZeroDivisionError if told == "beside another error" else OSError
    with pytest.raises(expected) as raised, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, state(10), {"step": 10})
        checkpoints.wait()
        monkeypatch.setattr(tensorstore, "open", full)
        checkpoints.save(20, state(20), {"step": 20})  # returns, for it is written in the background
        if told == "at the next save":
            checkpoints.save(30, state(30), {"step": 30})
        if told == "beside another error":
            raise ZeroDivisionError
    assert re.search(message, raised.value.__notes__[0] if told == "beside another error" else str(raised.value))
    assert [path.name for path in tmp_path.iterdir()] == ["10"]  # what was begun takes no room
    monkeypatch.undo()
    found, metadata = restore(tmp_path)
    assert_same_leaves(found, state(10))
    assert metadata == {"step": 10}


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(os, "mkdir", full)
        with pytest.raises(OSError, match=r"checkpoint of step 10 .*No space left.*there is none before it"):
            checkpoints.save(10, state(), {})


@pytest.mark.smoke
@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"weights": np.zeros((2, 4), np.float32)},
            r"\['weights'\]: float32\[2, 4\], but .* \['weights'\]: float32\[2, 3\]",
        ),
        ({"half": np.zeros(4, np.float32)}, r"must be \['half'\]: float32\[4\], but .*bfloat16\[4\]"),
        ({"wider": np.zeros(4, np.float32)}, r"must be \['wider'\]: float32\[4\], but the checkpoint has nothing"),
    ],
)
def test_another_model_is_refused_by_its_first_differing_leaf(tmp_path, change, message):
    save_three(tmp_path)
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, state() | change)
