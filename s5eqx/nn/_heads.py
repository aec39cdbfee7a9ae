"""Keys and values in heads: their outer products run through one long operator a head, and queries read them out.

Source: Fu et al., "Hungry Hungry Hippos" (arXiv 2212.14052), section 3; Massaroli et al., "Laughing Hyena" (arXiv
2310.18780) for Hyena. With `h` a head and `i, j` the channels of a head,

    kv[h, i, j] = k[h, i] v[h, j],   y[h, j] = sum_i q[h, i] operator(kv)[h, i, j].

With one channel a head that is `q * operator(k * v)`.
"""

import jax
import jax.numpy as jnp

from s5eqx._typing import Array, Float, PRNGKeyArray, PyTree
from s5eqx.nn._composed import Run
from s5eqx.nn._mixer import AbstractCausalMixer


def init_heads(operator: AbstractCausalMixer, head_dim: int) -> PyTree[Array]:
    """The empty state of an operator on heads of `head_dim` channels: a state for each pair of them."""
    if head_dim == 1:
        return operator.init_state()
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (head_dim**2, *a.shape)), operator.init_state())


def run_heads(
    run: Run,
    operator: AbstractCausalMixer,
    state: PyTree[Array],
    q: Float[Array, "*L D"],
    k: Float[Array, "*L D"],
    v: Float[Array, "*L D"],
    head_dim: int,
    key: PRNGKeyArray | None,
) -> tuple[PyTree[Array], Float[Array, "*L D"]]:
    """State and `y`, as above. `operator` has a channel for each head; `D` is a multiple of `head_dim`."""
    if head_dim == 1:
        state, kv = run(operator, state, k * v, key)
        return state, q * kv
    heads = (*q.shape[:-1], q.shape[-1] // head_dim, head_dim)
    q, k, v = (a.reshape(heads) for a in (q, k, v))
    kv = (k[..., :, None] * v[..., None, :]).reshape(*heads[:-1], head_dim**2)
    each = jax.vmap(lambda state, kv: run(operator, state, kv, key), in_axes=(0, -1), out_axes=(0, -1))
    state, kv = each(state, kv)
    y = jnp.sum(q[..., :, None] * kv.reshape(*heads, head_dim), axis=-2)
    return state, y.reshape(*heads[:-2], -1)
