"""S4D: a diagonal state-space layer with one small system a channel."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.random as jr

from s5eqx._typing import Array, Complex, PRNGKeyArray
from s5eqx.nn._check import check_rate
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._read_out import AbstractReadOut
from s5eqx.nn.activations import GLU, Gelu
from s5eqx.nn.diagonal_ssm import DiagonalSSM
from s5eqx.nn.discretise import ZOH, AbstractDiscretisation
from s5eqx.nn.s4d_init import AbstractAInit, AbstractBInit, AbstractRealPart, ExpReal, LinInit, OnesBInit


class S4D(AbstractReadOut, AbstractComposedMixer):
    """`output_linear(dropout(activation(ssm(u))))`, with a `DiagonalSSM` and a dense layer, gated or plain. The
    state is that of the `DiagonalSSM`.

    By default it is the minimal form of the S4 code: a system a channel, S4D-Lin, zero-order hold and a gate. The
    layer of the safari code is

        S4D(width, num_ssm=1, A_init=InvInit(), B_init=NormalBInit(), glu=False, key=key)

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893).

    Differs from the reference: the dropout is of single entries, not of a channel for the whole sequence; the real
    parts of the safari form start at -0.5, not -0.5001; see `DiagonalSSM` for the rest.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    ssm: DiagonalSSM
    activation: Callable
    dropout: eqx.nn.Dropout
    output_linear: GLU | eqx.nn.Linear

    def __init__(
        self,
        width: int,
        state_size: int = 64,
        *,
        num_ssm: int | None = None,
        channels: int = 1,
        A_init: AbstractAInit = LinInit(),
        B_init: AbstractBInit = OnesBInit(),
        train_B: bool = False,
        discretisation: AbstractDiscretisation = ZOH(),
        real_part: AbstractRealPart = ExpReal(),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bandlimit: float | None = None,
        activation: Callable = Gelu(),
        dropout: float = 0.0,
        glu: bool = True,
        key: PRNGKeyArray,
    ):
        """**Arguments:** those of `DiagonalSSM`, and

        - `activation`: a module that acts on the output of the state-space model.
        - `dropout`: the probability to drop an entry before the dense layer.
        - `glu`: end in a `GLU`; otherwise in a plain dense layer.
        """
        ssm_key, linear_key = jr.split(key)
        self.ssm = DiagonalSSM(
            width,
            state_size,
            num_ssm=num_ssm,
            channels=channels,
            A_init=A_init,
            B_init=B_init,
            train_B=train_B,
            discretisation=discretisation,
            real_part=real_part,
            dt_min=dt_min,
            dt_max=dt_max,
            bandlimit=bandlimit,
            key=ssm_key,
        )
        self.activation = activation
        self.dropout = eqx.nn.Dropout(check_rate(dropout, "dropout"))
        dense = GLU if glu else eqx.nn.Linear
        self.output_linear = dense(channels * width, width, key=linear_key)

    def init_state(self) -> Complex[Array, "D P"]:
        return self.ssm.init_state()

    def forward(self, run, state, x, key):
        state, y = run(self.ssm, state, x, None)
        return state, self.read_out(y, key=key)
