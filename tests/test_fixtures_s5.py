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


def cross_entropy(logits, targets):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def in_steps(mixer, x):
    # A lambda, since Equinox hashes a bound method by its module's arrays.
    return jax.lax.scan(lambda state, x_t: mixer.step(state, x_t), mixer.init_state(), x)


@quick_jit
def run_layer(layer, u, cot, step):
    """Output, gradients of sum(cot y) by name and of u, and if asked the final state and output step by step."""

    def loss(layer_and_u):
        layer, u = layer_and_u
        y = jax.vmap(layer)(u)
        return jnp.sum(cot * y), y

    (gradient, gradient_u), y = eqx.filter_grad(loss, has_aux=True)((layer, u))
    return y, to_s5(gradient), gradient_u, jax.vmap(lambda u: in_steps(layer, u))(u) if step else None


def check_layer(name, dtype):
    """What all layers share: also their steps where the file has the final state; of all others the law of a mixer is
    the test. Returns the file and the layer."""
    fixture = Fixture(name)
    layer = fixture.load(fixture.params(dtype))
    y, gradient, gradient_u, steps = run_layer(layer, *fixture.inputs(dtype, "u", "cot"), "out/final_state" in fixture)
    fixture.check("out/y", y)
    fixture.check("grad/in/u", gradient_u)
    fixture.check_gradient(gradient)
    if steps is not None:
        state, y_step = steps
        fixture.check("out/y", y_step)
        (filter_state,) = [s for s in jax.tree.leaves(state) if jnp.iscomplexobj(s)]
        fixture.check("out/final_state", filter_state)
    return fixture, layer


@quick_jit
def run_model(model, tokens, targets):
    """Loss, its gradient by name, logits, and the backbone's output."""

    def loss(model):
        hidden = jax.vmap(model.hidden)(tokens)
        logits = model.unembed(hidden)
        return cross_entropy(logits, targets), (logits, hidden)

    (value, aux), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return value, to_s5(gradient), *aux


@pytest.mark.parametrize(
    "name",
    but_slow(
        names("s5ssm_*"),
        "s5ssm_cplx_conj1_clip0_full_glu",
        "s5ssm_cplx_conj1_clip1_half_glu2",
        "s5ssm_lecun_conj0_clip1_full_glu",
        "s5ssm_lecun_conj1_clip1_half_glu2",
        "s5ssm_trunc_conj0_clip0_half_glu2",
        "s5ssm_trunc_conj1_clip1_gelu",
    ),
)
def test_ssm(name, dtype):
    fixture, layer = check_layer(name, dtype)
    Lambda_bar, B_bar, C_tilde = quick_jit(S5.discretised)(layer)
    fixture.check("out/Lambda_bar", Lambda_bar)
    fixture.check("out/B_bar", B_bar)
    fixture.check("out/C_tilde", np.asarray(C_tilde) / (2 if layer.conj_sym else 1))


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


@pytest.mark.parametrize(
    "name",
    but_slow(
        [n for n in names("s5op_*") if not n.endswith("inner2")],
        "s5op_o2_sf0",
        "s5op_o2_sf3",
        "s5op_o2_sf3_short_input",
    ),
)
def test_operator(name, dtype):
    check_layer(name, dtype)


@pytest.mark.parametrize(
    "name",
    but_slow(
        [n for n in names("hyenaop_*") if not n.endswith("gelu")], "hyenaop_o2", "hyenaop_o2_l30_lmax48", "hyenaop_o3"
    ),
)
def test_hyena_operator(name, dtype):
    fixture, layer = check_layer(name, dtype)
    kernels = np.asarray(quick_jit(ImplicitFilter.kernels)(layer.bank))
    # Operator by operator; theirs are channel by channel.
    filters = np.moveaxis(kernels, 0, 2).reshape(1, kernels.shape[1], -1)
    fixture.check("out/filter_k", filters[:, : fixture.config["L"]])


@pytest.mark.parametrize("name", but_slow(names("lm_*"), "lm_hyena", "lm_s5", "lm_s5_cplx"))
def test_language_model(name, dtype):
    fixture = Fixture(name)
    model = fixture.load(fixture.params(dtype))
    tokens = fixture.inputs(np.int32, "input_ids", "targets")
    loss, gradient, logits, hidden = run_model(model, *tokens)
    fixture.check("out/loss", loss)
    fixture.check("out/logits", logits)
    fixture.check("out/backbone_hidden", hidden)
    fixture.check_gradient(gradient)


def train(fixture):
    """The parameters before, those after one step of AdamW a batch, the loss of each step, and the policy."""
    params = fixture.params(np.float64)
    settings = fixture.config["train"]
    groups = PublishedGroups(
        lr=settings["lr"],
        ssm_lr=settings["implicit_filter_lr"],
        schedule=PublishedCosine(settings["total_steps"], settings["warmup_steps"]),
        weight_decay=settings["weight_decay"],
        ssm_weight_decay=settings["implicit_filter_weight_decay"],
    )
    batches = fixture.inputs(np.int32, "input_ids", "targets")
    return params, *run_steps(groups, fixture.load(params), *batches), groups


@quick_jit
def run_steps(groups, model, tokens, targets):
    optimiser = groups.optimiser(model)
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def step(carry, batch):
        (params, opt_state), (tokens, targets) = carry, batch
        loss = lambda params: cross_entropy(jax.vmap(eqx.combine(params, rest))(tokens), targets)
        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimiser.update(gradient, opt_state, params)
        return (eqx.apply_updates(params, updates), opt_state), value

    (params, _), losses = jax.lax.scan(step, (params, optimiser.init(params)), (tokens, targets))
    return to_s5(eqx.combine(params, rest)), losses


@pytest.mark.parametrize("name", ["opt_s5", slow("opt_hyena")])
def test_optimiser(name, x64):
    fixture = Fixture(name)
    start, end, losses, groups = train(fixture)
    np.testing.assert_allclose(losses, fixture["out64/loss_per_step"], rtol=1e-8)
    rates = quick_jit(jax.vmap(lambda s: groups.learning_rates(s)["rest"]))(np.arange(3))
    np.testing.assert_allclose(rates, fixture["out64/lr_per_step"], rtol=1e-8)
    for path, p in start.items():
        change = fixture[f"out64/param_after_step3/{path}"] - p
        assert relative_error(np.asarray(end[path]) - p, change) <= 1e-8, path


def test_complex_C_does_not_learn_in_the_reference_but_does_here(x64):
    """Adam receives i times the gradient of C[..., 0] for C[..., 1], so that the two halves cancel in the sum."""
    fixture = Fixture("opt_s5_cplx")
    start, end, losses, groups = train(fixture)
    assert not any(jnp.iscomplexobj(p) for p in end.values())
    # The first update has rate 0, so only the third loss can feel the defect.
    np.testing.assert_allclose(np.asarray(losses)[:2], fixture["out64/loss_per_step"][:2], rtol=1e-8)

    decay = np.prod([1 - groups.weight_decay * lr for lr in fixture["out64/lr_per_step"]])
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
