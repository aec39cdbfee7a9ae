"""State-space and long-convolution sequence models in JAX and Equinox, with their own kernels.

    ops      pure functions on arrays: the diagonal scan and what is made of it
    nn       layers, one file a published layer
    models   whole models

`s5eqx.data`, `s5eqx.train`, `s5eqx.interop`, `s5eqx.generate`, `s5eqx.samplers`, `s5eqx.score` and `s5eqx.distill` are
imported by name.
"""

from s5eqx import models as models
from s5eqx import nn as nn
from s5eqx import ops as ops
from s5eqx.ops import backends as backends
from s5eqx.ops import self_test as self_test
from s5eqx.ops import show_config as show_config
from s5eqx.ops import use_backend as use_backend

__version__ = "0.1.0"
