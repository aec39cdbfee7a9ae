"""The residual block of a deep model."""

from typing import ClassVar

import equinox as eqx

from s5eqx._typing import Array, PyTree
from s5eqx.nn._check import check_mixer, check_rate
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._mixer import AbstractCausalMixer, AbstractMixer
from s5eqx.nn._random import split
from s5eqx.nn.mlp import MLP
from s5eqx.nn.norm import layer_norm
from s5eqx.nn.stochastic_depth import StochasticDepth


class Block(AbstractComposedMixer):
    """A prenorm block of a sequence mixer and a channel mixer:

        x <- x + drop(mixer(norm1(x)))
        x <- x + drop(mlp(norm2(x)))

    with `drop` a dropout of entries, then of the whole branch. The state is that of the mixer.

    Source: the GPT-2 block. The published language models carry the residual sum beside the branch, which
    computes the same.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    norm1: eqx.nn.LayerNorm
    mixer: AbstractCausalMixer
    norm2: eqx.nn.LayerNorm
    mlp: MLP
    dropout: eqx.nn.Dropout
    drop_path: StochasticDepth

    def __init__(self, mixer: AbstractMixer, mlp: MLP, *, dropout: float = 0.0, drop_path: float = 0.0):
        """**Arguments:** `mixer` and `mlp` of one width; `dropout`, the probability to drop an entry of a
        branch; `drop_path`, the probability to drop a branch.
        """
        width, dtype = mlp.fc1.weight.shape[1], mlp.fc1.weight.dtype
        self.norm1 = eqx.nn.LayerNorm(width)
        self.mixer = check_mixer(mixer, width, dtype, "mixer")
        self.norm2 = eqx.nn.LayerNorm(width)
        self.mlp = mlp
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        self.drop_path = StochasticDepth(drop_path)

    def init_state(self) -> PyTree[Array]:
        return self.mixer.init_state()

    def forward(self, run, state, x, key):
        mixer_key, drop1_key, mlp_key, drop2_key = split(key, 4)
        state, h = run(self.mixer, state, layer_norm(self.norm1, x), mixer_key)
        x = x + self._drop(h, drop1_key)
        _, h = run(self.mlp, (), layer_norm(self.norm2, x), mlp_key)
        return state, x + self._drop(h, drop2_key)

    def _drop(self, h, key):
        entry_key, path_key = split(key, 2)
        return self.drop_path(self.dropout(h, key=entry_key), key=path_key)
