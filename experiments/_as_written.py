"""A training step of the Hyena-S5 language model as its research code writes it, in plain JAX.

It shares with s5eqx the weights and the data alone, and is what `bench_train.py` measures s5eqx against, as does
`bench_layer.py` with its recurrence. Batched dense layers, complex matrices applied by a mapped matrix-vector product,
an associative scan over tiled eigenvalues mapped over the batch, a grouped convolution that pads both ends and is cut,
channels before time between the convolution and the last gate, a variance that is the mean of squares less the square
of the mean, optax's AdamW for each group.

Source: lindermanlab/S5, branch `development`, and Flax's `Dense`, `Conv`, `LayerNorm` and `Embed`, which it calls.

Differs from the reference: no dropout, as in its recipe for recall; `expm1` in the discretisation and the parameter
groups of `DefaultGroups`, since the losses of the two are compared; no state is returned; the step is not under `pmap`.
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

RECURRENCE = ("Lambda_re", "Lambda_im", "log_step", "B", "C", "D")


def weights(model):
    """The weights of a `LanguageModel` of `hyena_s5` layers of order 2 with `HalfGLU2`, as a tree of dictionaries."""

    def dense(layer):
        return {"kernel": layer.weight.T, "bias": layer.bias}

    def norm(layer):
        return {"scale": layer.weight, "bias": layer.bias}

    def block(block):
        (s5,) = block.mixer.bank.operators()
        recurrence = dict(zip(RECURRENCE, (s5.Lambda_re, s5.Lambda_im, s5.log_Delta, s5.B, s5.C, s5.D), strict=True))
        mixer = {
            "in_proj": dense(block.mixer.in_proj),
            "short_filter": {"kernel": block.mixer.short_conv.weight[:, None], "bias": block.mixer.short_conv.bias},
            "ssm": {**recurrence, "out2": dense(s5.activation.out2)},
            "out_proj": dense(block.mixer.out_proj),
        }
        mlp = {"fc1": dense(block.mlp.fc1), "fc2": dense(block.mlp.fc2)}
        return {"norm1": norm(block.norm1), "mixer": mixer, "norm2": norm(block.norm2), "mlp": mlp}

    blocks = [block(b) for b in model.backbone.blocks]
    return {"embedding": model.embedding, "blocks": blocks, "norm": norm(model.backbone.norm)}


def dense(w, x):
    return x @ w["kernel"] + w["bias"]


def layer_norm(w, x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.maximum(0.0, jnp.mean(x * x, axis=-1, keepdims=True) - mean * mean)
    return (x - mean) * (jax.lax.rsqrt(var + 1e-5) * w["scale"]) + w["bias"]


def short_filter(w, x):
    """Both ends are padded; what looks ahead is cut off."""
    taps, _, width = w["kernel"].shape
    y = jax.lax.conv_general_dilated(
        x,
        w["kernel"],
        window_strides=(1,),
        padding=[(taps - 1, taps - 1)],
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=width,
    )
    return (y + w["bias"])[:, : x.shape[1]]


def recurrence(u, Lambda_bar, B_bar, C, D):
    """One sequence, (L, H)."""

    def combine(early, late):
        return late[0] * early[0], late[0] * early[1] + late[1]

    Lambda_elements = jnp.tile(Lambda_bar, (len(u), 1))
    Bu_elements = jax.vmap(lambda u_t: B_bar @ u_t)(u)
    _, x = jax.lax.associative_scan(combine, (Lambda_elements, Bu_elements))
    return jax.vmap(lambda x_t: (C @ x_t).real)(x) + D * u


recurrences = jax.vmap(recurrence, in_axes=(0, None, None, None, None))


def ssm(w, u):
    """A batch with channels before time, (batch, H, L); the states stand for one of each conjugate pair."""
    Lambda = jnp.minimum(w["Lambda_re"], -1e-4) + 1j * w["Lambda_im"]
    z = Lambda * jnp.exp(w["log_step"])
    B, C = (w[name][..., 0] + 1j * w[name][..., 1] for name in "BC")
    B_bar = (jnp.expm1(z) / Lambda)[:, None] * B
    y = recurrences(u.swapaxes(1, 2), jnp.exp(z), B_bar, 2 * C, w["D"])
    y = y * jax.nn.sigmoid(dense(w["out2"], jax.nn.gelu(y, approximate=False)))
    return y.swapaxes(1, 2)


def mixer(w, u):
    z = short_filter(w["short_filter"], dense(w["in_proj"], u)).swapaxes(1, 2)
    x_0, x_1, v = jnp.split(z, 3, axis=1)
    v = ssm(w["ssm"], v * x_1)
    return dense(w["out_proj"], (v * x_0).swapaxes(1, 2))


def mlp(w, x):
    return dense(w["fc2"], jax.nn.gelu(dense(w["fc1"], x), approximate=True))


def logits(w, tokens):
    """(batch, L) tokens; the residual sum is carried beside the branch."""
    h, residual = jnp.take(w["embedding"], tokens, axis=0), 0.0
    for block in w["blocks"]:
        residual = h + residual
        h = mixer(block["mixer"], layer_norm(block["norm1"], residual))
        residual = h + residual
        h = mlp(block["mlp"], layer_norm(block["norm2"], residual))
    return layer_norm(w["norm"], h + residual) @ w["embedding"].T


def loss(w, batch):
    nll = optax.softmax_cross_entropy_with_integer_labels(logits(w, batch.inputs), batch.targets)
    return jnp.sum(nll * batch.weights) / jnp.maximum(jnp.sum(batch.weights), 1)


def optimiser(w, schedule, *, weight_decay):
    """AdamW in the three groups of `DefaultGroups`: only matrices outside the recurrence decay."""

    def label(path, leaf):
        recurrent = path[-1].key in RECURRENCE
        return "decay" if leaf.ndim >= 2 and not recurrent else "recurrence" if recurrent else "plain"

    plain = optax.adamw(schedule, weight_decay=0.0)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "decay": optax.adamw(schedule, weight_decay=weight_decay),
        "plain": plain,
        "recurrence": plain,
    }
    return optax.multi_transform(groups, jax.tree_util.tree_map_with_path(label, w))


def training(w, task, schedule, *, weight_decay, batch_size, steps):
    """The state before the first step, and `run(state) -> (state, losses)` of the next `steps` steps, to be jitted."""
    tx = optimiser(w, schedule, weight_decay=weight_decay)

    def step(state, batch):
        w, opt_state = state
        value, grads = jax.value_and_grad(loss)(w, batch)
        updates, opt_state = tx.update(grads, opt_state, w)
        return [optax.apply_updates(w, updates), opt_state], value

    def run(state):
        start, *state = state
        numbers = start + jnp.arange(steps, dtype=jnp.int32)
        batches = jax.vmap(lambda number: task.train_batch(number, batch_size))(numbers)
        state, losses = jax.lax.scan(step, state, batches)
        return [start + steps, *state], losses

    return [jnp.int32(0), w, tx.init(w)], run
