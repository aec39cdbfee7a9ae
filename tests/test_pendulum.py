"""Pendulum: it swings as a pendulum does, the pictures show it, and times and noise are as described."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import examples

from s5eqx.data.synthetics import Pendulum
from s5eqx.data.synthetics.pendulum import GRAVITY, SPACING, swing

ANGLES = np.array([-3.1, -2.0, -0.7, 0.0, 0.3, 1.5, 2.9], np.float32)


def arrays(batch):
    return jax.device_get(vars(batch))


def squares(inputs):
    """Inputs as pictures."""
    size = math.isqrt(inputs.shape[-1])
    return inputs.reshape(*inputs.shape[:-1], size, size)


# The pendulum.


def swung(friction, num_times):
    return jax.jit(jax.vmap(lambda angle: jnp.stack(swing(angle, friction, num_times))))(ANGLES)


def test_without_friction_the_energy_is_kept():
    angle, velocity = np.moveaxis(np.asarray(swung(0.0, 400), np.float64), 1, 0)
    energy = velocity**2 / 2 - GRAVITY * np.cos(angle)
    np.testing.assert_allclose(energy, np.broadcast_to(-GRAVITY * np.cos(ANGLES)[:, None], energy.shape), atol=2e-4)
    assert np.ptp(angle[1]) > 3.9  # from -2 to 2


def test_with_friction_it_moves_as_in_much_finer_steps():
    q, v = ANGLES.astype(np.float64), np.zeros(len(ANGLES))
    h, friction, expected = SPACING / 500, 0.7, []
    for _ in range(50):
        for _ in range(500):  # Heun's method
            a = -GRAVITY * np.sin(q) - friction * v
            q1, v1 = q + h * v, v + h * a
            q, v = q + h * (v + v1) / 2, v + h * (a - GRAVITY * np.sin(q1) - friction * v1) / 2
        expected.append(np.stack([q, v], axis=1))
    np.testing.assert_allclose(swung(friction, 50), np.moveaxis(expected, 0, 2), atol=2e-5)


# Times and targets.


@pytest.mark.smoke
def test_intervals_lead_to_the_times_of_the_whole_path(key):
    path = examples(Pendulum(length=100, size=18, noise=False), 150, key)
    part = examples(Pendulum(length=30, size=18, noise=False), 150, key)
    np.testing.assert_array_equal(path["intervals"], 1.0)
    assert part["intervals"].min() >= 1
    times = np.cumsum(part["intervals"], axis=1).astype(int) - 1
    assert times.max() < 100
    for name in ("inputs", "targets"):
        expected = np.take_along_axis(path[name], times[..., None], axis=1)
        np.testing.assert_allclose(part[name], expected, atol=1e-6)


def test_every_time_is_as_likely(key):
    intervals = examples(Pendulum(num_times=12, length=5, size=10), 4000, key)["intervals"]
    counts = np.bincount(np.cumsum(intervals, axis=1).astype(int).ravel(), minlength=13)
    assert counts[0] == 0
    share = 5 / 12
    assert np.abs(counts[1:] - 4000 * share).max() < 5 * math.sqrt(4000 * share * (1 - share))


@pytest.mark.parametrize("size", [10, 31])
def test_pictures_show_the_bob_where_the_targets_say(size, key):
    rows = examples(Pendulum(size=size, noise=False, friction=0.0), 10, key)
    pictures = squares(rows["inputs"])
    assert pictures.shape == (10, 50, size, size)
    assert 0 <= pictures.min() < 1e-6
    assert 0.5 < pictures.max() <= 1
    np.testing.assert_allclose((rows["targets"] ** 2).sum(axis=-1), 1.0, atol=1e-6)
    places = np.arange(size) - (size - 1) / 2
    mass = pictures.sum(axis=(2, 3))
    right, down = (pictures.sum(axis=2) @ places) / mass, (pictures.sum(axis=3) @ places) / mass
    np.testing.assert_allclose(np.stack([right, down], axis=-1) / (0.35 * size), rows["targets"], atol=0.02)


def test_what_knowing_nothing_costs_is_as_documented(key):
    targets = examples(Pendulum(size=10, noise=False), 2000, key)["targets"]
    assert (targets**2).mean() == pytest.approx(1 / 2)
    assert ((targets - targets.mean(axis=(0, 1))) ** 2).mean() == pytest.approx(0.37, abs=0.02)


# Noise.


def test_some_pictures_are_clean_and_some_nothing_but_noise(key):
    noisy = examples(Pendulum(length=100, size=18), 150, key)
    clean = examples(Pendulum(length=100, size=18, noise=False), 150, key)
    np.testing.assert_allclose(noisy["targets"], clean["targets"], atol=1e-6)
    assert noisy["inputs"].min() >= 0
    assert noisy["inputs"].max() <= 1
    is_clean = np.abs(noisy["inputs"] - clean["inputs"]).max(axis=-1) < 1e-6
    assert 0.08 < is_clean.mean() < 0.17

    # Where the bob is not, the brightest of hundreds of pixels is very nearly what noise has of the picture.
    share = np.where(clean["inputs"] < 1e-6, noisy["inputs"], 0).max(axis=-1)
    only_noise = share > 0.97
    assert 0.08 < only_noise.mean() < 0.2
    bob = clean["inputs"].argmax(axis=-1)[..., None]
    brightness = np.take_along_axis(noisy["inputs"], bob, axis=-1)[..., 0]
    assert abs(brightness[share > 0.99].mean() - 0.5) < 0.03
    assert np.abs(np.diff(share, axis=1)).max() < 0.2 / 0.5 + 0.05  # it wanders
    assert (np.ptp(share, axis=1) > 0.8).mean() > 0.5


# Purity.


@pytest.mark.slow
def test_an_example_depends_on_seed_and_number_alone():
    make = lambda seed: Pendulum(num_times=20, length=10, size=10, num_test=8, seed=seed)
    task = make(0)
    together, others = arrays(task.train(np.arange(8))), arrays(task.train(np.arange(7, 15)))
    for name in together:
        np.testing.assert_array_equal(others[name][0], together[name][7])
    tested = arrays(task.test(np.arange(1, 9)))
    np.testing.assert_array_equal(together["weights"], 1.0)
    np.testing.assert_array_equal(tested["weights"], np.repeat([[1.0]] * 7 + [[0.0]], 10, axis=1))
    for inputs in (tested["inputs"], np.asarray(make(1).train(np.arange(8)).inputs)):
        assert (inputs != together["inputs"]).any(axis=(1, 2)).all()
    assert together["inputs"].shape[-1] == task.num_features
    assert together["targets"].shape[-1] == task.num_outputs


@pytest.mark.slow
def test_double_precision_does_not_change_the_data(request, key):
    make = lambda: examples(Pendulum(num_times=20, length=10, size=10), 4, key)
    expected = make()
    request.getfixturevalue("x64")
    given = make()
    for name in expected:
        assert given[name].dtype == expected[name].dtype == np.float32
        np.testing.assert_allclose(given[name], expected[name], atol=1e-6)


# Bad input.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 101}, "length must lie between 1 and num_times=100, got 101"),
        ({"length": 0}, "length must lie between 1 and"),
        ({"size": 9}, "size must be at least 10, got 9"),
        ({"friction": -0.1}, "friction must lie between 0 and 10"),
        ({"friction": math.nan}, "friction must lie between 0 and 10"),
        ({"num_test": 0}, "num_test must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Pendulum(**settings)
