"""Copies of GGUF files with other keys or tensors, for tests of what happens to whoever loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Keys = Mapping[str, "bool | int | float | str | list[int] | list[float] | tuple[Any, gguf.GGUFValueType] | None"]


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, tuple):  # a value with its GGUF type
        writer.add_key_value(name, *value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, list):
        writer.add_array(name, value)
    else:
        writer.add_string(name, value)


def rewrite(
    source: Path,
    target: Path,
    keys: Keys | None = None,
    tensors: Mapping[str, npt.NDArray[Any] | None] | None = None,
) -> Path:
    """Copy a GGUF file.

    Args:
        keys: values to add or to replace; None drops the key. ints become uint32, floats float32, lists arrays of int32
            or of float32.
        tensors: arrays (NumPy order of axes) to replace; None drops the tensor.
    """
    keys, tensors = dict(keys or {}), dict(tensors or {})
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
            continue
        kinds = list(field.types)
        sub = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kinds[0], sub_type=sub)
    for name, value in keys.items():
        if value is not None:
            _add(writer, name, value)
    for tensor in reader.tensors:
        changed = tensors.get(tensor.name)
        if changed is not None:
            writer.add_tensor(tensor.name, changed)
        elif tensor.name not in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def data_start(path: Path) -> int:
    """Where the tensors' data begin, by our own reader: the gguf package takes a second for a vocabulary."""
    from qap_gguf import _core

    return int(_core.gguf_info(str(path))[2])


def tensor_bytes(path: Path, name: str) -> tuple[int, int]:
    """Where a tensor's data begins in the file, and how long it is."""
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == name:
            return int(tensor.data_offset), int(tensor.n_bytes)
    raise KeyError(name)


def patch_bytes(source: Path, target: Path, offset: int, data: bytes) -> Path:
    """Copy a file with some bytes replaced."""
    whole = bytearray(source.read_bytes())
    whole[offset : offset + len(data)] = data
    target.write_bytes(whole)
    return target
