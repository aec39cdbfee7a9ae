"""Models and layers in one safetensors file: their arrays, and in the header the structure that holds them.

The header names public classes and a short list of functions only. Reading a file looks these names up and sets
fields: no constructor runs, nothing is imported, and no code comes from the file.
"""

import dataclasses
import inspect
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from s5eqx import __version__, models, nn
from s5eqx.interop._table import as_given

_FORMAT = "1"
_CLASSES = {
    f"{home.__name__}.{name}": cls
    for home in (nn, models)
    for name, cls in vars(home).items()
    if inspect.isclass(cls) and issubclass(cls, eqx.Module) and not name.startswith("Abstract")
} | {
    f"equinox.nn.{cls.__name__}": cls
    for cls in (eqx.nn.Linear, eqx.nn.Embedding, eqx.nn.LayerNorm, eqx.nn.Dropout, eqx.nn.Identity, eqx.nn.Lambda)
}
_FUNCTIONS = {
    f"jax.nn.{name}": getattr(jax.nn, name)
    for name in ("celu", "elu", "gelu", "relu", "selu", "sigmoid", "silu", "softplus", "soft_sign", "tanh")
}
_DTYPES = {
    "BOOL": bool,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def save(path: str | Path, model: eqx.Module) -> None:
    """Writes `model`, or one layer, to a file that `load` reads back to the bit.

    The file appears whole or not at all, and replaces one of the same name.

    **Raises:** `ValueError` for what a file cannot hold, such as a lambda or a complex array.
    """
    arrays = {}
    structure = _describe(model, "", arrays)
    about = {"format": _FORMAT, "s5eqx": __version__, "jax": jax.__version__, "equinox": eqx.__version__}
    about["structure"] = json.dumps(structure)
    about["crc32"] = _checksum(about["structure"], arrays)
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.numpy.save_file(arrays, part, {"s5eqx": json.dumps(about)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | Path) -> Any:
    """The model that `save` wrote to `path`.

    **Raises:** `ValueError` for a file that is damaged, of another origin, or of a version that this one cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load reads a file that `save` wrote; {path} is no file.")
    data = path.read_bytes()
    try:
        tensors = {name: _array(tensor) for name, tensor in safetensors.deserialize(data)}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["s5eqx"])
        found, by, structure, checksum = (about[name] for name in ("format", "s5eqx", "structure", "crc32"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}. Save the model again.") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds tensors, but no model that `save` wrote. For weights of the official repositories see "
            "`from_safari` and `from_s5`."
        ) from error
    try:
        if found != _FORMAT:
            raise ValueError(f"it has format {found}, of s5eqx {by}; this version reads format {_FORMAT}")
        if checksum != _checksum(structure, tensors):
            raise ValueError("its contents do not match their checksum, so it is damaged")
        model = _build(json.loads(structure), "", tensors)
        if tensors:
            raise ValueError(f"its structure has no place for {', '.join(tensors)}")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read by s5eqx {__version__}: {error}.") from error
    return model


def _checksum(structure, arrays):
    checksum = zlib.crc32(structure.encode())
    for name in sorted(arrays):
        checksum = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), checksum))
    return checksum


def _array(tensor):
    dtype = _DTYPES[tensor["dtype"]]
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


# 1. A tree as JSON: the scalars of JSON stand for themselves, all else is an object with a key that says what it is.


def _describe(node, path, arrays):
    if isinstance(node, np.generic) and node.dtype.kind in "bif":
        node = node.item()
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, float):
        return node if math.isfinite(node) else {"float": repr(node)}
    if eqx.is_array(node) or isinstance(node, np.ndarray):
        if jnp.issubdtype(node.dtype, jax.dtypes.extended) or node.dtype not in _DTYPES.values():
            raise ValueError(
                f"{path} must be of real numbers of up to 64 bits to be saved; it is {node.dtype}. Store complex "
                "numbers as (re, im) pairs."
            )
        arrays[path] = np.asarray(node, order="C")
        return {"array": str(node.dtype), "shape": list(node.shape)}
    if isinstance(node, tuple | list) and type(node) in (tuple, list):
        return {type(node).__name__: [_describe(item, f"{path}[{i}]", arrays) for i, item in enumerate(node)]}
    if type(node) is dict and all(isinstance(name, str) for name in node):
        return {"dict": {name: _describe(item, f"{path}[{name!r}]", arrays) for name, item in node.items()}}
    for name, function in _FUNCTIONS.items():
        if node is function:
            return {"function": name}
    for name, cls in _CLASSES.items():
        if type(node) is cls:
            fields = {field: _describe(getattr(node, field), _join(path, field), arrays) for field in _fields(cls)}
            return {"class": name, "fields": fields}
    raise ValueError(
        f"{path or 'the model'} must be a public module, a number, a string, an array, or one of "
        f"{', '.join(_FUNCTIONS)} to be saved; it is {node!r}."
    )


def _build(node, path, tensors):
    """The inverse. Takes what it uses out of `tensors`."""
    if node is None or isinstance(node, bool | int | float | str):
        return node
    match node:
        case {"float": "inf" | "-inf" | "nan" as number}:
            return float(number)
        case {"array": dtype, "shape": shape}:
            return _take(tensors, path, dtype, shape)
        case {"tuple": [*items]}:
            return tuple(_build(item, f"{path}[{i}]", tensors) for i, item in enumerate(items))
        case {"list": [*items]}:
            return [_build(item, f"{path}[{i}]", tensors) for i, item in enumerate(items)]
        case {"dict": dict(items)}:
            return {name: _build(item, f"{path}[{name!r}]", tensors) for name, item in items.items()}
        case {"function": name}:
            return _look_up(_FUNCTIONS, name, path)
        case {"class": name, "fields": dict(fields)}:
            cls = _look_up(_CLASSES, name, path)
            if fields.keys() != set(_fields(cls)):
                raise ValueError(
                    f"{path or 'the model'} is a {name} of fields {', '.join(_fields(cls))}, not of {', '.join(fields)}"
                )
            module = object.__new__(cls)
            for field, value in fields.items():
                object.__setattr__(module, field, _build(value, _join(path, field), tensors))
            return module
    raise ValueError(f"{path or 'the model'} is described by {node!r}, which means nothing here")


def _look_up(table, name, path):
    if name not in table:
        raise ValueError(f"{path or 'the model'} is a {name}, which this version does not know")
    return table[name]


def _take(tensors, path, dtype, shape):
    if path not in tensors:
        raise ValueError(f"the array {path} is missing")
    array = tensors.pop(path)
    if [str(array.dtype), list(array.shape)] != [dtype, shape]:
        raise ValueError(f"{path} should be {dtype}{shape}, but it is {array.dtype}{list(array.shape)}")
    return as_given(path, array)


def _fields(cls):
    return [field.name for field in dataclasses.fields(cls)]


def _join(path, name):
    return f"{path}.{name}" if path else name
