"""The native module: what is said about it, what it refuses, every instruction set, and life without it."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s5eqx
from s5eqx.ops import _native

TESTS = Path(__file__).parent
CPU = s5eqx.backends()[0]
native = pytest.mark.skipif(not CPU.live, reason=CPU.detail)


def run_python(code, *path, **environment):
    """A fresh interpreter that finds modules in `path` first."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("S5EQX_")}
    clean |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-P", "-c", code]  # -P: not from the current folder
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)


def test_backends_say_what_is_live():
    cpu, cuda = s5eqx.backends()
    assert (cpu.platform, cuda.platform) == ("cpu", "cuda")
    for backend in (cpu, cuda):
        assert backend.detail and "\n" not in backend.detail
    assert not cpu.live or cpu.detail.startswith("native kernels, ")


def test_show_config(capsys, monkeypatch):
    monkeypatch.setenv("S5EQX_SOMETHING", "17")
    s5eqx.show_config()
    lines = capsys.readouterr().out.splitlines()
    for start in ("s5eqx ", "python ", "FFI ", "cpu ", "cuda "):
        assert sum(line.startswith(start) for line in lines) == 1
    text = "\n".join(lines)
    for part in (platform.python_version(), f"jax {jax.__version__}", "equinox", CPU.detail, "S5EQX_SOMETHING=17"):
        assert part in text


@native
def test_a_module_newer_than_the_runtime_is_not_registered(monkeypatch):
    """It would register without complaint and break every computation of the process."""
    monkeypatch.setattr(_native, "_runtime_ffi_api", lambda: (0, 0))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", pytest.fail)
    backend = _native._load("cpu", "_cpu")
    assert not backend.live and "newer than jaxlib's (0, 0): rebuild" in backend.detail


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """The package beside a setup.py, as in a checkout where nothing was built."""
    root = tmp_path_factory.mktemp("checkout")
    skipped = shutil.ignore_patterns("*.so", "*.pyd", "_*.txt", "__pycache__")
    shutil.copytree(Path(s5eqx.__file__).parent, root / "s5eqx", ignore=skipped)
    (root / "setup.py").touch()
    return root


WITHOUT_EDITABLE_INSTALL = """
import sys  # whose finder would lend its module to the copy
sys.meta_path = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
"""
WITHOUT_KERNELS = """
import jax, jax.numpy as jnp, s5eqx
cpu, cuda = s5eqx.backends()
assert not cpu.live and not cuda.live
gradient = jax.grad(lambda b: s5eqx.ops.diagonal_scan(jnp.full(2, 0.5), b)[-1].sum())(jnp.ones((3, 2)))
assert gradient[:, 0].tolist() == [0.25, 0.5, 1.0], gradient
try:
    with s5eqx.use_backend("native"):
        s5eqx.ops.diagonal_scan(jnp.ones(2), jnp.ones((3, 2)))
except RuntimeError as error:
    print(error)
print(cpu.detail)
"""


def test_a_source_tree_runs_on_plain_jax_and_says_why(source_tree):
    done = run_python(WITHOUT_EDITABLE_INSTALL + WITHOUT_KERNELS, source_tree)
    assert done.returncode == 0, done.stderr
    error, detail = done.stdout.splitlines()
    assert detail.startswith("source tree, not the installed package: run `pip install .`")
    assert detail in error and 'Use "auto"' in error


def test_required_kernels_that_are_missing_are_an_error(source_tree):
    done = run_python(WITHOUT_EDITABLE_INSTALL + "import s5eqx", source_tree, S5EQX_REQUIRE_NATIVE="1")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: S5EQX_REQUIRE_NATIVE=1, but the native CPU kernels are not live: source tree")


def test_a_module_that_does_not_load_is_reported(source_tree, tmp_path):
    shutil.copytree(source_tree, tmp_path / "broken")
    module = tmp_path / "broken" / "s5eqx" / "ops" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.write_bytes(b"not a library")
    done = run_python(WITHOUT_EDITABLE_INSTALL + WITHOUT_KERNELS, tmp_path / "broken")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("the module does not load: ")


def test_importing_s5eqx_imports_no_training_tools():
    heavy = (
        "optax",
        "orbax",
        "datasets",
        "tensorboard",
        "matplotlib",
        "tokenizers",
        "safetensors",
        "tyro",
        "scipy.signal",
    )
    code = f"import sys, s5eqx; print([m for m in {heavy} if m in sys.modules])"
    done = run_python(code, Path(s5eqx.__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


EVERY_KERNEL = """
import s5eqx, scan_problems as t
for layout in map(t.LAYOUTS.get, ("float32", "float64", "complex64", "pairs64")):
    t.check(layout, [
        t.problem(layout, (1,), 7, states, a=a, reset=(7,), reverse=states % 2 == 0)
        for states in (1, 2, 3, 5, 8, 13, 67) for a in ((states,), (7, states))
    ])
    t.check(layout, [t.problem(layout, (2,), 2 * layout.block(67) + 1, 67, radius=(0.99, 0.99999))])
print(s5eqx.backends()[0].detail)
"""
LEVELS = ("generic", "x86-64-v3", "x86-64-v4")


@native
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    """The same checks as in test_scan.py, on the code for older processors."""
    best = next(name for name in LEVELS if CPU.detail.endswith(name))
    if LEVELS.index(level) > LEVELS.index(
        best
    ):  # such code cannot run on this machine: it would be an illegal instruction
        pytest.skip(f"the processor or the build goes up to {best}")
    root = Path(s5eqx.__file__).parents[1]
    done = run_python(EVERY_KERNEL, root, TESTS, S5EQX_CPU_ISA=level, JAX_ENABLE_X64="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"native kernels, {level}"


# The FFI targets themselves. Anything can be handed to them, and nothing may crash them.

F32 = jnp.float32
FORWARD = {
    "a": ((1, 1, 3), F32),
    "b": ((2, 5, 3), F32),
    "x0": ((2, 3), F32),
    "reset": ((1, 0), bool),
}
FORWARD_RESULTS = {"x": ((2, 5, 3), F32)}
BACKWARD = {
    "a": ((1, 1, 3), F32),
    "x": ((2, 5, 3), F32),
    "x0": ((2, 3), F32),
    "reset": ((1, 0), bool),
    "g": ((2, 5, 3), F32),
}
BACKWARD_RESULTS = {"lambda": ((2, 5, 3), F32), "da": ((2, 1, 3), F32), "dx0": ((2, 3), F32)}
TARGETS = {
    "forward": (FORWARD, FORWARD_RESULTS),
    "backward": (BACKWARD, BACKWARD_RESULTS),
}


def call(target, changes=(), **attributes):
    """Calls the raw target with ones, some of its operands or results changed."""
    operands, results = ({**part, **{k: v for k, v in dict(changes).items() if k in part}} for part in TARGETS[target])
    shapes = [jax.ShapeDtypeStruct(*result) for result in results.values()]
    attributes = {"reverse": False, "pairs": False} | attributes
    ones = [jnp.ones(*operand) for operand in operands.values()]
    return [np.asarray(z) for z in jax.ffi.ffi_call(f"s5eqx_scan_{target}", shapes)(*ones, **attributes)]


SHAPES = {
    "forward": {
        "a": [(), (3,), (1, 3), (3, 1, 3), (1, 4, 3), (1, 1, 4), (1, 1, 3, 2), (2, 5, 3, 1), (0, 1, 3), (1, 0, 3)],
        "b": [(), (5,), (5, 3), (2, 5, 3, 2), (2, 5, 3, 1)],
        "x0": [(), (3,), (1, 3), (3, 3), (2, 4), (2, 3, 2), (0, 3)],
        "reset": [(), (5,), (1, 4), (3, 5), (2, 5, 1), (1, 6), (0, 5)],
        "x": [(), (2, 3), (2, 5, 4), (2, 6, 3), (1, 5, 3), (2, 5, 3, 2)],
    },
    "backward": {
        "a": [(), (3,), (3, 1, 3), (1, 4, 3), (1, 1, 4), (1, 1, 3, 2)],
        "x": [(), (2, 5), (2, 4, 3), (1, 5, 3), (2, 5, 2)],
        "x0": [(), (3,), (1, 3), (2, 4)],
        "reset": [(), (5,), (1, 4), (3, 5)],
        "g": [(), (5, 3), (2, 5, 3, 2)],
        "lambda": [(), (2, 5, 4), (1, 5, 3), (2, 5)],
        "da": [(), (1, 1, 3), (2, 5, 3), (2, 1, 4), (2, 3)],
        "dx0": [(), (1, 3), (2, 4), (2, 3, 1)],
    },
}


@native
@pytest.mark.parametrize("target, name", [(t, n) for t, names in SHAPES.items() for n in names])
def test_raw_targets_refuse_wrong_shapes(target, name):
    dtype = bool if name == "reset" else F32
    for shape in SHAPES[target][name]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"s5eqx scan: {name} must be .*got \("):
            call(target, {name: (shape, dtype)})


@native
@pytest.mark.parametrize("target, name", [(t, n) for t, names in SHAPES.items() for n in names])
def test_raw_targets_refuse_wrong_dtypes(target, name, x64):
    """The sizing operand sets the type of the others; a change of it is then a complaint about the first of them."""
    right = {**FORWARD, **FORWARD_RESULTS, **BACKWARD, **BACKWARD_RESULTS}[name][0]
    sizing = {"forward": "b", "backward": "g"}[target]
    for dtype in (jnp.float64, jnp.complex64, jnp.int32, jnp.bfloat16, jnp.float16, jnp.int8):
        blamed = r"\w+" if name == sizing else name
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"s5eqx scan: {blamed} must be .*got \("):
            call(target, {name: (right, dtype)})


@native
@pytest.mark.parametrize("target", TARGETS)
def test_raw_targets_refuse_wrong_calls(target):
    """Pairs without their axis, a complex type as pairs, attributes and operands too few, too many, mistyped."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"must be \(B, L, P, 2\)"):
        call(target, pairs=True)
    every = {name: (shape, jnp.complex64) for name, (shape, _) in (TARGETS[target][0] | TARGETS[target][1]).items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match="must be a real type"):
        call(target, every | {"reset": ((1, 0), bool)}, pairs=True)
    for attributes in ({"reverse": np.int32(7)}, {"pairs": "yes"}):
        with pytest.raises(jax.errors.JaxRuntimeError):
            call(target, **attributes)
    shapes = [jax.ShapeDtypeStruct(*result) for result in TARGETS[target][1].values()]
    ones = [jnp.ones(*operand) for operand in TARGETS[target][0].values()]
    for operands, results, attributes in (
        (ones[:-1], shapes, {"reverse": False, "pairs": False}),
        ([*ones, ones[0]], shapes, {"reverse": False, "pairs": False}),
        (ones, shapes[:-1], {"reverse": False, "pairs": False}),
        (ones, [*shapes, shapes[0]], {"reverse": False, "pairs": False}),
        (ones, shapes, {"reverse": False}),
        (ones, shapes, {}),
    ):
        f = jax.ffi.ffi_call(
            f"s5eqx_scan_{target}", results, has_side_effect=True
        )  # else, without results, it is not run
        with pytest.raises(jax.errors.JaxRuntimeError):
            jax.block_until_ready(f(*operands, **attributes))
            jax.effects_barrier()


@native
def test_raw_targets_take_what_fits():
    """After all that was refused: shared and own multipliers, bytes as flags, and nothing at all."""
    (x,) = call("forward")
    np.testing.assert_array_equal(x[0, :, 0], [2, 3, 4, 5, 6])
    (x,) = call("forward", reverse=True)
    np.testing.assert_array_equal(x[0, :, 0], [6, 5, 4, 3, 2])
    for flags in (((1, 5), jnp.uint8), ((2, 5), bool)):
        (x,) = call("forward", {"a": ((2, 5, 3), F32), "reset": flags})
        np.testing.assert_array_equal(x, 1)
    cotangent, da, dx0 = call("backward")
    np.testing.assert_array_equal(cotangent[0, :, 0], [5, 4, 3, 2, 1])
    assert (da == 15).all() and (dx0 == 5).all()
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        own = {"b": ((batch, length, 3), F32), "x0": ((batch, 3), F32), "x": ((batch, length, 3), F32)}
        own |= {"g": own["b"], "lambda": own["b"], "da": ((batch, 1, 3), F32), "dx0": own["x0"]}
        assert call("forward", own)[0].shape == (batch, length, 3)
        assert not any(z.any() for z in call("backward", own))
    none = {"b": ((2, 5, 0), F32), "x0": ((2, 0), F32), "x": ((2, 5, 0), F32), "a": ((1, 1, 0), F32)}
    assert call("forward", none)[0].size == 0
