"""Builds the native kernels with CMake. A failure to build is reported, not raised: s5eqx then runs on plain JAX.

Environment:
    S5EQX_NATIVE=AUTO|ON|OFF   AUTO (default) builds what it can; ON makes a failure an error; OFF builds nothing
    S5EQX_XLA_FFI_INCLUDE      folder with xla/ffi/api; default: jaxlib's own
    CXX, CMAKE_ARGS            the compiler, and further arguments to CMake
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class NotBuilt(Exception):
    """Why a native module could not be built, in one line."""


def ffi_headers() -> Path:
    given = os.environ.get("S5EQX_XLA_FFI_INCLUDE")
    jaxlib = importlib.util.find_spec("jaxlib")
    if not given and jaxlib is None:
        raise NotBuilt("jaxlib, whose FFI headers the kernels need, is not installed")
    folder = Path(given) if given else Path(jaxlib.origin).parent / "include"
    if not (folder / "xla/ffi/api/ffi.h").exists():
        raise NotBuilt(f"no xla/ffi/api/ffi.h under {folder}; set S5EQX_XLA_FFI_INCLUDE")
    return folder


def require_tools() -> None:
    compilers = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    if not any(shutil.which(shlex.split(c)[0]) for c in compilers):
        raise NotBuilt(f"no C++ compiler: looked for {', '.join(compilers)}; install one or set CXX")
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            raise NotBuilt(f"no {tool} on PATH; `pip install {tool}`")
    if importlib.util.find_spec("pybind11") is None:
        raise NotBuilt("pybind11 is not installed; `pip install pybind11`")


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines()]
        errors = [line for line in lines if "error" in line.lower()]
        raise NotBuilt((errors or lines or [f"{command[0]} failed"])[0])


class CMakeBuild(build_ext):
    """Each extension is a CMake target of the same name; a module that is not built leaves a line that says why."""

    def build_extension(self, ext):
        wish = os.environ.get("S5EQX_NATIVE", "AUTO").upper()
        if wish not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"S5EQX_NATIVE must be AUTO, ON or OFF; got {wish!r}")
        target = ext.name.rpartition(".")[2]
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        reports = {module.parent / f"{target}.txt"}
        if self.editable_mode or self.inplace:
            reports.add(ROOT / "s5eqx/ops" / f"{target}.txt")
        try:
            if wish == "OFF":
                raise NotBuilt("S5EQX_NATIVE=OFF")
            self.build_target(target, module.parent)
        except (NotBuilt, OSError) as why:
            if wish == "ON":
                raise SystemExit(f"s5eqx: {target} was not built: {why} (S5EQX_NATIVE=ON)") from why
            for stale in (module, ROOT / "s5eqx/ops" / module.name if self.editable_mode else module):
                stale.unlink(missing_ok=True)
            for report in reports:
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(f"not built: {why}\n")
            print(f"s5eqx: {target} was not built: {why}. Operations run on plain JAX.", file=sys.stderr)
        else:
            for report in reports:
                report.unlink(missing_ok=True)
            print(f"s5eqx: {target} built.", file=sys.stderr)

    def build_target(self, target, folder):
        include = ffi_headers()
        require_tools()
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(build, ignore_errors=True)  # a cache from another build environment names tools that are gone
        build.mkdir(parents=True)
        run(
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DS5EQX_XLA_FFI_INCLUDE={include}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )  # fmt: skip
        run("cmake", "--build", str(build), "--target", target)


setup(
    ext_modules=[Extension("s5eqx.ops._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
