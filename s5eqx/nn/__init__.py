from s5eqx.nn._mixer import AbstractCausalMixer as AbstractCausalMixer, AbstractMixer as AbstractMixer
from s5eqx.nn.activations import (
    FullGLU as FullGLU,
    Gelu as Gelu,
    HalfGLU1 as HalfGLU1,
    HalfGLU2 as HalfGLU2,
)
from s5eqx.nn.bidirectional_s5 import BidirectionalS5 as BidirectionalS5
from s5eqx.nn.block import Block as Block
from s5eqx.nn.discretise import (
    ZOH as ZOH,
    AbstractDiscretisation as AbstractDiscretisation,
    Bilinear as Bilinear,
)
from s5eqx.nn.hippo import diagonalise as diagonalise, hippo_legs_normal as hippo_legs_normal
from s5eqx.nn.hyena import (
    AbstractFilterBank as AbstractFilterBank,
    Hyena as Hyena,
    MixerBank as MixerBank,
    hyena_s5 as hyena_s5,
)
from s5eqx.nn.linear import linear as linear
from s5eqx.nn.mlp import MLP as MLP
from s5eqx.nn.norm import layer_norm as layer_norm
from s5eqx.nn.s5 import S5 as S5
from s5eqx.nn.s5_init import (
    AbstractCInit as AbstractCInit,
    ComplexNormal as ComplexNormal,
    LecunNormal as LecunNormal,
    TruncatedNormal as TruncatedNormal,
)
from s5eqx.nn.short_conv import ShortConv as ShortConv
from s5eqx.nn.stochastic_depth import StochasticDepth as StochasticDepth
from s5eqx.nn.tree import cast as cast, recurrence_mask as recurrence_mask
