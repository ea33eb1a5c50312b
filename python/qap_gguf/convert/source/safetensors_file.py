"""Where a checkpoint's tensors lie, and the safetensors file format.

The format is public and small: eight bytes of header length, a JSON header, raw little-endian data. Reading it here
keeps the peak memory near the largest tensor and gives bfloat16 (which NumPy lacks) as its raw 16 bits.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qap_gguf.errors import ConvertError
from qap_gguf.files.regular import open_regular

__all__ = ["DTYPES", "FLOATS", "Array", "TensorRef", "one_line", "safetensors_header"]

Array = npt.NDArray[Any]

# safetensors name -> NumPy type of the raw data. BF16 has no NumPy type: its bits come as uint16, those of F8 as uint8.
DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "F8_E8M0": "|u1",
    "BOOL": "|b1",
}
FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100 << 20  # the format's own limit: 100 MB


def one_line(err: BaseException, limit: int = 300) -> str:
    """An exception's text without line breaks, cut at `limit` characters."""
    return " ".join(str(err).split())[:limit]


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies. `shape` is in PyTorch's order, `dtype` a safetensors name such as "BF16"."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def read(self) -> Array:
        """The raw values, read-only (shape `shape`; BF16 as uint16). Raises ConvertError on NaN or infinity."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, np.dtype(DTYPES[self.dtype]))
        data = self.flat()
        if self.dtype in FLOATS and not _finite(data, self.dtype):
            raise ConvertError(
                f"expected finite weights, got NaN or infinity in {self.name} ({self.path.name}); "
                f"the checkpoint is damaged: fetch it again or retrain it"
            )
        return data.reshape(self.shape)

    def flat(self) -> Array:
        """The values as one row, without a look at them. Never called for an empty tensor."""
        try:
            data: Array = np.memmap(self.path, np.dtype(DTYPES[self.dtype]), "r", self.offset, (math.prod(self.shape),))
        except (OSError, ValueError) as err:
            raise ConvertError(
                f"cannot map {self.path} ({one_line(err)}); give the folder's files read permission"
            ) from err
        return data


def _finite(flat: Array, dtype: str, step: int = 1 << 22) -> bool:
    """True if no value is NaN or infinite; in slices, so that the mask stays small beside the tensor."""
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        # In bfloat16's bits an exponent of all ones means NaN or infinity.
        good = (part & np.uint16(0x7F80)) != 0x7F80 if dtype == "BF16" else np.isfinite(part)
        if not good.all():
            return False
    return True


def safetensors_header(path: Path) -> dict[str, TensorRef]:
    """All tensors that one safetensors file lists, checked against its size."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ConvertError(
                    f"expected a safetensors file, got {path} with a broken header; fetch the checkpoint again"
                )
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return {name: _entry(name, path, entry, 8 + length, size) for name, entry in entries.items()}
    except ConvertError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise ConvertError(f"cannot read the header of {path} ({one_line(err)}); fetch the checkpoint again") from err


def _entry(name: str, path: Path, entry: dict[str, Any], base: int, size: int) -> TensorRef:
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if dtype not in DTYPES:
        raise ConvertError(
            f"expected float weights ({', '.join(FLOATS)}), got {dtype} in {name}; "
            "convert the checkpoint that is not quantized"
        )
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ConvertError(
            f"expected {name} of shape {shape} to fill its bytes in {path.name}; fetch the checkpoint again"
        )
    if base + end > size:
        raise ConvertError(
            f"expected at least {base + end} bytes in {path}, got {size}: it is cut short; fetch the checkpoint again"
        )
    return TensorRef(name, path, dtype, shape, base + begin)
