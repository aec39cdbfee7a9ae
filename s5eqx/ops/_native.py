"""The one file that talks to XLA's FFI: loads the kernel modules, checks and registers them, says what is live."""

import dataclasses
import importlib
import importlib.machinery
import os
import platform
import re
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_HERE = Path(__file__).parent
_PROJECTIONS = ("float32", "3xtf32", "tf32")


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
        return report.read_text(encoding="utf-8").strip()
    if (_HERE.parents[1] / "setup.py").exists():
        return "source tree, not the installed package: run `pip install .` and import from another folder"
    return "not part of this build"


class _NotLive(Exception):
    """Why the kernels of a platform are not live, in one line."""


def _import(name: str) -> Any:
    # In this folder and nowhere else: an editable install elsewhere also answers to the name.
    if importlib.machinery.PathFinder.find_spec(f"s5eqx.ops.{name}", [str(_HERE)]) is None:
        raise _NotLive(_why_absent(name))
    try:
        module = importlib.import_module(f"s5eqx.ops.{name}")
    except ImportError as error:
        problem = f"the module does not load: {error}"
    else:
        # A handler that is newer than the runtime registers without complaint and then breaks the whole backend.
        runtime = _runtime_ffi_api()
        if module.ffi_api <= runtime:
            return module
        problem = f"built for FFI API {module.ffi_api}, newer than jaxlib's {runtime}: rebuild s5eqx with this jaxlib"
    warnings.warn(f"s5eqx.ops.{name} was built and cannot be used: {problem}", RuntimeWarning, stacklevel=2)
    raise _NotLive(problem)


def _cpu_detail(module: Any) -> str:
    wish = os.environ.get("S5EQX_CPU_ISA", module.instruction_set)
    if wish != module.instruction_set:
        warnings.warn(
            "S5EQX_CPU_ISA must be generic, x86-64-v3 or x86-64-v4, and one that the build and the processor have; "
            f"got {wish!r}, so the kernels run {module.instruction_set}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return module.instruction_set


def _capability(architecture: str) -> tuple[int, int]:
    number = architecture.rpartition("_")[2]
    return int(number[:-1]), int(number[-1])


def _code_for(device: tuple[int, int], module: Any) -> str | None:
    """Which of the module's architectures a device of this compute capability runs, if any.

    Machine code runs on its own major version, from its own minor version on. PTX is compiled by the driver for what is
    newer than itself, unless it was written by a toolkit newer than the driver.
    """
    ptx = _release(module.driver()) >= _release(module.toolkit)
    fitting = [
        architecture
        for architecture in module.architectures
        if (own := _capability(architecture)) <= device
        and (own[0] == device[0] if architecture.startswith("sm_") else ptx)
    ]
    return max(fitting, key=lambda a: (a.startswith("sm_"), _capability(a)), default=None)


def _release(version: int | str) -> tuple[int, int]:
    """Of CUDA: 13.0 in the driver's notation, 13000, or in the toolkit's."""
    if isinstance(version, int):
        return version // 1000, version % 1000 // 10
    major, minor = map(int, version.split("."))
    return major, minor


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _cuda_detail(module: Any) -> str:
    driver, devices = _release(module.driver()), module.devices()
    machine_code = [a for a in module.architectures if a.startswith("sm_")]
    ptx = [f"PTX {_dotted(_capability(a))}" for a in module.architectures if a.startswith("compute_")]
    span = " … ".join([machine_code[0], *machine_code[1:][-1:]])
    built = ", ".join([f"CUDA {module.toolkit}", span, *ptx])
    if not devices and any(driver) and (refusal := module.refusal()):
        toolkit = _release(module.toolkit)
        if driver >= toolkit:
            raise _NotLive(f"{built}; no CUDA device: {refusal}")
        # Within a major version an older driver mostly does: CUDA's runtime is the judge of that.
        older = f"CUDA {driver[0]}" if driver[0] < toolkit[0] else f"CUDA {_dotted(driver)} or older"
        raise _NotLive(
            f"built with CUDA {module.toolkit}, and the driver ends at CUDA {_dotted(driver)}: update the driver, or "
            f"install s5eqx as built with {older}, a wheel or from source with its nvcc"
        )
    if not devices:
        return f"{built}; no CUDA device: {'none visible' if any(driver) else 'driver missing'}"
    unfit = [device for device in devices if _code_for(device[1:], module) is None]
    if unfit:
        name, major, minor = unfit[0]
        wanted = ";".join(f"{major}{minor}" for major, minor in sorted({device[1:] for device in devices}))
        hide = ", or hide it with CUDA_VISIBLE_DEVICES" if len(unfit) < len(devices) else ""
        raise _NotLive(
            f"{name} (sm_{major}{minor}) runs nothing of what was built ({built}): install s5eqx from source "
            f'with S5EQX_CUDA_ARCHS="{wanted}"{hide}'
        )
    kinds = Counter(f"{name} (sm_{major}{minor})" for name, major, minor in devices)
    listed = ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())
    return f"{built}; {len(devices)} {'device' if len(devices) == 1 else 'devices'}: {listed}"


_PLATFORMS = {"cpu": ("_cpu", _cpu_detail), "cuda": ("_cuda", _cuda_detail)}
_loaded: dict[str, tuple[NativeBackend, Any]] = {}
_lock = threading.Lock()


def _load(platform_name: str) -> tuple[NativeBackend, Any]:
    name, detail = _PLATFORMS[platform_name]
    module = None
    try:
        module = _import(name)
        backend = NativeBackend(platform_name, True, f"native kernels, {detail(module)}")
    except _NotLive as why:
        return NativeBackend(platform_name, False, str(why)), module
    for target, handler in module.targets.items():
        jax.ffi.register_ffi_target(target, handler, platform=platform_name)
    return backend, module


def _backend(platform_name: str) -> tuple[NativeBackend, Any]:
    """What became of a platform, and its module. Found out at the first question, once a process.

    Not when s5eqx is imported: to ask CUDA's driver then would break programs that fork afterwards.
    """
    with _lock:
        if platform_name not in _loaded:
            _loaded[platform_name] = _load(platform_name)
        return _loaded[platform_name]


_cpu = _backend("cpu")[0]
if os.environ.get("S5EQX_REQUIRE_NATIVE") == "1" and not _cpu.live:
    raise ImportError(f"S5EQX_REQUIRE_NATIVE=1, but the native CPU kernels are not live: {_cpu.detail}")


def is_live(platform_name: str) -> bool:
    """Whether the native kernels of a platform are registered."""
    return _backend(platform_name)[0].live


def workspace_bytes(
    platform_name: str, target: str, a_shape: Sequence[Any], b_shape: Sequence[Any], dtype: Any, pairs: bool
) -> int | None:
    """The size of the workspace that a live target wants as its last result, for operands in canonical shapes.

    None where the platform's targets take no workspace.
    """
    if platform_name == "cpu":
        return None
    dtype = jnp.dtype(dtype)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    scalar_bytes = dtype.itemsize // 2 if is_complex else dtype.itemsize
    batch, length, states = _fixed(b_shape)[:3]
    module = _backend(platform_name)[1]
    return module.workspace_bytes(target, batch, length, states, scalar_bytes, is_complex or pairs, a_shape[1] > 1)


def ssm_workspace_bytes(platform_name: str, target: str, u_shape: Sequence[Any], states: int, dtype: Any) -> int | None:
    """The same for the targets of the state-space step; -1 where they do not take such sizes."""
    if platform_name == "cpu":
        return None
    batch, length, width = _fixed(u_shape)
    module, scalar_bytes = _backend(platform_name)[1], jnp.dtype(dtype).itemsize
    return module.ssm_workspace_bytes(target, batch, length, width, states, scalar_bytes, int(ssm_projection(dtype)))


def ssm_projection(dtype: Any) -> np.int64:
    """How the CUDA kernels multiply matrices: 0 in the precision of `dtype`; in float32 also on tensor cores, 1 with
    three products for one, 2 with the precision of TF32. S5EQX_SSM_PROJECTION chooses, for the whole process."""
    return np.int64(_projection() if jnp.dtype(dtype) == jnp.float32 else 0)


def ssm_rounds(device: Any) -> bool:
    """Whether on a device, as JAX gives it, the products of the state-space step have the precision of TF32."""
    return device.platform != "cpu" and runs_native(device) and _PROJECTIONS[_projection()] == "tf32"


@cache
def _projection():
    wish = os.environ.get("S5EQX_SSM_PROJECTION", _PROJECTIONS[0])
    if wish not in _PROJECTIONS:
        raise ValueError(f"S5EQX_SSM_PROJECTION must be one of {', '.join(_PROJECTIONS)}; got {wish!r}.")
    return _PROJECTIONS.index(wish)


def _fixed(shape):
    if not all(isinstance(n, int) for n in shape):
        raise ValueError(
            f"the CUDA kernels need a fixed shape; got ({', '.join(map(str, shape))}): export one program per shape, "
            'or use_backend("jax")'
        )
    return shape


def backends() -> tuple[NativeBackend, ...]:
    """The native backends, live or not, each with its one-line reason."""
    return tuple(_backend(platform_name)[0] for platform_name in _PLATFORMS)


def runs_native(device: Any) -> bool:
    """Whether operations on a device, as JAX gives it, run native kernels."""
    name = device.platform
    if name == "gpu":
        name = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return name in _PLATFORMS and is_live(name)


def show_config() -> None:
    """Prints versions, backends, devices, and the environment variables that change what is built and run."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "equinox")}
    print(f"s5eqx   {_HERE.parent}")
    print(f"python  {platform.python_version()} on {platform.machine()}")
    print("with    " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    modules = {name: _backend(platform_name)[1] for platform_name, (name, _) in _PLATFORMS.items()}
    built = [f"; {name} built for {_dotted(module.ffi_api)}" for name, module in modules.items() if module]
    print(f"FFI     API {_dotted(_runtime_ffi_api())}" + "".join(built))
    for backend in backends():
        print(f"{backend.platform:<8}{'live' if backend.live else 'plain JAX'}: {backend.detail}")
    if cuda := modules["_cuda"]:
        print(f"driver  {f'CUDA {_dotted(_release(cuda.driver()))}' if cuda.driver() else 'none'}")
        print(f"code    {' '.join(cuda.architectures)}")
        for name, major, minor in cuda.devices():
            print(f"device  {name} (sm_{major}{minor}) runs {_code_for((major, minor), cuda) or 'none of it'}")
    try:
        devices = jax.devices()
    except RuntimeError as error:  # the platform that JAX_PLATFORMS asks for is not there
        devices = []
        print(f"jax     no devices: {str(error).splitlines()[0]}")
    for device in devices:
        kernels = "native kernels" if runs_native(device) else "plain JAX"
        print(f"jax     {device} ({device.device_kind}) runs {kernels}")
    for name in sorted(os.environ):
        if name.startswith("S5EQX_"):
            print(f"{name}={os.environ[name]}")
    _projection()  # raises where it is not one of those that there are
