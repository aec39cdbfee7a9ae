"""S5, Hyena-S5, Hyena and the language models against the S5 branch's own numbers: outputs and every gradient."""

import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import but_slow, quick_jit, relative_error, slow, to_complex
from s5_fixture import FOLDER, Fixture, names

from s5eqx.interop import to_s5
from s5eqx.nn import S5, ImplicitFilter, diagonalise, hippo_legs_normal
from s5eqx.train import PublishedCosine, PublishedGroups, WarmupConstant


def test_every_file_is_run():
    """Those of these kinds by the patterns below; what two of them cannot be read for is in `test_interop.py`."""
    kinds = [names(f"{kind}_*") for kind in ("s5ssm", "s5op", "hyenaop", "lm", "opt")]
    others = ["schedule", "init_stats", "synthetic_data"]  # the last two in other files of tests
    assert sorted([*itertools.chain(*kinds), *others]) == names("*")


def cross_entropy(model, tokens, targets):
    logits = jax.vmap(model)(tokens)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets)), logits


def in_steps(mixer, x):
    # A lambda, since Equinox hashes a bound method by its module's arrays.
    return jax.lax.scan(lambda state, x_t: mixer.step(state, x_t), mixer.init_state(), x)


@quick_jit
def run_layer(layer, u, cot):
    """Output, gradients of sum(cot y), and the final state and output step by step."""

    def loss(layer_and_u):
        layer, u = layer_and_u
        y = jax.vmap(layer)(u)
        return jnp.sum(cot * y), y

    gradients, y = eqx.filter_grad(loss, has_aux=True)((layer, u))
    state, y_step = jax.vmap(lambda u: in_steps(layer, u))(u)
    return y, gradients, state, y_step


@quick_jit
def run_model(model, tokens, targets):
    """Loss, logits and their gradient, the backbone's output, and the logits step by step."""
    value_and_grad = eqx.filter_value_and_grad(cross_entropy, has_aux=True)
    (loss, logits), gradient = value_and_grad(model, tokens, targets)
    hidden = jax.vmap(lambda ids: model.backbone(model.embed(ids)))(tokens)
    _, logits_step = jax.vmap(lambda ids: in_steps(model, ids))(tokens)
    return loss, logits, gradient, hidden, logits_step


@pytest.mark.parametrize(
    "name", but_slow(names("s5ssm_*"), "s5ssm_lecun_conj1_clip1_half_glu2", "s5ssm_trunc_conj1_clip1_gelu")
)
def test_ssm(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    y, (gradient, gradient_u), state, y_step = run_layer(layer, *fixture.inputs(dtype, "u", "cot"))
    fixture.check("out/y", y)
    fixture.check("out/y", y_step)
    fixture.check("out/final_state", state)
    fixture.check("grad/in/u", gradient_u)
    fixture.check_gradient(gradient)

    Lambda_bar, B_bar, C_tilde = quick_jit(S5.discretised)(layer)
    fixture.check("out/Lambda_bar", Lambda_bar)
    fixture.check("out/B_bar", B_bar)
    fixture.check("out/C_tilde", C_tilde / (2 if layer.conj_sym else 1))


@pytest.mark.smoke
@pytest.mark.parametrize("name", names("s5ssm_*"))
def test_initial_eigenvalues(name):
    fixture = Fixture(name)
    size, blocks = fixture.config["ssm_size"], fixture.config["blocks"]
    S = hippo_legs_normal(size // blocks)
    Lambda, V, Vinv = diagonalise(size, blocks, conj_sym=fixture.config["ssm_args"]["conj_sym"])
    np.testing.assert_allclose(S, fixture["init/A_normal_part"], rtol=2e-6)
    np.testing.assert_allclose(Lambda, fixture["init64/Lambda"], rtol=1e-12)
    # The phases of eigenvectors are free: two identities say that V is a right one.
    np.testing.assert_allclose(Vinv @ V, np.eye(len(Lambda)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.kron(np.eye(blocks), S) @ V, V * Lambda, rtol=0, atol=1e-12)
    assert V.shape == fixture["init/V"].shape and Vinv.shape == fixture["init/Vinv"].shape


@pytest.mark.parametrize("name", but_slow([n for n in names("s5op_*") if not n.endswith("inner2")], "s5op_o2_sf3"))
def test_operator(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    y, (gradient, gradient_u), state, y_step = run_layer(layer, *fixture.inputs(dtype, "u", "cot"))
    fixture.check("out/y", y)
    fixture.check("out/y", y_step)  # also where the reference's own step leaves the short convolution out
    fixture.check("grad/in/u", gradient_u)
    fixture.check_gradient(gradient)
    if "out/final_state" in fixture:
        (filter_state,) = [s for s in jax.tree.leaves(state) if jnp.iscomplexobj(s)]
        fixture.check("out/final_state", filter_state)


@pytest.mark.parametrize("name", but_slow([n for n in names("hyenaop_*") if not n.endswith("gelu")], "hyenaop_o2"))
def test_hyena_operator(name, dtype):
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    y, (gradient, gradient_u), _, y_step = run_layer(layer, *fixture.inputs(dtype, "u", "cot"))
    fixture.check("out/y", y)
    fixture.check("out/y", y_step)
    fixture.check("grad/in/u", gradient_u)
    fixture.check_gradient(gradient)
    kernels = quick_jit(ImplicitFilter.kernels)(layer.bank)  # operator by operator; theirs are channel by channel
    filters = jnp.moveaxis(kernels, 0, 2).reshape(1, kernels.shape[1], -1)
    fixture.check("out/filter_k", filters[:, : fixture.config["L"]])


@pytest.mark.parametrize("name", but_slow(names("lm_*"), "lm_s5", "lm_s5_cplx"))
def test_language_model(name, dtype):
    fixture = Fixture(name)
    model = fixture.load(fixture.params(dtype))
    tokens = fixture.inputs(np.int32, "input_ids", "targets")
    loss, logits, gradient, hidden, logits_step = run_model(model, *tokens)
    fixture.check("out/loss", loss)
    fixture.check("out/logits", logits)
    fixture.check("out/logits", logits_step)
    fixture.check("out/backbone_hidden", hidden)
    fixture.check_gradient(gradient)


def train(model, fixture):
    """The model after one step of AdamW a batch, the loss of each step, and the policy."""
    settings = fixture.config["train"]
    groups = PublishedGroups(
        lr=settings["lr"],
        ssm_lr=settings["implicit_filter_lr"],
        schedule=PublishedCosine(settings["total_steps"], settings["warmup_steps"]),
        weight_decay=settings["weight_decay"],
        ssm_weight_decay=settings["implicit_filter_weight_decay"],
    )
    optimiser = groups.optimiser(model)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @quick_jit
    def step(model, opt_state, tokens, targets):
        value_and_grad = eqx.filter_value_and_grad(cross_entropy, has_aux=True)
        (loss, _), gradient = value_and_grad(model, tokens, targets)
        updates, opt_state = optimiser.update(gradient, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    losses = []
    for batch in zip(*fixture.inputs(np.int32, "input_ids", "targets"), strict=True):
        model, opt_state, loss = step(model, opt_state, *batch)
        losses.append(loss)
    return model, np.asarray(losses), groups


@pytest.mark.parametrize("name", ["opt_s5", slow("opt_hyena")])
def test_optimiser(name, x64):
    fixture = Fixture(name)
    model = fixture.load(fixture.params(np.float64))
    trained, losses, groups = train(model, fixture)
    np.testing.assert_allclose(losses, fixture["out64/loss_per_step"], rtol=1e-8)
    rates = [groups.learning_rates(s)["rest"] for s in range(3)]
    np.testing.assert_allclose(rates, fixture["out64/lr_per_step"], rtol=1e-8)
    start, end = to_s5(model), to_s5(trained)
    for path, p in start.items():
        change = fixture[f"out64/param_after_step3/{path}"] - p
        assert relative_error(end[path] - p, change) <= 1e-8, path


def test_complex_C_does_not_learn_in_the_reference_but_does_here(x64):
    """Adam receives i times the gradient of C[..., 0] for C[..., 1], so that the two halves cancel in the sum."""
    fixture = Fixture("opt_s5_cplx")
    model = fixture.load(fixture.params(np.float64))
    trained, losses, groups = train(model, fixture)
    assert not any(jnp.iscomplexobj(p) for p in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    # The first update has rate 0, so only the third loss can feel the defect.
    np.testing.assert_allclose(losses[:2], fixture["out64/loss_per_step"][:2], rtol=1e-8)

    decay = np.prod([1 - groups.weight_decay * lr for lr in fixture["out64/lr_per_step"]])
    start, end = to_s5(model), to_s5(trained)
    for path in (p for p in start if p.endswith("/C")):
        theirs = to_complex(fixture[f"out64/param_after_step3/{path}"])
        before, ours = to_complex(start[path]), to_complex(end[path])
        np.testing.assert_allclose(theirs, decay * before, rtol=0, atol=1e-7)
        assert np.median(np.abs(ours - decay * before)) > 1e-3


@pytest.mark.smoke
@pytest.mark.parametrize("case", range(3))
def test_schedule(case):
    with np.load(FOLDER / "schedule.npz") as file:
        config = json.loads(str(file[f"{case}/config"]))
        steps, lr = file[f"{case}/steps"], file[f"{case}/lr"]
    schedules = {
        "cosine": PublishedCosine(config["total_steps"], config["warmup_steps"]),
        "constant": WarmupConstant(config["warmup_steps"]),
    }
    schedule = schedules[config["lr_schedule"]](config["lr"])
    np.testing.assert_allclose(jax.vmap(schedule)(steps.astype(np.float32)), lr, rtol=1e-6, atol=1e-12)
