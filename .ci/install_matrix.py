"""Installs s5eqx as users do, with every kind of compiler and without, and prints what `show_config()` then says.

    python .ci/install_matrix.py [words of the titles of the rows to run]

It wants an environment with s5eqx's dependencies and setuptools, cmake, ninja and pybind11. Every row installs a copy
of the tree into an environment of its own, which borrows those dependencies. Rows with build isolation, or with pip's
nvcc, need pip's index or its cache.
"""

import os
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rows import ROOT, Failed, Skipped, attempt, clean_environment, expect, report, run

SOURCES = (
    "setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "README.md", "BENCHMARKS.md", "LICENSE", "csrc",
    "s5eqx",
)  # fmt: skip
CHECK = """
import jax.numpy as jnp, s5eqx
assert s5eqx.ops.diagonal_scan(jnp.full(2, 0.5), jnp.ones((3, 2)))[-1, 0] == 1.75
s5eqx.show_config()
"""
# Its parts do not pin each other, and ptxas refuses the code of a newer nvvm: all of one release, or all the latest.
PIP_TOOLKIT = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
CPU = "cpu     live: native kernels, "
CUDA = r"cuda    live: native kernels, CUDA \d+\.\d, sm_90, PTX 9.0; no CUDA device: (driver missing|none visible)"
NO_COMPILER = "no C\\+\\+ compiler: looked for /nonexistent/c\\+\\+; install one or set CXX"


class Place:
    """A copy of the tree, and an environment that borrows the dependencies of this one."""

    def __init__(self, folder: Path, shared: "Shared", variables: dict[str, str]):
        self.folder, self.shared, self.tree = folder, shared, folder / "tree"
        built = shutil.ignore_patterns("*.so", "_c*.txt", "__pycache__")
        self.tree.mkdir(parents=True)
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.tree / name, **({"ignore": built} if copy is shutil.copytree else {}))
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        self.python = folder / "venv/bin/python"
        (self.site,) = (folder / "venv/lib").glob("python*/site-packages")
        (self.site / "borrowed.pth").write_text(f"{shared.dependencies}\n")
        self.environment = clean_environment() | {"S5EQX_CUDA_ARCHS": "90"}
        others = [folder for folder in os.get_exec_path() if folder != sysconfig.get_path("scripts")]
        self.environment["PATH"] = os.pathsep.join([str(shared.tools), *others])
        self.environment |= variables

    def compile_once(self) -> None:
        """Takes what an earlier place has compiled from the same C++ sources."""
        launcher = f"{sys.executable};{ROOT / '.ci/compile_once.py'};{self.shared.store};{self.folder}"
        self.environment["CMAKE_ARGS"] = " ".join(
            f"-DCMAKE_CXX_{part}_LAUNCHER={launcher}" for part in ("COMPILER", "LINKER")
        )

    def pip(self, *arguments, **variables) -> tuple[str, int]:
        command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python, *arguments)
        return attempt(*command, environment=self.environment | variables)

    def config(self) -> str:
        """What a fresh interpreter says, far from the tree."""
        return run(self.python, "-P", "-c", CHECK, environment=self.environment, folder=self.folder)

    def change(self, name: str, old: str, new: str) -> None:
        text = (self.tree / name).read_text()
        if text.count(old) != 1:
            raise Failed(f"{name} must hold {old!r} once")
        (self.tree / name).write_text(text.replace(old, new))


class Shared:
    """What the rows have in common."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.dependencies = folder / "dependencies"
        self.dependencies.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.lower().startswith(("s5eqx", "__editable__", "nvidia")):
                (self.dependencies / entry.name).symlink_to(entry)
        self.store, self.tools = folder / "compiled", folder / "tools"
        self.store.mkdir()
        self.tools.mkdir()
        for name in ("cmake", "ninja"):
            (self.tools / name).symlink_to(Path(sysconfig.get_path("scripts")) / name)

    def pip_toolkit(self, version: str) -> Path:
        target = self.folder / f"nvcc{version}"
        if not target.exists():
            parts = [part + version for part in PIP_TOOLKIT]
            run(sys.executable, "-m", "pip", "install", "-q", "--target", target, *parts)
        return target

    def path_without(self, path: str, *names: str) -> str:
        folders = []
        for i, folder in enumerate(map(Path, path.split(os.pathsep))):
            shadow = folder
            if any((folder / name).exists() for name in names):
                shadow = self.folder / f"path{i}-without-{'-'.join(names)}"
                if not shadow.exists():
                    shadow.mkdir()
                    for entry in folder.iterdir():
                        if entry.name not in names:
                            (shadow / entry.name).symlink_to(entry)
            folders.append(str(shadow))
        return os.pathsep.join(folders)


def as_found(place: Place) -> None:
    """Leaves the machine as it is."""


def no_toolkit(place: Place) -> None:
    place.environment["PATH"] = place.shared.path_without(place.environment["PATH"], "nvcc")
    place.change("setup.py", '"/usr/local/cuda/bin/nvcc"', '"/nonexistent/nvcc"')


def pip_toolkit(version: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        no_toolkit(place)
        (place.site / "nvidia").symlink_to(place.shared.pip_toolkit(version) / "nvidia")

    return prepare


def broken_nvcc(place: Place) -> None:
    nvcc = place.folder / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'nvcc fatal: no library caf\\351\\n'; exit 1\n")  # é, but not in UTF-8
    nvcc.chmod(0o755)
    place.environment["PATH"] = f"{nvcc.parent}{os.pathsep}{place.environment['PATH']}"


def only_cxx(place: Place) -> None:
    """No compiler on PATH; one elsewhere, behind a launcher."""
    compiler = place.folder / "compiler/g++"
    compiler.parent.mkdir()
    compiler.symlink_to(str(shutil.which("g++")))
    path = place.shared.path_without(place.environment["PATH"], "cc", "c++", "gcc", "g++", "clang", "clang++")
    place.environment |= {"PATH": path, "CXX": f"env {compiler}"}


def error_in(name: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        source = place.tree / "csrc" / name
        source.write_text("#error this compiler is too old\n" + source.read_text())

    return prepare


def install(place: Place, *options: str) -> tuple[str, int]:
    return place.pip("install", "-v", "--no-deps", "--no-build-isolation", *options, place.tree)


def install_editable(place: Place) -> tuple[str, int]:
    """Twice; the build that is told not to build takes the modules away."""
    if (first := install(place, "-e"))[1]:
        return first
    expect((CPU,), place.config())
    second = place.pip("install", "-v", "--no-deps", "--no-build-isolation", "-e", place.tree, S5EQX_NATIVE="OFF")
    if left := [*place.tree.glob("s5eqx/ops/*.so")]:
        raise Failed(f"still there: {left}")
    return second


def install_source_distribution(place: Place) -> tuple[str, int]:
    make = "import setuptools.build_meta as b; b.build_sdist('sdist')"
    (place.tree / "sdist").mkdir()
    run(place.python, "-c", make, environment=place.environment, folder=place.tree)
    (archive,) = (place.tree / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tree = place.tree
    sources = [
        *tree.glob("csrc/*"),
        *tree.glob("s5eqx/**/*.py"),
        tree / "s5eqx/py.typed",
        *(tree / name for name in SOURCES),
    ]
    if missing := {str(path.relative_to(tree)) for path in sources} - names:
        raise Failed(f"not in the source distribution: {sorted(missing)}")
    built, status = place.pip("wheel", "-v", "--no-deps", "-w", place.folder / "wheels", archive)
    if status:
        return built, status
    (wheel,) = (place.folder / "wheels").glob("*.whl")
    contents = zipfile.ZipFile(wheel).namelist()
    if "s5eqx/py.typed" not in contents or [name for name in contents if name.startswith(("tests/", "csrc/"))]:
        raise Failed(f"the wheel holds {contents}")
    shutil.rmtree(tree)
    said, status = place.pip("install", "--no-deps", wheel)
    return built + said, status


@dataclass(frozen=True)
class Row:
    """A way to install, and what must be seen then: regular expressions."""

    title: str
    prepare: Callable[[Place], None] = as_found
    install: Callable[[Place], tuple[str, int]] = install
    variables: dict[str, str] = field(default_factory=dict)
    config: tuple[str, ...] = ()
    """In what `show_config()` prints. Empty: the install must fail."""
    log: tuple[str, ...] = ()
    """In the output of pip."""
    needs_toolkit: bool = False
    builds: bool = True
    """Whether it is about compiling C++; else what earlier rows have compiled is taken."""


def off(platform: str, why: str) -> str:
    return rf"{platform:<8}plain JAX: not built: {why}"


BROKEN_NVCC = r"nvcc fatal: no library caf\\xe9"
BUILT_BOTH = r"s5eqx: built _cpu \(.+\), _cuda \(CUDA 13\.\d: sm_90 \+ PTX\)\."
ROWS = (
    Row("refused: S5EQX_NATIVE=maybe", variables={"S5EQX_NATIVE": "maybe"},
        log=("S5EQX_NATIVE must be AUTO, ON or OFF; got 'MAYBE'",)),
    Row("S5EQX_NATIVE=OFF", variables={"S5EQX_NATIVE": "OFF"},
        config=(off("cpu", "S5EQX_NATIVE=OFF"), off("cuda", "S5EQX_NATIVE=OFF"))),
    Row("no C++ compiler", variables={"CXX": "/nonexistent/c++"},
        config=(off("cpu", NO_COMPILER), off("cuda", NO_COMPILER)),
        log=(f"s5eqx: built nothing; _cpu not built: {NO_COMPILER}; _cuda not built: {NO_COMPILER}",)),
    Row("no C++ compiler, S5EQX_NATIVE=ON", variables={"CXX": "/nonexistent/c++", "S5EQX_NATIVE": "ON"},
        log=(rf"s5eqx: _cpu not built: {NO_COMPILER} \(S5EQX_NATIVE=ON\)",)),
    Row("no FFI headers", variables={"S5EQX_XLA_FFI_INCLUDE": "/nonexistent"},
        config=(off("cpu", "no xla/ffi/api/ffi.h under /nonexistent; set S5EQX_XLA_FFI_INCLUDE"),)),
    Row("an error in scan.cc", prepare=error_in("scan.cc"), variables={"S5EQX_CUDA": "OFF"},
        config=(off("cpu", ".*error: #error this compiler is too old"),)),
    Row("S5EQX_CUDA=OFF", builds=False, variables={"S5EQX_CUDA": "OFF"}, config=(CPU, off("cuda", "S5EQX_CUDA=OFF"))),
    Row("no nvcc", builds=False, prepare=no_toolkit,
        config=(CPU, off("cuda", "no nvcc: not in S5EQX_NVCC, CUDACXX, CUDA_HOME"))),
    Row("a broken nvcc", builds=False, prepare=broken_nvcc, config=(CPU, off("cuda", BROKEN_NVCC)),
        log=(rf"s5eqx: built _cpu \(.+\); _cuda not built: {BROKEN_NVCC}\.",)),
    Row("a broken nvcc, S5EQX_CUDA=ON", builds=False, prepare=broken_nvcc, variables={"S5EQX_CUDA": "ON"},
        log=(rf"s5eqx: _cuda not built: {BROKEN_NVCC} \(S5EQX_CUDA=ON\)",)),
    Row("an error in CUDA code", builds=False, prepare=error_in("scan.cuh"), needs_toolkit=True,
        config=(CPU, off("cuda", ".*scan.cuh.* #error this compiler is too old"))),
    Row("toolkit on PATH", variables={"S5EQX_CUDA": "ON"}, needs_toolkit=True, config=(CPU, CUDA), log=(BUILT_BOTH,)),
    Row("editable, then OFF", builds=False, install=install_editable, variables={"S5EQX_CUDA": "OFF"},
        config=(off("cpu", "S5EQX_NATIVE=OFF"),)),
    Row("the only compiler is in CXX", prepare=only_cxx, variables={"S5EQX_CUDA": "ON"}, needs_toolkit=True,
        config=(CPU, CUDA), log=(BUILT_BOTH,)),
    Row("pip's nvcc 13.0", builds=False, prepare=pip_toolkit("==13.0.*"), variables={"S5EQX_CUDA": "ON"},
        config=(CPU, CUDA), log=(BUILT_BOTH,)),
    Row("pip's latest nvcc", builds=False, prepare=pip_toolkit(""), variables={"S5EQX_CUDA": "ON"},
        config=(CPU, CUDA), log=(BUILT_BOTH,)),
    Row("pip's nvcc 13.0; isolated: source distribution, wheel, install; an empty CXX", prepare=pip_toolkit("==13.0.*"),
        install=install_source_distribution,
        variables={"S5EQX_NATIVE": "ON", "S5EQX_CUDA": "ON", "S5EQX_REQUIRE_NATIVE": "1", "CXX": ""},
        config=(CPU, CUDA), log=(BUILT_BOTH,)),
)  # fmt: skip


def carry_out(row: Row, shared: Shared, folder: Path) -> str:
    """Returns what a user sees of it at the end."""
    if row.needs_toolkit and not shutil.which("nvcc"):
        raise Skipped("no nvcc on PATH")
    place = Place(folder, shared, row.variables)
    if not row.builds:
        place.compile_once()
    row.prepare(place)
    said, status = row.install(place)
    expect(row.log, said)
    if bool(status) == bool(row.config):
        raise Failed(f"{said}\nexpected: {'success' if row.config else 'failure'}")
    if status:
        return "\n".join(sorted({line.strip() for line in said.splitlines() if re.search("|".join(row.log), line)}))
    config = place.config()
    home = place.tree if row.install is install_editable else place.site
    expect((*row.config, f"s5eqx   {re.escape(str(home))}/"), config)
    for module in place.site.glob("s5eqx/ops/_cuda*.so"):
        if libraries := re.findall(r"libcu\S+", run("ldd", module)):
            raise Failed(f"{module.name} needs {libraries}, which are not everywhere")
    return config.rstrip()


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        shared = Shared(Path(work))
        rows = [(row.title, partial(carry_out, row, shared, Path(work) / f"row{i}")) for i, row in enumerate(ROWS)]
        report(rows, sys.argv[1:])


main()
