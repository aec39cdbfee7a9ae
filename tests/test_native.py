"""The native module: what is said about it, what it refuses, every instruction set, and life without it."""

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_or_all, slow
from scan_problems import native

import s5eqx
from s5eqx.ops import _native, _primitive

TESTS = Path(__file__).parent
CPU = s5eqx.backends()[0]


def run_python(code, *path, **environment):
    """A fresh interpreter that finds modules in `path` first."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("S5EQX_")}
    clean |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-P", "-c", code]  # -P: not from the current folder
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)


@pytest.mark.smoke
def test_backends_say_what_is_live():
    cpu, cuda = s5eqx.backends()
    assert (cpu.platform, cuda.platform) == ("cpu", "cuda")
    for backend in (cpu, cuda):
        assert backend.detail and "\n" not in backend.detail
    assert not cpu.live or cpu.detail.startswith("native kernels, ")


@pytest.mark.smoke
def test_show_config(capsys, monkeypatch):
    monkeypatch.setenv("S5EQX_SOMETHING", "17")
    s5eqx.show_config()
    lines = capsys.readouterr().out.splitlines()
    for start in ("s5eqx ", "python ", "FFI ", "cpu ", "cuda "):
        assert sum(line.startswith(start) for line in lines) == 1
    assert sum(line.startswith("jax ") for line in lines) == len(jax.devices())
    text = "\n".join(lines)
    for part in (platform.python_version(), f"jax {jax.__version__}", "equinox", CPU.detail, "S5EQX_SOMETHING=17"):
        assert part in text


@pytest.fixture
def registered(monkeypatch):
    """What is registered with XLA, instead of registering it; no platform is loaded yet."""
    names = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, _, platform: names.append((platform, name)))
    monkeypatch.setattr(_native, "_loaded", {})
    return names


@native
@pytest.mark.parametrize("platform_name", ("cpu", "cuda"))
def test_a_module_newer_than_the_runtime_is_not_registered(platform_name, registered, monkeypatch):
    """It would register without complaint and break every computation of the process."""
    monkeypatch.setitem(_native._PLATFORMS, "cuda", ("_cpu", _native._cpu_detail))  # any module that is there
    monkeypatch.setattr(_native, "_runtime_ffi_api", lambda: (0, 0))
    with pytest.warns(
        RuntimeWarning, match=r"_cpu was built and cannot be used: .* newer than jaxlib's \(0, 0\): rebuild"
    ):
        assert not _native.is_live(platform_name)
    assert not _native.is_live(platform_name)  # a second warning would be an error here
    assert "newer than jaxlib's (0, 0): rebuild" in _native._loaded[platform_name][0].detail and not registered


ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_120", "compute_120")


INSUFFICIENT = "CUDA driver version is insufficient for CUDA runtime version"


def cuda_module(devices=(), driver=13000, architectures=ARCHITECTURES, toolkit="13.0", refusal=""):
    """As the compiled module, on a machine with these devices."""
    return SimpleNamespace(
        ffi_api=(0, 1),
        targets={"s5eqx_scan_forward": None, "s5eqx_scan_final": None},
        toolkit=toolkit,
        architectures=architectures,
        driver=lambda: driver,
        devices=lambda: list(devices),
        refusal=lambda: refusal,
    )


@pytest.mark.parametrize(
    "capability, code",
    [
        ((7, 5), "sm_75"),
        ((7, 0), None),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), None),  # machine code is for its own major version, PTX for what is newer
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "compute_120"),
    ],
)
def test_which_code_a_device_runs(capability, code):
    assert _native._code_for(capability, cuda_module()) == code


def test_ptx_of_a_toolkit_newer_than_the_driver_does_not_count():
    """The driver refuses it; machine code of the same module runs."""
    module = cuda_module(toolkit="13.5")
    assert _native._code_for((13, 0), module) is None
    assert _native._code_for((9, 0), module) == "sm_90"
    assert _native._code_for((13, 0), cuda_module(toolkit="13.5", driver=13050)) == "compute_120"


H200 = ("NVIDIA H200", 9, 0)
BUILT = "CUDA 13.0, sm_75 … sm_120, PTX 12.0"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "module, live, detail",
    [
        (cuda_module([H200]), True, f"native kernels, {BUILT}; 1 device: NVIDIA H200 (sm_90)"),
        (
            cuda_module([H200, ("A10", 8, 6), H200]),
            True,
            f"native kernels, {BUILT}; 3 devices: 2 x NVIDIA H200 (sm_90), A10 (sm_86)",
        ),
        (cuda_module(driver=0), True, f"native kernels, {BUILT}; no CUDA device: driver missing"),
        (cuda_module(), True, f"native kernels, {BUILT}; no CUDA device: none visible"),
        (
            cuda_module(architectures=("sm_90", "compute_90"), driver=0),
            True,
            "native kernels, CUDA 13.0, sm_90, PTX 9.0; no CUDA device: driver missing",
        ),
        (
            cuda_module(driver=12080, refusal=INSUFFICIENT),
            False,
            "built with CUDA 13.0, and the driver ends at CUDA 12.8: update the driver, or install s5eqx as built with "
            "CUDA 12, a wheel or from source with its nvcc",
        ),
        (
            cuda_module(driver=12020, toolkit="12.9", refusal=INSUFFICIENT),
            False,
            "built with CUDA 12.9, and the driver ends at CUDA 12.2: update the driver, or install s5eqx as built with "
            "CUDA 12.2 or older, a wheel or from source with its nvcc",
        ),
        (
            cuda_module(refusal="system not yet initialized"),
            False,
            f"{BUILT}; no CUDA device: system not yet initialized",
        ),
        (
            cuda_module([H200, ("NVIDIA B200", 10, 0)]),
            False,
            f"NVIDIA B200 (sm_100) runs nothing of what was built ({BUILT}): install s5eqx from source "
            'with S5EQX_CUDA_ARCHS="90;100", or hide it with CUDA_VISIBLE_DEVICES',
        ),
        (
            cuda_module([("NVIDIA B200", 10, 0)]),
            False,
            f"NVIDIA B200 (sm_100) runs nothing of what was built ({BUILT}): install s5eqx from source "
            'with S5EQX_CUDA_ARCHS="100"',
        ),
    ],
)
def test_what_is_said_of_cuda(module, live, detail, registered, monkeypatch, capsys):
    monkeypatch.setattr(_native, "_import", lambda name: module)
    monkeypatch.setitem(_native._loaded, "cpu", (CPU, None))
    assert _native.backends()[1] == _native.NativeBackend("cuda", live, detail)
    assert registered == ([("cuda", name) for name in module.targets] if live else [])
    _native.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert f"cuda    {'live' if live else 'plain JAX'}: {detail}" in lines
    assert f"code    {' '.join(module.architectures)}" in lines
    assert [line for line in lines if line.startswith("driver ")]
    for name, major, minor in module.devices():
        code = "none of it" if (major, minor) == (10, 0) else ("sm_80" if major == 8 else "sm_90")
        assert f"device  {name} (sm_{major}{minor}) runs {code}" in lines


def lower_for_cuda():
    scan = jax.jit(lambda b: s5eqx.ops.diagonal_scan(b[0], b))
    return scan.trace(np.ones((3, 2), np.float32)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def a_gpu_of_jax(registered, monkeypatch):
    """As where JAX has a CUDA device; nobody has been warned yet."""
    monkeypatch.setitem(_native._loaded, "cpu", (CPU, None))
    monkeypatch.setattr(_primitive, "_has_devices", lambda platform: True)
    _primitive._warn_of_fallback.cache_clear()
    yield
    _primitive._warn_of_fallback.cache_clear()


@pytest.mark.parametrize(
    "module, why",
    [
        (cuda_module(driver=12080, refusal=INSUFFICIENT), "built with CUDA 13.0, and the driver ends at CUDA 12.8: "),
        (cuda_module([("new", 13, 0)], driver=12020, toolkit="12.9"), r"new \(sm_130\) runs nothing of what was built"),
    ],
)
def test_on_an_older_driver_plain_jax_runs_and_one_line_says_so(module, why, a_gpu_of_jax, monkeypatch):
    monkeypatch.setattr(_native, "_import", lambda name: module)
    with pytest.warns(RuntimeWarning, match=why) as warned:
        assert not any("s5eqx_scan" in lower_for_cuda() for _ in range(2))
    assert len(warned) == 1 and "\n" not in str(warned[0].message)


def test_machine_code_runs_on_an_older_driver_of_the_same_major_version(a_gpu_of_jax, monkeypatch):
    module = cuda_module([H200], driver=12020, toolkit="12.9")
    module.workspace_bytes = lambda *_: 16
    monkeypatch.setattr(_native, "_import", lambda name: module)
    assert "s5eqx_scan_forward" in lower_for_cuda()  # a warning would be an error


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize(
    "ahead, initialised, detail",
    [
        (-1, 0, "built with CUDA {0}.{1}, and the driver ends at CUDA {2}.{1}: update the driver, or install s5eqx as"),
        slow(0, 802, "CUDA {0}.{1}, sm_.*; no CUDA device: system not yet initialized"),
        slow(0, 100, "native kernels, CUDA {0}.{1}, sm_.*; no CUDA device: none visible"),
    ],
)
def test_what_the_runtime_in_the_module_says_of_a_driver(ahead, initialised, detail, tmp_path, registered, monkeypatch):
    """The true module, in a process of its own with a driver that has a version and no more."""
    module = _native._backend("cuda")[1]
    if module is None:
        pytest.skip("no kernels for CUDA")
    major, minor = _native._release(module.toolkit)
    (tmp_path / "driver.c").write_text(
        f"int cuDriverGetVersion(int* version) {{ *version = {1000 * (major + ahead) + 10 * minor}; return 0; }}\n"
        f"int cuInit(unsigned flags) {{ return {initialised}; }}\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"], cwd=tmp_path, check=True)
    code = "import _cuda; print([_cuda.driver(), _cuda.devices(), _cuda.refusal()])"
    done = run_python(code, Path(module.__file__).parent, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    driver, devices, refusal = ast.literal_eval(done.stdout)
    there = cuda_module(devices, driver, module.architectures, module.toolkit, refusal)
    monkeypatch.setattr(_native, "_import", lambda name: there)
    assert re.match(detail.format(major, minor, major + ahead), _native._load("cuda")[0].detail)


def test_cuda_is_asked_once(registered, monkeypatch):
    asked = []
    monkeypatch.setattr(_native, "_import", lambda name: asked.append(name) or cuda_module())
    assert [_native.is_live("cuda") for _ in range(3)] == [True] * 3
    assert asked == ["_cuda"] and len(registered) == 2


@pytest.mark.parametrize(
    "dtype, pairs, scalar_bytes, is_complex",
    [
        ("float32", False, 4, False),
        ("float64", False, 8, False),
        ("float32", True, 4, True),
        ("complex64", False, 4, True),
        ("complex128", False, 8, True),
    ],
)
def test_what_a_workspace_is_computed_from(dtype, pairs, scalar_bytes, is_complex, registered, monkeypatch):
    module, asked = cuda_module(), []
    module.workspace_bytes = lambda *arguments: asked.append(arguments) or 17
    monkeypatch.setattr(_native, "_import", lambda name: module)
    tail = (5, 2) if pairs else (5,)
    for steps in (1, 7):
        size = _native.workspace_bytes("cuda", "s5eqx_scan_final", (1, steps, *tail), (3, 7, *tail), dtype, pairs)
        assert size == 17 and asked.pop() == ("s5eqx_scan_final", 3, 7, 5, scalar_bytes, is_complex, steps > 1)
    assert _native.workspace_bytes("cpu", "s5eqx_scan_final", (1, 1, *tail), (3, 7, *tail), dtype, pairs) is None


def test_a_workspace_needs_a_fixed_shape(registered, monkeypatch):
    monkeypatch.setattr(_native, "_import", lambda name: cuda_module())
    (n,) = jax.export.symbolic_shape("n")
    for shape in ((n, 7, 5), (3, n, 5), (3, 7, n)):
        with pytest.raises(ValueError, match=r"need a fixed shape; got \(.*n.*\): export one program per shape"):
            _native.workspace_bytes("cuda", "s5eqx_scan_forward", (1, 1, shape[2]), shape, "float32", False)


def test_devices_that_are_not_there(monkeypatch, capsys):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu'\nand why")

    monkeypatch.setattr(jax, "devices", fail)
    s5eqx.show_config()
    assert "jax     no devices: Unable to initialize backend 'tpu'" in capsys.readouterr().out.splitlines()


HEAVY = (
    "s5eqx.train",
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
IN_A_SOURCE_TREE = f"""
import json, os, sys  # the finder of an editable install would lend its module to the copy
sys.meta_path = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
os.environ["S5EQX_REQUIRE_NATIVE"] = "1"
try:
    import s5eqx
except ImportError as error:
    refusal = str(error)
del os.environ["S5EQX_REQUIRE_NATIVE"]
import jax, jax.numpy as jnp, s5eqx
heavy = [name for name in {HEAVY} if name in sys.modules]
asked = list(s5eqx.ops._native._loaded)
cpu, cuda = s5eqx.backends()
gradient = jax.grad(lambda b: s5eqx.ops.diagonal_scan(jnp.full(2, 0.5), b)[-1].sum())(jnp.ones((3, 2)))
try:
    with s5eqx.use_backend("native"):
        s5eqx.ops.diagonal_scan(jnp.ones(2), jnp.ones((3, 2)))
except RuntimeError as error:
    missing = str(error)
print(json.dumps([refusal, heavy, asked, cpu.live or cuda.live, gradient[:, 0].tolist(), missing, cpu.detail]))
"""


def test_a_source_tree_runs_on_plain_jax_and_says_why(tmp_path):
    """The package beside a setup.py, as in a checkout where nothing was built; where kernels are required it does not
    run. To import it imports no training tools and does not ask for CUDA."""
    skipped = shutil.ignore_patterns("*.so", "*.pyd", "_*.txt")
    shutil.copytree(Path(s5eqx.__file__).parent, tmp_path / "s5eqx", ignore=skipped)
    (tmp_path / "setup.py").touch()
    done = run_python(IN_A_SOURCE_TREE, tmp_path)
    assert done.returncode == 0, done.stderr
    refusal, heavy, asked, live, gradient, missing, detail = json.loads(done.stdout)
    assert detail.startswith("source tree, not the installed package: run `pip install .`")
    assert refusal == f"S5EQX_REQUIRE_NATIVE=1, but the native CPU kernels are not live: {detail}"
    assert heavy == [] and asked == ["cpu"] and not live
    assert gradient == [0.25, 0.5, 1.0]
    assert detail in missing and 'Use "auto"' in missing


def test_a_module_that_does_not_load_is_reported(registered, tmp_path, monkeypatch):
    (tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_HERE", tmp_path)
    monkeypatch.setattr(s5eqx.ops, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "s5eqx.ops._cpu", raising=False)
    with pytest.warns(RuntimeWarning, match=r"^s5eqx\.ops\._cpu was built and cannot be used: "):
        assert not _native.is_live("cpu")
    assert not _native.is_live("cpu")  # a second warning would be an error here
    detail = _native._loaded["cpu"][0].detail
    assert detail.startswith("the module does not load: ")
    scan = lambda b: s5eqx.ops.diagonal_scan(np.full(2, 0.5, np.float32), b)
    gradient = jax.jit(jax.grad(lambda b: scan(b)[-1].sum()))(np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(gradient, [[0.25] * 2, [0.5] * 2, [1.0] * 2])
    with pytest.raises(RuntimeError, match=re.escape(detail)), s5eqx.use_backend("native"):
        scan(np.ones((3, 2), np.float32))


EVERY_KERNEL = """
import s5eqx, scan_problems as t
for layout in map(t.LAYOUTS.get, ("float32", "float64", "complex64", "pairs64")):
    t.check(layout, [
        t.problem(layout, (1,), 7, states, a=a, reset=(7,), reverse=states % 2 == 0)
        for states in (1, 2, 3, 5, 8, 13, 67) for a in ((states,), (7, states))
    ])
    t.check(layout, [t.problem(layout, (2,), 2 * layout.block(67) + 1, 67, radius=(0.99, 0.99999))])
import ssm_problems
for dtype in ("float32", "float64"):
    sizes = (1, 1), (5, 13), (67, 67)
    ssm_problems.check([ssm_problems.problem(2, 70, width, states, reset=True) for width, states in sizes], dtype)
    steps = ssm_problems.LONGEST + 1
    ssm_problems.check([ssm_problems.problem(rows, steps, 19, 13, radius=(0.99, 0.99999)) for rows in (1, 17)], dtype)
print(s5eqx.backends()[0].detail)
"""
LEVELS = ("generic", "x86-64-v3", "x86-64-v4")


@native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.slow
def test_every_instruction_set(level):
    """The same checks as in test_scan.py and test_ssm_kernel.py, on the code for older processors."""
    best = next(name for name in LEVELS if CPU.detail.endswith(name))
    if LEVELS.index(level) > LEVELS.index(best):
        # What this processor lacks would be an illegal instruction, and what the compiler lacks was not built.
        pytest.skip(f"the processor or the build goes up to {best}")
    root = Path(s5eqx.__file__).parents[1]
    done = run_python(EVERY_KERNEL, root, TESTS, S5EQX_CPU_ISA=level, JAX_ENABLE_X64="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"native kernels, {level}"


@native
def test_an_instruction_set_that_there_is_not(registered, monkeypatch):
    monkeypatch.setenv("S5EQX_CPU_ISA", "avx9")
    with pytest.warns(RuntimeWarning, match="S5EQX_CPU_ISA must be generic, x86-64-v3 or x86-64-v4.*got 'avx9'"):
        assert _native.is_live("cpu")


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
FINAL_RESULTS = {"last": ((2, 3), F32)}
TARGETS = {
    "forward": (FORWARD, FORWARD_RESULTS),
    "final": (FORWARD, FINAL_RESULTS),
    "backward": (BACKWARD, BACKWARD_RESULTS),
}


def call(target, changes=(), **attributes):
    """Calls the raw target with ones, some of its operands or results changed."""
    operands, results = ({**part, **{k: v for k, v in dict(changes).items() if k in part}} for part in TARGETS[target])
    shapes = [jax.ShapeDtypeStruct(*result) for result in results.values()]
    attributes = {"reverse": False, "pairs": False} | attributes
    ones = [np.ones(*operand) for operand in operands.values()]
    return [np.asarray(z) for z in jax.ffi.ffi_call(f"s5eqx_scan_{target}", shapes)(*ones, **attributes)]


FORWARD_SHAPES = {
    "a": [(), (3,), (1, 3), (3, 1, 3), (1, 4, 3), (1, 1, 4), (1, 1, 3, 2), (2, 5, 3, 1), (0, 1, 3), (1, 0, 3)],
    "b": [(), (5,), (5, 3), (2, 5, 3, 2), (2, 5, 3, 1)],
    "x0": [(), (3,), (1, 3), (3, 3), (2, 4), (2, 3, 2), (0, 3)],
    "reset": [(), (5,), (1, 4), (3, 5), (2, 5, 1), (1, 6), (0, 5)],
}
SHAPES = {
    "forward": FORWARD_SHAPES | {"x": [(), (2, 3), (2, 5, 4), (2, 6, 3), (1, 5, 3), (2, 5, 3, 2)]},
    "final": FORWARD_SHAPES | {"last": [(), (3,), (2, 5, 3), (1, 3), (2, 4), (2, 3, 2)]},
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
@one_or_all
@pytest.mark.parametrize("target, name", [(t, n) for t, names in SHAPES.items() for n in names])
def test_raw_targets_refuse_wrong_shapes(target, name, chosen):
    dtype = bool if name == "reset" else F32
    for shape in chosen(SHAPES[target][name], name):
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"s5eqx scan: {name} must be .*got \("):
            call(target, {name: (shape, dtype)})


@native
@one_or_all
@pytest.mark.parametrize("target, name", [(t, n) for t, names in SHAPES.items() for n in names])
def test_raw_targets_refuse_wrong_dtypes(target, name, chosen, x64):
    """The sizing operand sets the type of the others; a change of it is then a complaint about the first of them."""
    right = (TARGETS[target][0] | TARGETS[target][1])[name][0]
    sizing = {"forward": "b", "final": "b", "backward": "g"}[target]
    for dtype in chosen((jnp.float64, jnp.complex64, jnp.int32, jnp.bfloat16, jnp.float16, jnp.int8), name):
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
    ones = [np.ones(*operand) for operand in TARGETS[target][0].values()]
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


@pytest.mark.smoke
@native
def test_raw_targets_take_what_fits():
    """After all that was refused: shared and own multipliers, bytes as flags, and nothing at all."""
    (x,) = call("forward")
    np.testing.assert_array_equal(x[0, :, 0], [2, 3, 4, 5, 6])
    (x,) = call("forward", reverse=True)
    np.testing.assert_array_equal(x[0, :, 0], [6, 5, 4, 3, 2])
    for flags in (((1, 5), jnp.uint8), ((2, 5), bool)):
        for target in ("forward", "final"):
            (x,) = call(target, {"a": ((2, 5, 3), F32), "reset": flags})
            np.testing.assert_array_equal(x, 1)
    (last,) = call("final")
    np.testing.assert_array_equal(last, 6)
    cotangent, da, dx0 = call("backward")
    np.testing.assert_array_equal(cotangent[0, :, 0], [5, 4, 3, 2, 1])
    assert (da == 15).all() and (dx0 == 5).all()
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        own = {"b": ((batch, length, 3), F32), "x0": ((batch, 3), F32), "x": ((batch, length, 3), F32)}
        own |= {"g": own["b"], "lambda": own["b"], "da": ((batch, 1, 3), F32), "dx0": own["x0"], "last": own["x0"]}
        assert call("forward", own)[0].shape == (batch, length, 3)
        np.testing.assert_array_equal(call("final", own)[0], np.ones((batch, 3)) if length == 0 else np.ones((0, 3)))
        assert not any(z.any() for z in call("backward", own))
    none = {"b": ((2, 5, 0), F32), "x0": ((2, 0), F32), "x": ((2, 5, 0), F32), "a": ((1, 1, 0), F32)}
    assert call("forward", none)[0].size == 0
    assert call("final", none | {"last": ((2, 0), F32)})[0].size == 0
