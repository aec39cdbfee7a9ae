"""The README's table of layers, checked against the layers."""

import functools
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import but_slow, drawn

from s5eqx import nn

README = (Path(__file__).parents[1] / "README.md").read_text()
D, N, L = 8, 4, 256

ROWS = {
    "S5": (lambda L: nn.S5(D, N, key=jr.key(0)), {"N": N}),
    "hyena_s5": (lambda L: nn.hyena_s5(D, N, key=jr.key(0)), {"N + 6 D": N + 6 * D}),
    "hyena": (lambda L: nn.hyena(D, L, key=jr.key(0)), {"(L - 1) D + 6 D": (L - 1) * D + 6 * D}),
    "h3": (lambda L: nn.h3(D, N, key=jr.key(0)), {"2 N D": 2 * N * D}),
    "h3_conv": (lambda L: nn.h3_conv(D, L, key=jr.key(0)), {"2 (L - 1) D": 2 * (L - 1) * D}),
    "S4D": (lambda L: nn.S4D(D, N, key=jr.key(0)), {"N D": N * D}),
    "LongConv": (lambda L: nn.LongConv(D, L, key=jr.key(0)), {"(L - 1) D": (L - 1) * D}),
    "ModalSSM": (lambda L: nn.ModalSSM(D, N, key=jr.key(0)), {"2 N D": 2 * N * D}),
    "Attention": (lambda L: nn.Attention(D, max_length=L, key=jr.key(0)), {"2 L D": 2 * L * D}),
    "LRU": (lambda L: nn.LRU(D, N, key=jr.key(0)), {"2 N": 2 * N}),
    "RGLRU": (lambda L: nn.RGLRU(D, key=jr.key(0)), {"D": D}),
    "ShortConv": (lambda L: nn.ShortConv(D, 3, key=jr.key(0)), {"2 D": 2 * D}),
}
"""How each layer is built for sequences of length L, and the real numbers in its state."""


def rows():
    """The cells of the table by the layer's name."""
    lines = [line for line in README.splitlines() if line.startswith("| `nn.")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.match(r"`nn\.(\w+)`", row[0])[1]: row[1:] for row in cells}


def flops(function, *args):
    return eqx.filter_jit(function).lower(*args).lowered.cost_analysis()["flops"]


def growth(cost):
    """O(L) where the cost of a token about doubles with the length; else it is constant, or hardly grows."""
    return "linear" if cost(2 * L) / cost(L) > 1.5 else "flat"


def in_training(build):
    mixer = eqx.nn.inference_mode(build(2 * L))
    return growth(lambda length: flops(mixer, jnp.zeros((length, D))) / length)


def in_generation(build):
    def cost(length):
        mixer = nn.materialise(eqx.nn.inference_mode(build(length)))
        return flops(mixer.step, mixer.init_state(), jnp.zeros(D))

    return growth(cost)


@pytest.mark.smoke
def test_the_table_names_every_layer():
    assert rows().keys() == ROWS.keys()


@pytest.mark.parametrize("name", but_slow(ROWS, "h3", "h3_conv", "S4D", "ModalSSM", "LRU", "ShortConv"))
def test_row(name):
    build, state_size = ROWS[name]
    build = functools.cache(lambda length, build=build: drawn(lambda _: build(length), jr.key(0)))
    _, size, training, generation, resets, bidirectional = rows()[name]
    mixer = eqx.nn.inference_mode(build(L))
    reals = sum(
        a.size * (2 if jnp.iscomplexobj(a) else 1)
        for a in jax.tree.leaves(eqx.filter_eval_shape(mixer.init_state))
        if jnp.issubdtype(a.dtype, jnp.inexact)
    )
    assert {size: reals} == state_size
    assert {"O(1)": "flat", "O(log L)": "flat", "O(L)": "linear"}[training] == in_training(build)
    assert {"O(1)": "flat", "O(L)": "linear"}[generation] == in_generation(build)
    assert (training == "O(log L)") == any("fft" in str(e.primitive) for e in equations(mixer))
    assert (resets == "yes") == nn.takes_reset(mixer)
    assert (bidirectional != "no") == hasattr(nn, f"Bidirectional{name}")
    if bidirectional != "no":
        assert bidirectional == f"`nn.Bidirectional{name}`"


def equations(mixer):
    """All operations of the parallel pass, those of inner functions too."""
    todo = [jax.make_jaxpr(lambda x: mixer(x))(jnp.zeros((L, D))).jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            yield equation
            todo += [
                getattr(p, "jaxpr", p) for p in equation.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")
            ]
