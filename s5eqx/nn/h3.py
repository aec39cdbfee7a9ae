"""H3: keys that pass a short memory, times values, in a long memory that queries read."""

from typing import ClassVar

import equinox as eqx
import jax.random as jr

from s5eqx._typing import Array, PRNGKeyArray, PyTree, checked
from s5eqx.nn._check import check_mixer
from s5eqx.nn._composed import AbstractComposedMixer
from s5eqx.nn._heads import check_apart, contract, init_pairs, outer, run_pairs
from s5eqx.nn._mixer import AbstractCausalMixer, AbstractMixer
from s5eqx.nn._random import split
from s5eqx.nn.diagonal_ssm import DiagonalSSM
from s5eqx.nn.discretise import AbstractDiscretisation, Bilinear
from s5eqx.nn.linear import linear
from s5eqx.nn.long_conv import SquashedConvolution
from s5eqx.nn.s4d_init import AbstractAInit, LinInit
from s5eqx.nn.shift_ssm import ShiftSSM


class H3(AbstractComposedMixer):
    """With `q, k, v` dense functions of the input, and `*` the outer product of the channels of each head,

        y = output_linear(q . ssm(shift(k) * v)),

    where the dot sums over the channel of `k`. `shift` has `D` channels; `ssm` has one for each head and runs on all
    pairs of channels in it. The state is the pair of theirs.

    Source: Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052).

    Differs from the reference: a step is right for `head_dim > 1` too; the heads lie in the order (head, channel), as
    in the published checkpoints, while the plain code path of the reference has (channel, head).
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    shift: AbstractCausalMixer
    ssm: AbstractCausalMixer
    output_linear: eqx.nn.Linear
    head_dim: int = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        shift: AbstractMixer,
        ssm: AbstractMixer,
        *,
        head_dim: int = 1,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: channels in and out, `D`.
        - `shift`: a causal mixer of this width, for the keys.
        - `ssm`: a causal mixer of `width / head_dim` channels that keeps them apart.
        - `head_dim`: channels a head; divides `width`.
        """
        check_heads(width, head_dim)
        q_key, k_key, v_key, out_key = jr.split(key, 4)
        self.q_proj = eqx.nn.Linear(width, width, key=q_key)
        self.k_proj = eqx.nn.Linear(width, width, key=k_key)
        self.v_proj = eqx.nn.Linear(width, width, key=v_key)
        self.shift = check_mixer(shift, width, self.k_proj.weight.dtype, "shift")
        self.ssm = check_mixer(ssm, width // head_dim, self.k_proj.weight.dtype, "ssm")
        if head_dim > 1:
            check_apart(self.ssm)
        self.output_linear = eqx.nn.Linear(width, width, key=out_key)
        self.head_dim = head_dim

    def init_state(self) -> PyTree[Array]:
        return self.shift.init_state(), init_pairs(self.ssm, self.head_dim)

    def forward(self, run, state, x, key):
        shift_state, ssm_state = state
        shift_key, ssm_key = split(key, 2)
        q, k, v = (linear(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        shift_state, k = run(self.shift, shift_state, k, shift_key)
        kv = outer(k, v, self.head_dim)
        ssm_state, kv = run_pairs(run, self.ssm, ssm_state, kv, self.head_dim, ssm_key)
        return (shift_state, ssm_state), linear(self.output_linear, contract(q, kv, self.head_dim))


@checked
def h3(
    width: int,
    state_size: int = 64,
    *,
    head_dim: int = 1,
    num_ssm: int | None = None,
    A_init: AbstractAInit = LinInit(),
    discretisation: AbstractDiscretisation = Bilinear(),
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    key: PRNGKeyArray,
) -> H3:
    """H3 as published: a `ShiftSSM`, and a `DiagonalSSM` with `B` trained, both of `state_size` real states.

    **Arguments:** those of `H3` and `DiagonalSSM`.
    """
    check_heads(width, head_dim)
    layer_key, shift_key, ssm_key = jr.split(key, 3)
    ssm = DiagonalSSM(
        width // head_dim,
        state_size,
        num_ssm=num_ssm,
        A_init=A_init,
        train_B=True,
        discretisation=discretisation,
        dt_min=dt_min,
        dt_max=dt_max,
        key=ssm_key,
    )
    return H3(width, ShiftSSM(width, state_size, key=shift_key), ssm, head_dim=head_dim, key=layer_key)


@checked
def h3_conv(width: int, max_length: int, *, lam: float = 0.003, kernel_dropout: float = 0.2, key: PRNGKeyArray) -> H3:
    """H3-Conv: H3 with two long convolutions in place of its state-space models.

    **Arguments:** those of `H3` and `SquashedConvolution`, with its dropout as `kernel_dropout`.

    Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646).
    """
    layer_key, *keys = jr.split(key, 3)
    shift, ssm = (SquashedConvolution(width, max_length, lam=lam, dropout=kernel_dropout, key=key) for key in keys)
    return H3(width, shift, ssm, key=layer_key)


def check_heads(width: int, head_dim: int) -> None:
    """Refuses heads that do not share the channels evenly."""
    if width < 1 or head_dim < 1 or width % head_dim:
        raise ValueError(f"width must be a positive multiple of head_dim; got width={width}, head_dim={head_dim}.")
