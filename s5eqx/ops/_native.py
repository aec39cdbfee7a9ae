"""The one file that talks to XLA's FFI: loads the kernel modules, checks and registers them, says what is live."""

import dataclasses
import importlib
import importlib.machinery
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import jax

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class NativeBackend:
    """What became of the native kernels of one platform."""

    platform: str
    """`"cpu"` or `"cuda"`."""
    live: bool
    """Whether operations on that platform run the native kernels."""
    detail: str
    """One line: what is live, or why it is not."""


def _runtime_ffi_api() -> tuple[int, int]:
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def _why_absent(name: str) -> str:
    report = _HERE / f"{name}.txt"  # setup.py leaves one line here about what it could not build
    if report.exists():
        return report.read_text().strip()
    if (_HERE.parents[1] / "setup.py").exists():
        return "source tree, not the installed package: run `pip install .` and import from another folder"
    return "not part of this build"


def _load(platform_name: str, name: str) -> NativeBackend:
    # In this folder and nowhere else: an editable install elsewhere also answers to the name.
    if importlib.machinery.PathFinder.find_spec(f"s5eqx.ops.{name}", [str(_HERE)]) is None:
        return NativeBackend(platform_name, False, _why_absent(name))
    try:
        module = importlib.import_module(f"s5eqx.ops.{name}")
    except ImportError as error:
        return NativeBackend(platform_name, False, f"the module does not load: {error}")
    # A handler that is newer than the runtime registers without complaint and then breaks the whole backend.
    runtime = _runtime_ffi_api()
    if module.ffi_api > runtime:
        return NativeBackend(
            platform_name,
            False,
            f"built for FFI API {module.ffi_api}, newer than jaxlib's {runtime}: rebuild s5eqx with this jaxlib",
        )
    for target, handler in module.targets.items():
        jax.ffi.register_ffi_target(target, handler, platform=platform_name)
    return NativeBackend(platform_name, True, f"native kernels, {module.instruction_set}")


_BACKENDS = {"cpu": _load("cpu", "_cpu"), "cuda": _load("cuda", "_cuda")}

if os.environ.get("S5EQX_REQUIRE_NATIVE") == "1" and not _BACKENDS["cpu"].live:
    raise ImportError(f"S5EQX_REQUIRE_NATIVE=1, but the native CPU kernels are not live: {_BACKENDS['cpu'].detail}")


def is_live(platform_name: str) -> bool:
    """Whether the native kernels of a platform are registered."""
    return _BACKENDS[platform_name].live


def backends() -> tuple[NativeBackend, ...]:
    """The native backends, live or not, each with its one-line reason."""
    return tuple(_BACKENDS.values())


def show_config() -> None:
    """Prints versions, backends, and the environment variables that change what is built and run."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "equinox")}
    print(f"s5eqx   {_HERE.parent}")
    print(f"python  {platform.python_version()} on {platform.machine()}")
    print("with    " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"FFI     API {'.'.join(map(str, _runtime_ffi_api()))}")
    for backend in backends():
        print(f"{backend.platform:<8}{'live' if backend.live else 'plain JAX'}: {backend.detail}")
    for name in sorted(os.environ):
        if name.startswith("S5EQX_"):
            print(f"{name}={os.environ[name]}")
