"""How setup.py finds a CUDA toolkit, and what it says of one that will not do."""

import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from s5eqx.ops import _native

setuptools = pytest.importorskip("setuptools")
SETUP = Path(__file__).parents[1] / "setup.py"
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_90\\ncompute_90a\\ncompute_121\\n' ;;
  --dryrun) [ "$2 $3" = "-ccbin /opt/g++" ] && echo "#$ TOP={top}/bin/.." ;;
esac
"""


@pytest.fixture
def build(monkeypatch):
    """The functions of setup.py, on a machine without nvcc."""
    for name in ("S5EQX_NVCC", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "S5EQX_CUDA_ARCHS", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    which = shutil.which
    hidden = ("/usr/local/cuda/", sys.prefix)
    monkeypatch.setattr(
        shutil, "which", lambda name: None if name.startswith(hidden) or which(name) == "/bin/nvcc" else which(name)
    )
    return SimpleNamespace(**runpy.run_path(str(SETUP)))


def put_nvcc(folder, release="13.0", top="/nonexistent"):
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(NVCC.format(release=release, top=top))
    nvcc.chmod(0o755)
    return str(nvcc)


def put_toolkit(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


@pytest.mark.smoke
def test_where_nvcc_is_looked_for(build, tmp_path, monkeypatch):
    """Each place goes before those that were tried before it."""
    with pytest.raises(build.NotBuilt, match="no nvcc: not in S5EQX_NVCC, CUDACXX, CUDA_HOME, CUDA_PATH, PATH"):
        build.find_nvcc()
    site = tmp_path / "lib/python3.11/site-packages"
    from_pip = put_nvcc(site / "nvidia/cu13/bin")
    with monkeypatch.context() as of_the_interpreter:
        of_the_interpreter.syspath_prepend(site)
        assert build.find_nvcc() == from_pip
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin")  # the environment is active
    assert build.find_nvcc() == from_pip
    on_path = put_nvcc(tmp_path / "bin")
    assert build.find_nvcc() == on_path
    expected = on_path
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert build.find_nvcc() == expected  # a home without nvcc is passed over
        expected = put_nvcc(tmp_path / variable / "bin")
        assert build.find_nvcc() == expected
    for variable in ("CUDACXX", "S5EQX_NVCC"):
        monkeypatch.setenv(variable, str(tmp_path / variable / "nvcc"))
        with pytest.raises(build.NotBuilt, match=f"{variable} must name nvcc; there is no program .*/{variable}/nvcc"):
            build.find_nvcc()
        expected = put_nvcc(tmp_path / variable)
        assert build.find_nvcc() == expected


@pytest.mark.parametrize(
    "given, expected",
    [("", []), (" ; ", []), ("90", ["90"]), ("120 80,90;80", ["80", "90", "120"])],
)
def test_architectures_asked_for(build, given, expected, monkeypatch):
    monkeypatch.setenv("S5EQX_CUDA_ARCHS", given)
    assert build.wished_architectures() == expected


@pytest.mark.parametrize("given", ["native", "9.0", "sm_90", "90a", "9", "80;all"])
def test_architectures_that_are_refused(build, given, monkeypatch):
    monkeypatch.setenv("S5EQX_CUDA_ARCHS", given)
    with pytest.raises(SystemExit, match=f'must be compute capabilities without a dot, as in "80;90"; got {given!r}'):
        build.wished_architectures()


@pytest.mark.parametrize(
    "folder", ["lib64", "lib", f"targets/{os.uname().machine.replace('aarch64', 'sbsa')}-linux/lib"]
)
def test_a_toolkit_behind_a_wrapper(build, folder, tmp_path, monkeypatch):
    """The program on PATH stands elsewhere than its toolkit."""
    root = (tmp_path / "cuda").resolve()
    monkeypatch.setenv("S5EQX_NVCC", put_nvcc(tmp_path / "bin", top=root))
    (root / "bin").mkdir(parents=True)
    with pytest.raises(build.NotBuilt, match=f"no cuda_runtime.h under {root}, where .*/bin/nvcc has its toolkit"):
        build.find_toolkit("/opt/g++")
    put_toolkit(root, "include/cuda_runtime.h", f"{folder}/libcudart_static.a")
    settings, described = build.find_toolkit("/opt/g++")
    assert settings == {
        "S5EQX_NVCC": str(tmp_path / "bin/nvcc"),
        "S5EQX_NVCC_CCBIN": "/opt/g++",
        "S5EQX_CUDA_INCLUDE": str(root / "include"),
        "S5EQX_CUDART": str(root / folder / "libcudart_static.a"),
        "S5EQX_CUDA_ARCHS": "75;90",
    }
    assert described == "CUDA 13.0: sm_75 … sm_90 + PTX"
    monkeypatch.setenv("S5EQX_CUDA_ARCHS", "121")
    assert build.find_toolkit("/opt/g++")[1] == "CUDA 13.0: sm_121 + PTX"
    monkeypatch.setenv("NVCC_CCBIN", "/opt/g++")
    assert build.find_toolkit("/usr/bin/g++") == build.find_toolkit("/opt/g++")


@pytest.mark.parametrize("given", ["{0}/g++", "ccache {0}/g++ -m64", "{0}/g++ -isystem {0}"])
def test_the_compiler_that_nvcc_is_told_of(build, given, tmp_path, monkeypatch):
    for name in ("ccache", "cmake", "ninja", "g++"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("CXX", given.format(tmp_path))
    assert build.find_compiler() == f"{tmp_path}/g++"


def test_every_device_from_the_oldest_on_has_code(build):
    """Machine code goes for one major version, and there was none for 11.0."""
    module = SimpleNamespace(
        architectures=(*(f"sm_{a}" for a in build.ARCHITECTURES), f"compute_{build.ARCHITECTURES[-1]}"),
        driver=lambda: 13000,
        toolkit="13.0",
    )
    for device in (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130):
        code = _native._code_for(divmod(device, 10), module) or "none"
        assert code.startswith("sm_" if device < 130 else "compute_"), device
    budgeted = runpy.run_path(str(SETUP.parent / "tests/cuda_host/registers.py"))["ARCHITECTURES"]
    assert budgeted == tuple(a for a in build.ARCHITECTURES if a != "70")  # CUDA 13, which it runs, dropped it


@pytest.mark.smoke
def test_toolkits_that_will_not_do(build, tmp_path, monkeypatch):
    monkeypatch.setenv("S5EQX_NVCC", put_nvcc(tmp_path, release="11.8"))
    with pytest.raises(build.NotBuilt, match=r"nvcc is of CUDA 11\.8, and 12\.0 is the oldest that will do"):
        build.find_toolkit("/opt/g++")
    put_nvcc(tmp_path, release="12.9")
    monkeypatch.setenv("S5EQX_CUDA_ARCHS", "90 100")
    with pytest.raises(build.NotBuilt, match=r"S5EQX_CUDA_ARCHS asks for 100; .*/nvcc knows 75, 90, 121"):
        build.find_toolkit("/opt/g++")
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho a word\n")
    with pytest.raises(build.NotBuilt, match="--version` does not say which release it is"):
        build.find_toolkit("/opt/g++")


@pytest.mark.parametrize(
    "said, reason",
    [
        (
            "[1/2] nvcc -Werror all\nx.cu(3): error: no such thing\nx.cu(4): error: another",
            "x.cu(3): error: no such thing",
        ),
        ("[1/2] nvcc\nptxas fatal   : Unsupported .version 9.5", "ptxas fatal   : Unsupported .version 9.5"),
        (
            "CMake Error at CMakeLists.txt:3 (find_package):\n\n  No pybind11",
            "CMake Error at CMakeLists.txt:3 (find_package): No pybind11",
        ),
        ("Killed", "Killed"),
    ],
)
def test_the_reason_is_the_first_error(build, said, reason):
    with pytest.raises(build.NotBuilt) as failure:
        build.run("sh", "-c", f"echo '{said}'; exit 1")
    assert str(failure.value) == reason
    with pytest.raises(build.NotBuilt, match=r"^x.c:1: error: \\xe9 in C$"):  # é, but not in UTF-8
        build.run("sh", "-c", r"printf 'x.c:1: error: \351 in %s\n' $LANGUAGE; exit 1")
    with pytest.raises(build.NotBuilt, match="`sh -c 'exit 3'` failed with status 3"):
        build.run("sh", "-c", "exit 3")
