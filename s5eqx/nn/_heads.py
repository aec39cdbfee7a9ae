"""Keys and values in heads: their outer products run through one long operator a head, and queries read them out.

With `h` a head and `i, j` the channels of a head,

    kv[h, i, j] = k[h, i] v[h, j],   y[h, j] = sum_i q[h, i] operator(kv)[h, i, j].

With one channel a head that is `q * operator(k * v)`.

Source: Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052), section 3; Massaroli et al., "Laughing Hyena" (arXiv
2310.18780), for Hyena.
"""

import jax
import jax.numpy as jnp

from s5eqx._typing import Array, Float, PRNGKeyArray, PyTree
from s5eqx.nn._composed import Run
from s5eqx.nn._diagonal import AbstractDiagonalSSM
from s5eqx.nn._mixer import AbstractCausalMixer
from s5eqx.nn.convolution import AbstractConvolution
from s5eqx.nn.shift_ssm import ShiftSSM
from s5eqx.nn.short_conv import ShortConv


def init_pairs(operator: AbstractCausalMixer, head_dim: int) -> PyTree[Array]:
    """The empty state of an operator on heads of `head_dim` channels: one for each pair of channels."""
    if head_dim == 1:
        return operator.init_state()
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (head_dim**2, *a.shape)), operator.init_state())


def check_apart(operator: AbstractCausalMixer) -> None:
    """Refuses an operator that is not known to treat each channel, a head here, by itself."""
    if not isinstance(operator, AbstractDiagonalSSM | ShiftSSM | ShortConv | AbstractConvolution):
        raise ValueError(
            "Heads need operators that keep their channels apart, such as a DiagonalSSM or a Convolution; a "
            f"{type(operator).__name__} mixes them. Use it without heads."
        )


def outer(k: Float[Array, "*L D"], v: Float[Array, "*L D"], head_dim: int) -> Float[jax.Array, "..."]:
    """`kv` of shape (*L, H, head_dim^2), or (*L, D) with one channel a head."""
    if head_dim == 1:
        return jnp.multiply(k, v)
    k, v = _in_heads(k, head_dim), _in_heads(v, head_dim)
    return jnp.reshape(k[..., :, None] * v[..., None, :], (*k.shape[:-1], head_dim**2))


def run_pairs(
    run: Run,
    operator: AbstractCausalMixer,
    state: PyTree[Array],
    kv: Float[Array, "..."],
    head_dim: int,
    key: PRNGKeyArray | None,
) -> tuple[PyTree[Array], Float[Array, "..."]]:
    """The operator, which has a channel for each head, on every pair of channels."""
    if head_dim == 1:
        return run(operator, state, kv, key)
    each = jax.vmap(lambda state, kv: run(operator, state, kv, key), in_axes=(0, -1), out_axes=(0, -1))
    return each(state, kv)


def contract(q: Float[Array, "*L D"], kv: Float[Array, "..."], head_dim: int) -> Float[Array, "*L D"]:
    """`y`."""
    if head_dim == 1:
        return q * kv
    q = _in_heads(q, head_dim)
    y = jnp.sum(q[..., :, None] * kv.reshape(*q.shape, head_dim), axis=-2)
    return y.reshape(*y.shape[:-2], y.shape[-2] * head_dim)


def _in_heads(a, head_dim):
    return a.reshape(*a.shape[:-1], a.shape[-1] // head_dim, head_dim)
