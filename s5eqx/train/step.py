"""The training step: one jitted function that runs many steps, data included, before it returns."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from s5eqx._typing import Array, Float, Int, PRNGKeyArray, PyTree
from s5eqx.data import AbstractBatch, AbstractCorpus, AbstractTask
from s5eqx.models import LanguageModel, SequenceParallel
from s5eqx.models._pieces import row_keys
from s5eqx.nn import buffer_mask
from s5eqx.train._leaves import is_array_or_shape, trainable
from s5eqx.train.feed import to_devices
from s5eqx.train.gradient import Scorer
from s5eqx.train.loss import Score, next_token, perplexity
from s5eqx.train.mesh import DATA, REPLICATED, SEQUENCE, check_mesh, on
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
    - `loss`: `(model, batch, *, key) -> Score`; its mean loss is what training lowers. `key` is one a sequence, or None
      in evaluation. For sequences of many thousand steps take `partial(next_token, chunk=2048)`, for a vocabulary of
      tens of thousands `partial(next_token, logits_chunk=128)`.
    - `mesh`: the devices to spread the work over, from `make_mesh`; `None` for one. Each holds the whole state.
      `batch_size` is that of all devices. The numbers are those of one device but for rounding, and for dropout where
      the length is split.
    - `compute_dtype`: of the dense maths, such as bfloat16. Parameters, recurrences, losses and the optimiser keep
      float32.
    - `accumulate`: compute the gradient of a step in so many parts, one after the other, to save memory.
    - `skip_nonfinite`: leave out so many updates in a row whose gradient is not finite. The schedule does not count
      them.
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
        mesh: Mesh | None = None,
        compute_dtype: DTypeLike | None = None,
        accumulate: int = 1,
        skip_nonfinite: int = 0,
    ):
        sizes = {
            "batch_size": batch_size,
            "steps_per_dispatch": steps_per_dispatch,
            "eval_batch_size": eval_batch_size,
            "accumulate": accumulate,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if batch_size % accumulate:
            raise ValueError(f"accumulate must divide batch_size={batch_size}, got {accumulate}")
        if skip_nonfinite < 0:
            raise ValueError(f"skip_nonfinite counts updates and must be at least 0, got {skip_nonfinite}")
        self.task, self.policy, self.seed, self.mesh = task, policy, seed, mesh
        self.batch_size, self.steps_per_dispatch, self.accumulate = batch_size, steps_per_dispatch, accumulate
        self.skip_nonfinite = skip_nonfinite
        if mesh is not None:
            check_mesh(mesh, {"batch_size / accumulate": batch_size // accumulate}, task.sequence_length)
        self.eval_batch_size = self._evaluated_at_once(eval_batch_size, task)
        self._scorer = Scorer(loss, mesh=mesh, compute_dtype=compute_dtype)

        key = jr.key(seed)
        skeleton = eqx.filter_eval_shape(build, jr.fold_in(key, INIT))
        if mesh is not None and mesh.shape[SEQUENCE] > 1:
            if not isinstance(skeleton, LanguageModel):
                raise ValueError(
                    f"a length can be split over devices in a LanguageModel, got {type(skeleton).__name__}; split the "
                    f"batch instead"
                )
            SequenceParallel(skeleton, SEQUENCE)  # refuses what it does not take, before anything is compiled
        self._optimiser = policy.optimiser(skeleton)
        if skip_nonfinite:
            self._optimiser = optax.apply_if_finite(self._optimiser, skip_nonfinite)

        def init(key):
            model = build(jr.fold_in(key, INIT))
            opt_state = self._optimiser.init(eqx.filter(model, eqx.is_inexact_array))
            return TrainState(jnp.int32(0), model, opt_state)

        self._everywhere = None if mesh is None else on(mesh, REPLICATED)
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._everywhere)
        shapes, self._static = eqx.partition(eqx.filter_eval_shape(init, key), is_array_or_shape)
        self.skeleton: TrainState = eqx.combine(jax.tree.map(place, shapes), self._static)
        self._treedef = jax.tree.structure(shapes)
        self._init = jax.jit(lambda key: self.flatten(init(key)), out_shardings=self._everywhere)
        self._run = jax.jit(self._dispatch, donate_argnums=0, out_shardings=self._everywhere)
        self._evaluate = jax.jit(self._test_score, static_argnums=4, out_shardings=self._everywhere)

    def flatten(self, state: TrainState) -> list[Array]:
        """The arrays of a state, in the order that `run` takes."""
        return jax.tree.leaves(eqx.filter(state, eqx.is_array))

    def unflatten(self, leaves: list[Array]) -> TrainState:
        """The state whose arrays are `leaves`."""
        return eqx.combine(jax.tree.unflatten(self._treedef, leaves), self._static)

    def init(self) -> list[Array]:
        """The leaves of the state before the first step. Compiled: thousands of small calls become one."""
        return self._init(jr.key(self.seed))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.task.sequence_length

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        params = trainable(self.skeleton.model)
        frozen = buffer_mask(params)
        sizes = jax.tree.map(lambda leaf, frozen: 0 if frozen else leaf.size, params, frozen)
        return sum(jax.tree.leaves(sizes))

    def model(self, state: TrainState) -> eqx.Module:
        """The model as it is evaluated and saved: without dropout, and with the parameters that the optimiser means."""
        params, rest = eqx.partition(state.model, eqx.is_inexact_array)
        params = self.policy.evaluated(params, state.opt_state)
        return eqx.nn.inference_mode(eqx.combine(params, rest))

    def batches(self, step: int) -> AbstractBatch | None:
        """What `run` takes for the steps from `step` on: the batches of a corpus, `None` for a task on the device."""
        if not isinstance(self.task, AbstractCorpus):
            return None
        first, count = step * self.batch_size, self.steps_per_dispatch * self.batch_size
        indices = first + np.arange(count, dtype=np.int64)
        return to_devices(self.task.train, indices.reshape(self.steps_per_dispatch, -1), self.mesh)

    def run(
        self, leaves: list[Array], batches: AbstractBatch | None = None
    ) -> tuple[list[Array], dict[str, Float[Array, " steps"]]]:
        """The next `steps_per_dispatch` steps. `leaves` are donated: use the returned ones.

        The metrics have one entry a step: `loss` and, for what can be right or wrong, `accuracy` (means a prediction),
        `grad_norm` (before clipping) and `lr/<group>`.
        """
        if batches is None and isinstance(self.task, AbstractCorpus):
            raise ValueError("a corpus lies on the host: pass its batches, trainer.batches(step)")
        return self._run(leaves, batches)

    def evaluate(
        self,
        leaves: list[Array],
        num_examples: int | None = None,
        *,
        task: AbstractTask | None = None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """The mean loss a prediction and, for what can be right or wrong, `accuracy` and `perplexity`, which is the
        exponential of the loss: of the first `num_examples` of the test, or of all.

        `task` is that of training if not given. Of another task the examples may be longer where the model takes them;
        `batch_size`, the examples that are evaluated at once, is `eval_batch_size` if not given.
        """
        task = self.task if task is None else task
        size = self.eval_batch_size if batch_size is None else self._evaluated_at_once(batch_size, task)
        count = task.num_test if num_examples is None else min(num_examples, task.num_test)
        if count < 1:
            raise ValueError(f"at least 1 example must be evaluated, got {num_examples} of {task.num_test}")

        def one(start: int) -> Score:
            indices = start + np.arange(size, dtype=np.int32)
            batch, made = None, task  # a corpus is read here, another task makes its examples on the device
            if isinstance(task, AbstractCorpus):
                batch, made = to_devices(task.test, indices, self.mesh), None
            return self._evaluate(leaves, batch, indices, np.int32(count), made)

        scores = [one(start) for start in range(0, count, size)]
        total = sum(scores[1:], start=scores[0])
        means = {name: float(mean) for name, mean in total.means.items()}
        return means | ({"perplexity": perplexity(means["loss"])} if "accuracy" in means else {})

    def _evaluated_at_once(self, batch_size, task):
        """No more than there are, and as many for each device."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        rows = 1 if self.mesh is None else self.mesh.shape[DATA]
        return -(-min(batch_size, task.num_test) // rows) * rows

    def _dispatch(self, leaves, batches):
        if batches is None:
            steps = self.unflatten(leaves).step + jnp.arange(self.steps_per_dispatch, dtype=jnp.int32)
            batches = jax.vmap(lambda step: self.task.train_batch(step, self.batch_size))(steps)
        return jax.lax.scan(lambda leaves, batch: self._step(leaves, batch), leaves, batches)

    def _step(self, leaves, batch):
        state = self.unflatten(leaves)
        key = jr.fold_in(jr.fold_in(jr.key(self.seed), DROPOUT), state.step)
        keys = row_keys(key, self.batch_size)
        score, grads = self._scorer.gradient(state.model, batch, keys, parts=self.accumulate)
        params = eqx.filter(state.model, eqx.is_inexact_array)
        updates, opt_state = self._optimiser.update(grads, state.opt_state, params)
        model = eqx.apply_updates(state.model, updates)
        # The optimiser does not count what it leaves out.
        left_out = state.opt_state.total_notfinite if self.skip_nonfinite else 0
        rates = self.policy.learning_rates(state.step - left_out)
        metrics = {
            **score.means,
            "grad_norm": optax.tree.norm(grads),
            **{f"lr/{name}": jnp.asarray(rate, jnp.float32) for name, rate in rates.items()},
        }
        return self.flatten(TrainState(state.step + 1, model, opt_state)), metrics

    def _test_score(self, leaves, batch, indices, stop, task):
        batch = task.test(indices) if batch is None else batch
        inside = (indices < stop).reshape(-1, *(1,) * (batch.weights.ndim - 1))
        batch = eqx.tree_at(lambda b: b.weights, batch, jnp.where(inside, batch.weights, 0))
        return self._scorer.score(self.model(self.unflatten(leaves)), batch)
