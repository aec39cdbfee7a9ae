"""Building and installing with pip, as a user does: with a compiler, without one, and with one that fails.

Every case builds a copy of the tree in a temporary folder, with build isolation, so pip needs its index or its cache.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed here"),
]

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "csrc", "s5eqx")
CHECK = """
import jax.numpy as jnp, s5eqx
assert s5eqx.ops.diagonal_scan(jnp.full(2, 0.5), jnp.ones((3, 2)))[-1, 0] == 1.75
print(s5eqx.__file__)
s5eqx.show_config()
"""
NO_COMPILER = {"CXX": "/nonexistent/c++"}


def run(*command, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("S5EQX_", "PYTHONPATH", "PIP_TARGET"))}
    clean |= {"JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    return subprocess.run(
        [*map(str, command)], env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )


def pip(*arguments, **environment):
    return run(sys.executable, "-m", "pip", *arguments, **environment)


@pytest.fixture
def tree(tmp_path):
    """A copy of what is needed to build, without anything built."""
    copy = tmp_path / "tree"
    copy.mkdir()
    built = shutil.ignore_patterns("*.so", "_*.txt", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=built) if source.is_dir() else shutil.copy(source, copy)
    return copy


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory):
    """What is installed here, apart from s5eqx itself."""
    folder = tmp_path_factory.mktemp("dependencies")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("s5eqx", "__editable__")):
            (folder / entry.name).symlink_to(entry)
    return folder


def wheel(source, folder, *options, **environment):
    """Builds `source`; returns pip's whole output, and the wheel if there is one."""
    done = pip("wheel", "-v", "--no-deps", *options, "-w", folder, source, **environment)
    built = sorted(Path(folder).glob("*.whl"))
    assert (done.returncode == 0) == bool(built), done.stdout
    return done.stdout, built[0] if built else None


def installed_config(wheel, folder, dependencies, **environment):
    """What a fresh interpreter says after the wheel is installed."""
    assert pip("install", "--no-deps", "--target", folder, wheel).returncode == 0
    path = os.pathsep.join([str(folder), str(dependencies)])
    done = run(sys.executable, "-P", "-c", CHECK, PYTHONPATH=path, **environment)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(str(folder))
    return done.stdout


def test_without_a_compiler(tree, dependencies, tmp_path):
    """The install succeeds, and both it and the installed package say what is missing."""
    output, built = wheel(tree, tmp_path / "out", **NO_COMPILER)
    reason = "no C++ compiler: looked for /nonexistent/c++; install one or set CXX"
    assert f"s5eqx: _cpu was not built: {reason}. Operations run on plain JAX." in output
    assert f"plain JAX: not built: {reason}" in installed_config(built, tmp_path / "site", dependencies)


def test_a_compile_error(tree, dependencies, tmp_path):
    scan = tree / "csrc" / "scan.cc"
    scan.write_text("#error this compiler is too old\n" + scan.read_text())
    output, built = wheel(tree, tmp_path / "out")
    assert "s5eqx: _cpu was not built:" in output and "this compiler is too old" in output
    config = installed_config(built, tmp_path / "site", dependencies)
    assert "cpu     plain JAX: not built: " in config and "error" in config


def test_off(tree, dependencies, tmp_path):
    _, built = wheel(tree, tmp_path / "out", S5EQX_NATIVE="OFF")
    assert not [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]
    assert "not built: S5EQX_NATIVE=OFF" in installed_config(built, tmp_path / "site", dependencies)


def test_on_without_a_compiler_fails_and_says_why(tree, tmp_path):
    output, built = wheel(tree, tmp_path / "out", S5EQX_NATIVE="ON", **NO_COMPILER)
    assert built is None
    assert "s5eqx: _cpu was not built: no C++ compiler" in output and "S5EQX_NATIVE=ON" in output


def test_another_word_is_refused(tree, tmp_path):
    output, built = wheel(tree, tmp_path / "out", S5EQX_NATIVE="maybe")
    assert built is None
    assert "S5EQX_NATIVE must be AUTO, ON or OFF; got 'MAYBE'" in output


def test_headers_that_are_not_there(tree, dependencies, tmp_path):
    _, built = wheel(tree, tmp_path / "out", S5EQX_XLA_FFI_INCLUDE="/nonexistent")
    config = installed_config(built, tmp_path / "site", dependencies)
    assert "no xla/ffi/api/ffi.h under /nonexistent; set S5EQX_XLA_FFI_INCLUDE" in config


def test_source_distribution_to_wheel_to_import(tree, dependencies, tmp_path):
    """An empty CXX, as some shells export it, counts as none."""
    assert pip("install", "--target", tmp_path / "tools", "setuptools>=77").returncode == 0
    make = "import setuptools.build_meta as b; b.build_sdist('sdist')"
    (tree / "sdist").mkdir()
    done = run("env", "-C", tree, sys.executable, "-c", make, PYTHONPATH=str(tmp_path / "tools"))
    assert done.returncode == 0, done.stdout
    (archive,) = (tree / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = [*tree.glob("csrc/*"), *tree.glob("s5eqx/**/*.py"), tree / "s5eqx/py.typed", tree / "CMakeLists.txt"]
    assert {str(path.relative_to(tree)) for path in sources} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    output, built = wheel(archive, tmp_path / "out", S5EQX_NATIVE="ON", CXX="")
    assert built, output
    contents = zipfile.ZipFile(built).namelist()
    assert "s5eqx/py.typed" in contents and not [name for name in contents if name.startswith(("tests/", "csrc/"))]
    config = installed_config(built, tmp_path / "site", dependencies, S5EQX_REQUIRE_NATIVE="1")
    assert "cpu     live: native kernels" in config


def test_without_build_isolation(tree, dependencies, tmp_path):
    """With the tools and jaxlib that are installed here."""
    tools = ("setuptools", "pybind11", "cmake", "ninja")
    missing = [name for name in tools if importlib.util.find_spec(name) is None]
    if missing:  # `.[test]` does not bring the build tools; .ci/run installs them, so CI never skips this
        pytest.skip(f"not installed here: {', '.join(missing)}")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    _, built = wheel(tree, tmp_path / "out", "--no-build-isolation", S5EQX_NATIVE="ON", PATH=path)
    assert "cpu     live: native kernels" in installed_config(built, tmp_path / "site", dependencies)


def test_editable(tree, dependencies, tmp_path):
    """The module stands in the tree; a later build that is told not to build takes it away."""
    environment = tmp_path / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    python = environment / "bin" / "python"

    def config(**options):
        done = pip("--python", python, "install", "--no-deps", "-e", tree, **options)
        assert done.returncode == 0, done.stdout
        done = run(python, "-P", "-c", CHECK, PYTHONPATH=str(dependencies))
        assert done.returncode == 0, done.stdout
        assert done.stdout.startswith(str(tree / "s5eqx"))
        return done.stdout

    assert "cpu     live: native kernels" in config(S5EQX_NATIVE="ON")
    assert "cpu     plain JAX: not built: S5EQX_NATIVE=OFF" in config(S5EQX_NATIVE="OFF")
    assert not [*tree.glob("s5eqx/ops/*.so")]
