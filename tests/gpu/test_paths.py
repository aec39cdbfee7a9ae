"""Sizes at which the CUDA kernels change their way: ends of tiles, groups of tiles, few chains and many, huge arrays.

A tile is 256 steps of 16 channels of complex64. With few chains of many tiles, tiles look back over groups of 16 tiles
and super-groups of 16 groups; with many chains a block takes a whole chain.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import test_scan
from helpers import relative_error
from scan_problems import LAYOUTS, check, check_all, problem

from s5eqx.ops import diagonal_scan, final_state

pytestmark = pytest.mark.gpu
layout = test_scan.layout  # the fixture


def test_ends_of_tiles_and_groups(layout):
    lengths = [255, 256, 257, 511, 1023, 1025, 1281, 4095, 4096, 4097, 8200]
    problems = []
    for i, length in enumerate(lengths):
        states = 16 - i % 2
        problems += [
            problem(layout, (1,), length, states, a=a, reverse=i % 2 == 0) for a in ((states,), (length, states))
        ]
    check(layout, problems)


def test_few_chains(layout):
    """Tiles that look back, with resets: of every row, of all rows and none."""
    check_all(
        layout,
        [
            problem(layout, (3,), 3001, states, a=a, reset=flags, reverse=reverse)
            for states, flags, reverse in ((19, (3, 3001), False), (16, (3001,), True), (1, None, True))
            for a in ((states,), (3, 3001, states))
        ],
    )


def test_many_chains(layout):
    """A block a chain, though it has more tiles than few: as many as kManyChains of csrc/scan_tiles.h, in every layout
    with an odd number of states, and in those that take 16 states to a tile with an even one."""
    check_all(
        layout,
        [
            problem(layout, (rows,), 1100, states, a=a, reset=flags, reverse=reverse)
            for rows, states, flags, reverse in ((1060, 5, (1060, 1100), False), (120, 144, (1100,), True))
            for a in ((states,), (1100, states))
        ],
    )


@pytest.mark.parametrize("name", ["complex64", "pairs32", "float32"])
def test_across_super_groups_nearly_undamped(name):
    """L = 131,372 and |a| = 0.99999, where a wrong power of a multiplier or a lost carry shows."""
    layout = LAYOUTS[name]
    check_all(
        layout, [problem(layout, (1,), 2 * 65536 + 300, 16, radius=(0.99999, 0.99999), reverse=name == "pairs32")]
    )


# Arrays whose offsets do not fit in 32 bits, compared with the scan of a small piece of them.


def huge(rows, length, states):
    device = jax.devices("cuda")[0]
    needed = 5 * 4 * rows * length * states
    room = (device.memory_stats() or {}).get("bytes_limit", 0)
    if room < needed:
        # Nothing smaller has such offsets, and a GPU that cannot hold it says nothing about them.
        pytest.skip(f"takes {needed / 2**30:.0f} GiB of device memory, jax has {room / 2**30:.0f}")
    draw = jax.jit(lambda key: jr.normal(key, (rows, length, states), jnp.float32))
    return jnp.linspace(0.5, 0.99, states, dtype=jnp.float32), draw(jr.key(1))


def states_and_cotangents(a, b):
    """Of b, with b as the cotangent of the states: no other array of that size."""
    x, pull = jax.vjp(lambda b: diagonal_scan(a, b), b)
    return x, *pull(b)


def test_many_rows_of_a_huge_array(rows=520, length=65536, states=64):
    a, b = huge(rows, length, states)
    results = jax.jit(states_and_cotangents)(a, b)
    last = jax.jit(final_state)(a, b)
    for row in (0, rows // 2 - 1, rows - 2, rows - 1):
        expected = jax.jit(states_and_cotangents)(a, b[row])
        for ours, alone in zip(results, expected, strict=True):
            assert relative_error(ours[row], alone) < 2e-6, row
        assert relative_error(last[row], expected[0][-1]) < 2e-6, row


def test_a_huge_chain(length=2**27 + 1000, states=16, kept=1000, forgotten=4000):
    """Its ends depend on what is near them: 0.99 ** 3000 is nothing."""
    a, b = huge(1, length, states)
    x, cotangent = jax.jit(states_and_cotangents)(a, b)
    x_end, _ = jax.jit(states_and_cotangents)(a, b[:, -forgotten:])
    _, cotangent_start = jax.jit(states_and_cotangents)(a, b[:, :forgotten])
    last_cotangents = jax.jit(lambda g: diagonal_scan(a, g, reverse=True))(b[:, -kept:])
    assert relative_error(x[:, -kept:], x_end[:, -kept:]) < 2e-6
    assert relative_error(cotangent[:, :kept], cotangent_start[:, :kept]) < 2e-6
    assert relative_error(cotangent[:, -kept:], last_cotangents) < 2e-6
    assert np.isfinite(jnp.sum(x)), "also where nothing was compared"
