"""Builds the native kernels with CMake: `_cpu`, and `_cuda` where there is an nvcc.

A failure to build is reported, not raised: s5eqx then runs on plain JAX.

Environment:
    S5EQX_NATIVE=AUTO|ON|OFF   AUTO (default) builds what it can; ON: an error where _cpu cannot be built; OFF: nothing
    S5EQX_CUDA=AUTO|ON|OFF     the same for _cuda alone
    S5EQX_CUDA_ARCHS           compute capabilities to compile for, as in "80;90"; default: those of ARCHITECTURES below
    S5EQX_NVCC, CUDACXX        nvcc; without them it is looked for in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and
                               among what pip installs (nvidia-cuda-nvcc)
    S5EQX_XLA_FFI_INCLUDE      folder with xla/ffi/api; default: jaxlib's own
    CXX, CMAKE_ARGS            the compiler, and further arguments to CMake
    NVCC_CCBIN                 the compiler that nvcc runs, where it cannot be that one
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Those of them that nvcc knows: CUDA 13 dropped 70.
ARCHITECTURES = ("70", "75", "80", "86", "89", "90", "100", "110", "120")
OLDEST_CUDA = (12, 0)


class NotBuilt(Exception):
    """Why a native module could not be built, in one line."""


def wish(variable: str) -> str:
    word = (os.environ.get(variable) or "AUTO").upper()
    if word not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"{variable} must be AUTO, ON or OFF; got {word!r}")
    return word


def wished_architectures() -> list[str]:
    given = os.environ.get("S5EQX_CUDA_ARCHS", "")
    words = re.split(r"[\s,;]+", given.strip(" \t\n,;"))
    if words == [""]:
        return []
    if not all(re.fullmatch(r"\d{2,3}", word) for word in words):
        raise SystemExit(
            f'S5EQX_CUDA_ARCHS must be compute capabilities without a dot, as in "80;90"; got {given!r}. '
            "`nvidia-smi --query-gpu=compute_cap --format=csv` shows those of a machine."
        )
    return sorted(set(words), key=int)


def run(*command: str, **environment: str) -> str:
    """Returns what the command says; a failure is `NotBuilt`, with the first error."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",  # a compiler may quote a source file of any encoding
        env={**os.environ, "LANGUAGE": "C", **environment},  # in English, so that an error is known as one
    )
    if done.returncode:
        print(done.stdout)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [i for i, line in enumerate(lines) if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
        first = errors[0] if errors else 0
        why = lines[first : first + 1] or [f"`{shlex.join(command)}` failed with status {done.returncode}"]
        if why[0].endswith(":"):  # CMake says where, and only then what
            why = lines[first : first + 2]
        raise NotBuilt(" ".join(why))
    return done.stdout


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
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            raise NotBuilt(f"no {tool} on PATH; `pip install {tool}`")
    if importlib.util.find_spec("pybind11") is None:
        raise NotBuilt("pybind11 is not installed; `pip install pybind11`")


def find_compiler() -> str:
    """The C++ compiler, without what CXX may have before and after it, as in "ccache g++ -m64"."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    present = [words for words in map(shlex.split, compilers) if shutil.which(words[0])]
    if not present:
        raise NotBuilt(f"no C++ compiler: looked for {', '.join(compilers)}; install one or set CXX")
    return [os.path.abspath(found) for word in present[0] if (found := shutil.which(word))][-1]


def find_nvcc() -> str:
    for variable in ("S5EQX_NVCC", "CUDACXX"):
        if given := os.environ.get(variable, "").strip():
            if found := shutil.which(given):
                return os.path.abspath(found)
            raise NotBuilt(f"{variable} must name nvcc; there is no program {given}")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    # Under build isolation pip's sysconfig still names the environment to install into; with uv only PATH tells of it.
    active = (site for folder in os.get_exec_path() for site in Path(folder).parent.glob("lib/python*/site-packages"))
    sites = [*active, *map(Path, sys.path), *(Path(sysconfig.get_path(name)) for name in ("platlib", "purelib"))]
    places = [f"{home}/bin/nvcc" for home in homes] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in [*places, *(str(nvcc) for site in sites for nvcc in site.glob("nvidia/cu[0-9]*/bin/nvcc"))]:
        if found := shutil.which(place):
            return os.path.abspath(found)
    raise NotBuilt(
        "no nvcc: not in S5EQX_NVCC, CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or this environment's "
        "packages; install the CUDA toolkit, or set S5EQX_NVCC to its nvcc, and then install s5eqx again"
    )


def find_toolkit(compiler: str) -> tuple[dict[str, str], str]:
    """What CMake must know of the CUDA toolkit, and its description. nvcc runs the C++ compiler even to say that."""
    compiler = os.environ.get("NVCC_CCBIN") or compiler
    nvcc = find_nvcc()
    release = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
    if release is None:
        raise NotBuilt(f"`{nvcc} --version` does not say which release it is")
    if (version := tuple(map(int, release.groups()))) < OLDEST_CUDA:
        raise NotBuilt(f"{nvcc} is of CUDA {version[0]}.{version[1]}, and 12.0 is the oldest that will do")
    known = re.findall(r"^compute_(\d+)$", run(nvcc, "--list-gpu-arch"), re.MULTILINE)
    architectures = wished_architectures() or [arch for arch in ARCHITECTURES if arch in known]
    if unknown := [arch for arch in architectures if arch not in known]:
        raise NotBuilt(f"S5EQX_CUDA_ARCHS asks for {', '.join(unknown)}; {nvcc} knows {', '.join(known)}")
    # The program found may be a script that calls nvcc from elsewhere; nvcc itself knows where its toolkit is.
    with tempfile.TemporaryDirectory() as litter:
        said = run(nvcc, "--dryrun", "-ccbin", compiler, "-c", "nothing.cu", TMPDIR=litter)
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    root = Path(top[1].strip() if top else Path(nvcc).parents[1]).resolve()
    machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    target = root / "targets" / f"{machine}-linux"

    def first(name: str, *folders: Path) -> str:
        for folder in folders:
            if (folder / name).exists():
                return str(folder / name)
        raise NotBuilt(f"no {name} under {root}, where {nvcc} has its toolkit")

    settings = {
        "S5EQX_NVCC": nvcc,
        "S5EQX_NVCC_CCBIN": compiler,
        "S5EQX_CUDA_INCLUDE": str(Path(first("cuda_runtime.h", root / "include", target / "include")).parent),
        "S5EQX_CUDART": first("libcudart_static.a", root / "lib64", root / "lib", target / "lib"),
        "S5EQX_CUDA_ARCHS": ";".join(architectures),
    }
    named = [f"sm_{arch}" for arch in architectures]
    span = " … ".join([named[0], named[-1]]) if len(named) > 1 else named[0]
    return settings, f"CUDA {release[1]}.{release[2]}: {span} + PTX"


class CMakeBuild(build_ext):
    """Each extension is a CMake target of the same name; a module that is not built leaves a line that says why."""

    def run(self):
        for variable in ("S5EQX_NATIVE", "S5EQX_CUDA"):
            wish(variable)
        wished_architectures()
        self.built, self.missing = [], []
        super().run()
        missing = [f"{target} not built: {why}" for target, why in self.missing]
        print("s5eqx: " + "; ".join([f"built {', '.join(self.built) or 'nothing'}", *missing]) + ".", file=sys.stderr)

    def build_extension(self, ext):
        target = ext.name.rpartition(".")[2]
        switches = ["S5EQX_NATIVE", "S5EQX_CUDA"][: 1 + (target == "_cuda")]
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        reports = {module.parent / f"{target}.txt"}
        if self.editable_mode or self.inplace:
            reports.add(ROOT / "s5eqx/ops" / f"{target}.txt")
        try:
            for switch in switches:
                if wish(switch) == "OFF":
                    raise NotBuilt(f"{switch}=OFF")
            self.built.append(f"{target} ({self.build_target(target, module.parent)})")
        except (NotBuilt, OSError) as why:
            if wish(switches[-1]) == "ON":
                raise SystemExit(f"s5eqx: {target} not built: {why} ({switches[-1]}=ON)") from why
            for stale in (module, ROOT / "s5eqx/ops" / module.name if self.editable_mode else module):
                stale.unlink(missing_ok=True)
            for report in reports:
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(f"not built: {why}\n", encoding="utf-8")
            self.missing.append((target, why))
        else:
            for report in reports:
                report.unlink(missing_ok=True)

    def build_target(self, target, folder) -> str:
        """Builds it; returns what it was built with."""
        include = ffi_headers()
        compiler = find_compiler()
        require_tools()
        toolkit, built_with = find_toolkit(compiler) if target == "_cuda" else ({}, "")
        import pybind11

        build = Path(self.build_temp).resolve() / target  # its own: trouble with CUDA stays there
        shutil.rmtree(build, ignore_errors=True)  # a cache from another build environment names tools that are gone
        build.mkdir(parents=True)
        settings = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "S5EQX_XLA_FFI_INCLUDE": include,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
            **toolkit,
        }
        defined = [f"-D{name}={value}" for name, value in settings.items()]
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        said = run("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *defined, *arguments)
        print(said, run("cmake", "--build", str(build), "--target", target), sep="\n")
        identified = re.search(r"CXX compiler identification is (.+)", said)
        return built_with or (identified[1] if identified else "C++")


setup(
    # In this order: trouble with CUDA never costs the CPU kernels.
    ext_modules=[Extension(f"s5eqx.ops.{target}", sources=[], optional=True) for target in ("_cpu", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
