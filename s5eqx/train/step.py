"""The training step: one jitted function that runs many steps, data included, before it returns."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, PyTree
from s5eqx.data import AbstractTask
from s5eqx.train._leaves import is_array_or_shape
from s5eqx.train.loss import Score, next_token
from s5eqx.train.optim import AbstractGroups

INIT, DROPOUT = range(2)
"""The streams of random numbers that a training seed holds."""


class TrainState(eqx.Module):
    """All that changes in training, and all that a checkpoint holds. `step` counts the steps done."""

    step: Int[Array, ""]
    model: eqx.Module
    opt_state: PyTree


class Trainer:
    """Trains a model on a task. All of it is a function of the seeds and the number of the step.

    The state travels as a flat list of arrays, not as a module. A call of a jitted function costs time for
    every node of its arguments, so the module is taken apart once, its arrays are donated, and
    `steps_per_dispatch` steps run in a `lax.scan` before Python is back. Their batches are made in one go:
    they are held at once.

    **Arguments:**

    - `build`: makes the model from a key. It is run under `jax.jit`.
    - `task`: the data.
    - `policy`: the parameter groups and their optimiser.
    - `batch_size`: examples a step.
    - `steps_per_dispatch`: steps a call of `run`. Take many for small models, 1 for long sequences.
    - `eval_batch_size`: test examples that are evaluated at once.
    - `seed`: chooses the initial weights and the dropout. The task has its own seed.
    - `loss`: `(model, batch, *, key) -> Score`; its mean loss is what training lowers. For sequences of many thousand
      steps take `partial(next_token, chunk=2048)`.
    """

    def __init__(
        self,
        build: Callable[[PRNGKeyArray], eqx.Module],
        task: AbstractTask,
        policy: AbstractGroups,
        *,
        batch_size: int,
        steps_per_dispatch: int = 50,
        eval_batch_size: int = 500,
        seed: int = 0,
        loss: Callable[..., Score] = next_token,
    ):
        sizes = {
            "batch_size": batch_size,
            "steps_per_dispatch": steps_per_dispatch,
            "eval_batch_size": eval_batch_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.task, self.policy, self.loss, self.seed = task, policy, loss, seed
        self.batch_size, self.steps_per_dispatch = batch_size, steps_per_dispatch
        self.eval_batch_size = min(eval_batch_size, task.num_test)

        key = jr.key(seed)
        skeleton = eqx.filter_eval_shape(build, jr.fold_in(key, INIT))
        self._optimiser = policy.optimiser(skeleton)

        def init(key):
            model = build(jr.fold_in(key, INIT))
            opt_state = self._optimiser.init(eqx.filter(model, eqx.is_inexact_array))
            return TrainState(jnp.int32(0), model, opt_state)

        self.skeleton: TrainState = eqx.filter_eval_shape(init, key)
        shapes, self._static = eqx.partition(self.skeleton, is_array_or_shape)
        self._treedef = jax.tree.structure(shapes)
        self._init = jax.jit(lambda key: self.flatten(init(key)))
        self._run = jax.jit(self._dispatch, donate_argnums=0)
        self._evaluate = jax.jit(self._test_score)

    def flatten(self, state: TrainState) -> list[Array]:
        """The arrays of a state, in the order that `run` takes."""
        return jax.tree.leaves(eqx.filter(state, eqx.is_array))

    def unflatten(self, leaves: list[Array]) -> TrainState:
        """The state whose arrays are `leaves`."""
        return eqx.combine(jax.tree.unflatten(self._treedef, leaves), self._static)

    def init(self) -> list[Array]:
        """The leaves of the state before the first step. Compiled: thousands of small calls become one."""
        return self._init(jr.key(self.seed))

    def run(self, leaves: list[Array]) -> tuple[list[Array], dict[str, Float[Array, " steps"]]]:
        """The next `steps_per_dispatch` steps. `leaves` are donated: use the returned ones.

        The metrics have one entry a step: `loss` (nats a position), `accuracy`, `grad_norm` (before
        clipping) and `lr/<group>`.
        """
        return self._run(leaves)

    def evaluate(self, leaves: list[Array], num_examples: int | None = None) -> dict[str, float]:
        """Mean loss (nats a position) and accuracy on the first `num_examples` of the test, or on all."""
        count = self.task.num_test if num_examples is None else min(num_examples, self.task.num_test)
        scores = [
            self._evaluate(leaves, jnp.int32(start), jnp.int32(count))
            for start in range(0, count, self.eval_batch_size)
        ]
        total = sum(scores[1:], start=scores[0])
        return {"loss": float(total.loss), "accuracy": float(total.accuracy)}

    def _dispatch(self, leaves):
        steps = self.unflatten(leaves).step + jnp.arange(self.steps_per_dispatch, dtype=jnp.int32)
        batches = jax.vmap(lambda step: self.task.train_batch(step, self.batch_size))(steps)
        return jax.lax.scan(lambda leaves, batch: self._step(leaves, batch), leaves, batches)

    def _step(self, leaves, batch):
        state = self.unflatten(leaves)
        params, rest = eqx.partition(state.model, eqx.is_inexact_array)
        key = jr.fold_in(jr.fold_in(jr.key(self.seed), DROPOUT), state.step)

        def objective(params):
            result = self.loss(eqx.combine(params, rest), batch, key=key)
            return result.loss, result

        grads, result = jax.grad(objective, has_aux=True)(params)
        updates, opt_state = self._optimiser.update(grads, state.opt_state, params)
        model = eqx.apply_updates(state.model, updates)
        rates = self.policy.learning_rates(state.step)
        metrics = {
            "loss": result.loss,
            "accuracy": result.accuracy,
            "grad_norm": optax.tree.norm(grads),
            **{f"lr/{name}": jnp.asarray(rate, jnp.float32) for name, rate in rates.items()},
        }
        return self.flatten(TrainState(state.step + 1, model, opt_state)), metrics

    def _test_score(self, leaves, start, stop):
        model = eqx.nn.inference_mode(self.unflatten(leaves).model)
        indices = start + jnp.arange(self.eval_batch_size, dtype=jnp.int32)
        batch = self.task.test(indices)
        inside = (indices < stop)[:, None]
        batch = eqx.tree_at(lambda b: b.weights, batch, jnp.where(inside, batch.weights, 0))
        return self.loss(model, batch, key=None)
