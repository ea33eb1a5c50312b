"""Writes one GGUF file: metadata, then the tensors one at a time, under temporary names until all is well.

Facts: gguf-py's GGUFWriter in its streaming form (add_tensor_info, then write_tensor_data in the same order).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from qap_gguf.convert.output.disk_space import writing
from qap_gguf.convert.source.checkpoint import TensorRef
from qap_gguf.errors import ConvertError
from qap_gguf.files.atomic import name_once, shared, sync, temporary_name

__all__ = [
    "Q8_0_BLOCK",
    "Metadata",
    "OutputFolder",
    "TensorPlan",
    "cast",
    "f32",
    "f32_list",
    "i32_list",
    "str_list",
    "value",
    "write_gguf",
]

Array = npt.NDArray[Any]
Type = gguf.GGUFValueType
# key -> (value, GGUF type, GGUF type of a list's members)
Metadata = dict[str, tuple[Any, Type, Type | None]]

_F32_MAX = float(np.finfo(np.float32).max)
_TYPES: dict[str, tuple[gguf.GGMLQuantizationType, np.dtype[Any]]] = {
    "F32": (gguf.GGMLQuantizationType.F32, np.dtype("<f4")),
    "F16": (gguf.GGMLQuantizationType.F16, np.dtype("<f2")),
    "BF16": (gguf.GGMLQuantizationType.BF16, np.dtype("<u2")),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, np.dtype("u1")),
}
Q8_0_BLOCK, _Q8_0_BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]  # weights and bytes of a block


def value(v: str | bool | int | float) -> tuple[Any, Type, Type | None]:
    """A Python value with the GGUF type that llama.cpp expects for it: string, bool, uint32 or float32."""
    if isinstance(v, str):
        return v, Type.STRING, None
    if isinstance(v, (bool, np.bool_)):
        return bool(v), Type.BOOL, None
    if isinstance(v, (int, np.integer)):
        return int(v), Type.UINT32, None
    if isinstance(v, (float, np.floating)):
        return f32(float(v))
    raise ConvertError(
        f"expected a str, bool, int or float for the metadata, got {type(v).__name__}; this is a bug, please report it"
    )


def f32(v: float) -> tuple[Any, Type, Type | None]:
    return _fits_f32(v), Type.FLOAT32, None


def f32_list(v: list[float]) -> tuple[Any, Type, Type | None]:
    return [_fits_f32(x) for x in v], Type.ARRAY, Type.FLOAT32


def _fits_f32(v: float) -> float:
    number = float(v)
    if not abs(number) <= _F32_MAX:
        raise ConvertError(
            f"expected numbers that fit 32 bits in the checkpoint's configs, got {number}; fetch the checkpoint again"
        )
    return number


def i32_list(v: list[int]) -> tuple[Any, Type, Type | None]:
    return [int(x) for x in v], Type.ARRAY, Type.INT32


def str_list(v: list[str]) -> tuple[Any, Type, Type | None]:
    return v, Type.ARRAY, Type.STRING


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: from `source` (a checkpoint's tensor or an array), as `dtype` F32, F16, BF16 or Q8_0.

    `shape` is in PyTorch's order (GGUF's `ne` reversed). `transform` reorders the raw values before they are converted.
    """

    name: str
    source: TensorRef | Array
    dtype: str
    shape: tuple[int, ...]
    transform: Callable[[Array], Array] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the array that goes into the file: rows of bytes for a quantized type."""
        if self.dtype != "Q8_0":
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // Q8_0_BLOCK * _Q8_0_BYTES)

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * _TYPES[self.dtype][1].itemsize

    def values(self) -> Array:
        """The values as they go into the file. Raises ConvertError where a value does not fit F16."""
        if isinstance(self.source, TensorRef):
            raw, kind, name = self.source.read(), self.source.dtype, self.source.name
        else:
            raw, kind, name = self.source, "F32", self.name
        if self.transform is not None:
            raw = self.transform(raw)
        if self.dtype == "Q8_0":
            return _quantize(raw.reshape(-1, self.shape[-1]), kind, name).reshape(self.stored_shape)
        return np.ascontiguousarray(cast(raw, kind, self.dtype, name)).reshape(self.shape)


def _quantize(rows: Array, kind: str, name: str, step: int = 1 << 20) -> Array:
    """Rows of raw values of the safetensors type `kind` as rows of Q8_0 blocks; some rows at a time."""
    n_rows, width = rows.shape
    out: Array = np.empty((n_rows, width // Q8_0_BLOCK * _Q8_0_BYTES), np.uint8)
    for start in range(0, n_rows, n := max(step // width, 1)):
        floats = cast(rows[start : start + n], kind, "F32", name)
        out[start : start + n] = gguf.quants.quantize(floats, gguf.GGMLQuantizationType.Q8_0)
    return out


def cast(raw: Array, source: str, target: str, name: str, step: int = 1 << 22) -> Array:
    """Raw values of the safetensors type `source` as `target`, same shape; no copy where both are the same.

    Works in slices of `step` values, so that beside input and output only little memory is used.
    """
    if source == target:
        return raw
    flat = raw.reshape(-1)
    out: Array = np.empty(flat.shape, _TYPES[target][1])
    for start in range(0, flat.size, step):
        part = out[start : start + step]
        part[...] = _cast_slice(flat[start : start + step], source, target)
        finite = (part & np.uint16(0x7F80)) != 0x7F80 if target == "BF16" else np.isfinite(part)
        if not finite.all():
            raise ConvertError(
                f"expected values that fit {target}, got larger ones in {name}; choose F32, BF16 or a quantized type"
            )
    return out.reshape(raw.shape)


def _cast_slice(raw: Array, source: str, target: str) -> Array:
    # bfloat16 is the upper half of a float32
    full: Array = (raw.astype("<u4") << 16).view("<f4") if source == "BF16" else raw
    with np.errstate(over="ignore"):  # the caller looks for infinity
        if target != "BF16":
            out: Array = full.astype(_TYPES[target][1])
            return out
        bits: Array = full.astype("<f4", copy=False).view("<u4")
    # Round to nearest, ties to even.
    half: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return half


def write_gguf(
    path: Path, arch: str, metadata: Metadata, tensors: list[TensorPlan], on_tensor: Callable[[str], None]
) -> None:
    """Writes `path` (which must not be the final name), calling `on_tensor(name)` after each tensor."""
    if sys.byteorder != "little":  # safetensors' raw data and GGUF's default are little-endian
        raise ConvertError("expected a little-endian machine, got a big-endian one; convert on x86-64 or arm64")
    writer = gguf.GGUFWriter(path, arch)
    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        for key, (item, kind, sub) in metadata.items():
            writer.add_key_value(key, item, kind, sub)
        for plan in tensors:
            ggml_type, dtype = _TYPES[plan.dtype]
            writer.add_tensor_info(plan.name, plan.stored_shape, dtype, plan.nbytes, ggml_type)
        with writing(path.parent):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for plan in tensors:
            values = plan.values()
            with writing(path.parent):
                writer.write_tensor_data(values)
            del values  # before the next one is made
            on_tensor(plan.name)
        with writing(path.parent):
            writer.flush()


class OutputFolder:
    """Hands out temporary names in a folder and gives files their final names, all or none.

    Leaving the `with` block removes every temporary file, after an exception (KeyboardInterrupt too) also the final
    files that it made and a folder that it created. What a killed process left is removed by the next one.
    """

    def __init__(self, folder: Path, force: bool) -> None:
        self.folder, self.force = folder, force
        self.temporary: list[Path] = []
        self.created_folder = False
        self.lock = contextlib.ExitStack()

    def __enter__(self) -> OutputFolder:
        try:
            self.created_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(shared(self.folder))
        except OSError as err:
            raise ConvertError(
                f"expected a folder to write to, got {self.folder} ({err.strerror}); choose another OUT"
            ) from err
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self.temporary:
            with contextlib.suppress(OSError):
                path.unlink()
        self.lock.close()
        if kind is not None and self.created_folder:
            with contextlib.suppress(OSError):  # not empty: someone else's files
                self.folder.rmdir()

    def check(self, *paths: Path) -> None:
        """Raises ConvertError where a final name is taken and force was not given."""
        for path in paths:
            if path.is_dir():
                raise ConvertError(
                    f"expected {path} to be a file or free, got a folder; remove it or choose another OUT"
                )
            if path.exists() and not self.force:
                raise ConvertError(f"expected no file {path}, found one; give force=True (--force) to overwrite it")

    def temp(self, final: Path) -> Path:
        """A new hidden name beside `final`, removed at the end of the `with` block unless committed."""
        path = temporary_name(final)
        self.temporary.append(path)
        return path

    def commit(self, *pairs: tuple[Path, Path]) -> None:
        """Renames each (temporary, final) pair.

        If one fails, the finals that did not exist before are removed again.
        """
        self.check(*(final for _, final in pairs))
        fresh: list[Path] = []
        try:
            for temporary, final in pairs:
                new = not final.exists()
                with writing(self.folder):
                    sync(temporary)
                    self._name(temporary, final)
                if new:
                    fresh.append(final)
            with writing(self.folder):
                sync(self.folder)
        except BaseException:
            for final in fresh:
                with contextlib.suppress(OSError):
                    final.unlink()
            raise

    def _name(self, temporary: Path, final: Path) -> None:
        if self.force:
            os.replace(temporary, final)
            return
        try:
            name_once(temporary, final)
        except FileExistsError as err:
            raise ConvertError(
                f"expected no file {final}, found one that came meanwhile; give force=True (--force) to overwrite it"
            ) from err
