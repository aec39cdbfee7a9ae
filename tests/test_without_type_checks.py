"""Arguments of a wrong type, as users give them: outside the tests constructors are not type-checked."""

import subprocess
import sys

CODE = """
import equinox as eqx
import jax.random as jr
from s5eqx import models, nn

key = jr.key(0)
layer = eqx.filter_eval_shape(lambda: nn.S5(4, 4, key=key))  # without its numbers, which would be compiled
for build in (
    lambda: nn.Hyena(4, layer, key=key),
    lambda: nn.Hyena(4, (layer,), key=key),
    lambda: models.LanguageModel(5, 4, [layer], mlp_width=4, key=key),
    lambda: models.SequenceEncoder(nn.MLP(4, 4, key=key), lambda key: layer, num_layers=1, key=key),
):
    try:
        build()
    except ValueError as error:
        print(error)
"""


def test_wrong_types_are_named(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    *banks, mixers, encoder = done.stdout.splitlines()
    assert len(banks) == 2 and all("bank must be a filter bank, such as `MixerBank((mixer, ...))`" in b for b in banks)
    assert "a factory `key -> mixer` or a tuple of mixers; got a list" in mixers
    assert "encoder must be an `eqx.nn.Linear` or an `eqx.nn.Embedding`; got a MLP" in encoder
