"""Our S5, Hyena-S5 and language model against numbers computed by the S5 branch: outputs and every gradient.

An error is the largest absolute difference over the largest absolute value of the float64 array. In float64 it is
1e-8 at most; in float32 the larger of 2e-5 and four times the reference's own distance from float64.
"""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s5eqx.interop import from_s5, layer_from_s5, to_s5
from s5eqx.nn import diagonalise, hippo_legs_normal
from s5eqx.train import PublishedCosine, PublishedGroups, WarmupConstant

FOLDER = Path(__file__).parent / "fixtures" / "s5"


class Fixture:
    """One file: its configuration, and its arrays by kind."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, path):
        return self.arrays[path]

    def __contains__(self, path):
        return path in self.arrays

    def params(self, dtype, prefix="param/"):
        complex_dtype = jnp.result_type(dtype, jnp.complex64)
        arrays = {p.removeprefix(prefix): a for p, a in self.arrays.items() if p.startswith(prefix)}
        return {p: a.astype(complex_dtype if np.iscomplexobj(a) else dtype) for p, a in arrays.items()}

    def inputs(self, dtype, *names):
        return [jnp.asarray(self[f"in/{name}"], dtype) for name in names]

    def check(self, path, ours, of=None):
        """Compares with `out64/y`, say, for the path `out/y`."""
        root, name = path.split("/", 1)
        target, single = (of(self[f"{r}/{name}"]) if of else self[f"{r}/{name}"] for r in (f"{root}64", root))
        assert ours.shape == target.shape, path
        scale = np.max(np.abs(target)) or 1.0
        double = ours.dtype in (jnp.float64, jnp.complex128)
        bound = 1e-8 if double else max(2e-5, 4 * np.max(np.abs(single - target)) / scale)
        assert np.max(np.abs(ours - target)) <= bound * scale, path

    def check_gradients(self, gradient):
        ours = to_s5(gradient)
        assert ours.keys() == self.params(np.float32, "grad64/param/").keys()
        for path, g in ours.items():
            complex_C = np.iscomplexobj(self[f"param/{path}"])
            self.check(f"grad/param/{path}", g, of=true_gradient if complex_C else None)


def true_gradient(g):
    """Of the pairs (re, im) of C~ = C[..., 0] + i C[..., 1], from JAX's conjugate one of a complex C."""
    return np.stack([g[..., 0].real, -g[..., 0].imag], axis=-1)


def effective_C(C):
    return C[..., 0] + 1j * C[..., 1]


def named(pattern):
    names = sorted(path.stem for path in FOLDER.glob(f"{pattern}.npz"))
    assert names, f"no fixture {pattern} in {FOLDER}"
    return pytest.mark.parametrize("name", [n for n in names if not n.endswith("inner2")])


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return np.dtype(request.param)


@eqx.filter_jit
def run_layer(layer, u, cot):
    """Output, gradients of sum(cot y), and the final state and output step by step."""

    def loss(layer_and_u):
        layer, u = layer_and_u
        y = jax.vmap(layer)(u)
        return jnp.sum(cot * y), y

    gradients, y = eqx.filter_grad(loss, has_aux=True)((layer, u))
    state, y_step = jax.vmap(lambda u: jax.lax.scan(layer.step, layer.init_state(), u))(u)
    return y, gradients, state, y_step


@eqx.filter_jit
def run_model(model, tokens, targets):
    """Loss, logits and their gradient, the backbone's output, and the logits step by step."""

    def loss(model):
        logits = jax.vmap(model)(tokens)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets)), logits

    (value, logits), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    hidden = jax.vmap(lambda ids: model.backbone(model.embed(ids)))(tokens)
    logits_step = jax.vmap(lambda ids: jax.lax.scan(model.step, model.init_state(), ids)[1])(tokens)
    return value, logits, gradient, hidden, logits_step


@named("s5ssm_*")
def test_ssm(name, dtype):
    fixture = Fixture(name)
    layer = layer_from_s5("ssm", fixture.params(dtype), fixture.config)
    y, (gradient, gradient_u), state, y_step = run_layer(layer, *fixture.inputs(dtype, "u", "cot"))
    fixture.check("out/y", y)
    fixture.check("out/y", y_step)
    fixture.check("out/final_state", state)
    fixture.check("grad/in/u", gradient_u)
    fixture.check_gradients(gradient)

    Lambda_bar, B_bar, C_tilde = layer.discretised()
    fixture.check("out/Lambda_bar", Lambda_bar)
    fixture.check("out/B_bar", B_bar)
    fixture.check("out/C_tilde", C_tilde / (2 if layer.conj_sym else 1))


@named("s5ssm_*")
def test_initial_eigenvalues(name):
    fixture = Fixture(name)
    size, blocks = fixture.config["ssm_size"], fixture.config["blocks"]
    S = hippo_legs_normal(size // blocks)
    Lambda, V, Vinv = diagonalise(size, blocks, conj_sym=fixture.config["ssm_args"]["conj_sym"])
    np.testing.assert_allclose(S, fixture["init/A_normal_part"], rtol=1e-6)
    np.testing.assert_allclose(Lambda, fixture["init64/Lambda"], rtol=1e-12)
    # The phases of eigenvectors are free: two identities say that V is a right one.
    np.testing.assert_allclose(Vinv @ V, np.eye(len(Lambda)), atol=1e-12)
    np.testing.assert_allclose(np.kron(np.eye(blocks), S) @ V, V * Lambda, atol=1e-12)
    assert V.shape == fixture["init/V"].shape and Vinv.shape == fixture["init/Vinv"].shape


@named("s5op_*")
def test_operator(name, dtype):
    fixture = Fixture(name)
    layer = layer_from_s5("s5_operator", fixture.params(dtype), fixture.config)
    y, (gradient, gradient_u), state, y_step = run_layer(layer, *fixture.inputs(dtype, "u", "cot"))
    fixture.check("out/y", y)
    fixture.check("out/y", y_step)  # also where the reference's own step leaves the short convolution out
    fixture.check("grad/in/u", gradient_u)
    fixture.check_gradients(gradient)
    if "out/final_state" in fixture:
        (filter_state,) = [s for s in jax.tree.leaves(state) if jnp.iscomplexobj(s)]
        fixture.check("out/final_state", filter_state)


@named("lm_s5*")
def test_language_model(name, dtype):
    fixture = Fixture(name)
    model = from_s5(fixture.params(dtype), fixture.config)
    tokens = fixture.inputs(np.int32, "input_ids", "targets")
    loss, logits, gradient, hidden, logits_step = run_model(model, *tokens)
    fixture.check("out/loss", loss)
    fixture.check("out/logits", logits)
    fixture.check("out/logits", logits_step)
    fixture.check("out/backbone_hidden", hidden)
    fixture.check_gradients(gradient)


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

    @eqx.filter_jit
    def step(model, opt_state, tokens, targets):
        def loss(model):
            logits = jax.vmap(model)(tokens)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, opt_state = optimiser.update(gradient, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, value

    losses = []
    for batch in zip(*fixture.inputs(np.int32, "input_ids", "targets"), strict=True):
        model, opt_state, value = step(model, opt_state, *batch)
        losses.append(value)
    return model, np.asarray(losses), groups


def test_optimiser(x64):
    fixture = Fixture("opt_s5")
    model = from_s5(fixture.params(np.float64), fixture.config)
    trained, losses, groups = train(model, fixture)
    np.testing.assert_allclose(losses, fixture["out64/loss_per_step"], rtol=1e-8)
    rates = [groups.learning_rates(s)["rest"] for s in range(3)]
    np.testing.assert_allclose(rates, fixture["out64/lr_per_step"], rtol=1e-8)
    start, end = to_s5(model), to_s5(trained)
    for path, p in start.items():
        change = fixture[f"out64/param_after_step3/{path}"] - p
        np.testing.assert_allclose(end[path] - p, change, atol=1e-8 * np.max(np.abs(change)), err_msg=path)


def test_complex_C_does_not_learn_in_the_reference_but_does_here(x64):
    """Adam receives i times the gradient of C[..., 0] for C[..., 1], so that the two halves cancel in the sum."""
    fixture = Fixture("opt_s5_cplx")
    model = from_s5(fixture.params(np.float64), fixture.config)
    trained, losses, groups = train(model, fixture)
    assert not any(jnp.iscomplexobj(p) for p in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    # The first update has rate 0, so only the third loss can feel the defect.
    np.testing.assert_allclose(losses[:2], fixture["out64/loss_per_step"][:2], rtol=1e-8)

    decay = np.prod([1 - groups.weight_decay * lr for lr in fixture["out64/lr_per_step"]])
    start, end = to_s5(model), to_s5(trained)
    for path in (p for p in start if p.endswith("/C")):
        theirs = effective_C(fixture[f"out64/param_after_step3/{path}"])
        before, ours = (np.asarray(effective_C(params[path])) for params in (start, end))
        np.testing.assert_allclose(theirs, decay * before, rtol=0, atol=1e-7)
        assert np.median(np.abs(ours - decay * before)) > 1e-3


@pytest.mark.parametrize("case", range(3))
def test_schedule(case, x64):
    fixture = Fixture.__new__(Fixture)
    with np.load(FOLDER / "schedule.npz") as file:
        config = json.loads(str(file[f"{case}/config"]))
        steps, lr = file[f"{case}/steps"], file[f"{case}/lr"]
    schedules = {
        "cosine": PublishedCosine(config["total_steps"], config["warmup_steps"]),
        "constant": WarmupConstant(config["warmup_steps"]),
    }
    schedule = schedules[config["lr_schedule"]](config["lr"])
    np.testing.assert_allclose(jax.vmap(schedule)(steps), lr, rtol=1e-6, atol=1e-12)
