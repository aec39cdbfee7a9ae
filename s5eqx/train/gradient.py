"""The score of a batch and its gradient: in parts, in a lower precision, over many devices."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Key

from s5eqx._typing import Array, PyTree
from s5eqx._varying import varying_over
from s5eqx.data import AbstractBatch
from s5eqx.models import SequenceParallel
from s5eqx.nn import cast
from s5eqx.train.loss import Score
from s5eqx.train.mesh import DATA, REPLICATED, ROWS, SEQUENCE, TOKENS

Result = TypeVar("Result")


class Scorer:
    """Scores a model on batches.

    **Arguments:**

    - `loss`: `(model, batch, *, key) -> Score`, which adds up over sequences. `key` is one a sequence, or None.
    - `mesh`: spreads the batch and, where it has more than one device along `sequence`, the length: then `model` must
      be one that `SequenceParallel` takes. Each device holds the whole model and works on what it has; scores and
      gradients are summed over all.
    - `compute_dtype`: of the dense maths, as by `nn.cast`; parameters, recurrences and gradients keep theirs.
    """

    def __init__(self, loss: Callable[..., Score], *, mesh: Mesh | None, compute_dtype: DTypeLike | None):
        self.loss, self.mesh, self.compute_dtype = loss, mesh, compute_dtype

    def score(self, model: eqx.Module, batch: AbstractBatch) -> Score:
        """The score without dropout."""

        def local(model, batch, keys):
            return self._sum(self._score(model, batch, None))

        return self._spread(local, model, batch, None)

    def gradient(
        self, model: eqx.Module, batch: AbstractBatch, keys: Key[Array, " B"], *, parts: int
    ) -> tuple[Score, PyTree[Array]]:
        """The score, and the gradient of its mean loss for the floating-point leaves of `model`.

        The sequences pass in `parts` groups, one after the other, so that memory is needed for one group.
        """

        def local(model, batch, keys):
            params, rest = eqx.partition(model, eqx.is_inexact_array)
            # A gradient of each device's own: the sum over devices is then taken once and not in every part.
            params = jax.tree.map(lambda a: varying_over(self._axes, a), params)

            def loss(params, batch, keys):
                score = self._score(eqx.combine(params, rest), batch, keys)
                return score.total, score

            def of(part):
                gradient, score = jax.grad(loss, has_aux=True)(params, *part)
                return score, gradient

            def add(total, part):
                return jax.tree.map(jnp.add, total, of(part)), None

            if parts == 1:
                return self._sum(of((batch, keys)))
            groups = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (batch, keys))
            first = jax.tree.map(lambda a: a[0], groups)
            zero = lambda a: varying_over(self._axes, jnp.zeros(a.shape, a.dtype))
            # All in the loop: the program is compiled once, not once for the first part and once for the others.
            total, _ = lax.scan(add, jax.tree.map(zero, jax.eval_shape(of, first)), groups)
            return self._sum(total)

        score, gradient = self._spread(local, model, batch, keys)
        weight = jnp.where(score.weight > 0, score.weight, 1)
        return score, jax.tree.map(lambda g: g / weight.astype(g.dtype), gradient)

    def _score(self, model, batch, keys):
        if self.compute_dtype is not None:
            model = cast(model, self.compute_dtype)
        if self.mesh is not None and self.mesh.shape[SEQUENCE] > 1:
            model = SequenceParallel(model, SEQUENCE)
        return self.loss(model, batch, key=keys)

    @property
    def _axes(self):
        return frozenset() if self.mesh is None else frozenset((DATA, SEQUENCE))

    def _sum(self, tree: Result) -> Result:
        """Over all devices."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda a: lax.psum(varying_over(self._axes, a), (DATA, SEQUENCE)), tree)

    def _spread(self, local: Callable[..., Result], model: eqx.Module, batch: AbstractBatch, keys) -> Result:
        """`local(model, batch, keys)` on every device's share."""
        if self.mesh is None:
            return local(model, batch, keys)
        arrays, static = eqx.partition(model, eqx.is_array)
        places = jax.tree.map(lambda a: ROWS if a.ndim == 1 else TOKENS, batch)
        spread = jax.shard_map(
            lambda arrays, batch, keys: local(eqx.combine(arrays, static), batch, keys),
            mesh=self.mesh,
            in_specs=(REPLICATED, places, ROWS),
            out_specs=REPLICATED,
        )
        return spread(arrays, batch, keys)
