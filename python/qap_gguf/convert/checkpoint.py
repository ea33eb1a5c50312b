"""A checkpoint's tensors, read one at a time from memory-mapped safetensors files.

The file format is public and small: eight bytes of header length, a JSON header, raw little-endian data. Reading it
here keeps the peak memory near the largest tensor and gives bfloat16 (which NumPy lacks) as its raw 16 bits.
Names: transformers 4 and 5 save the same LLaVA under several prefixes; `canonical` maps all of them to one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qap_gguf.errors import ConvertError

__all__ = ["Checkpoint", "TensorRef", "canonical", "read_json"]

Array = npt.NDArray[Any]

# safetensors name -> NumPy type of the raw data. BF16 has no NumPy type: its bits come as uint16.
_DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "BOOL": "|b1",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100 << 20  # the format's own limit: 100 MB
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIXES = (
    (re.compile(r"^(?:language_model\.)?lm_head\."), "language_model.lm_head."),
    (re.compile(r"^language_model\.(?:model\.)?"), "language_model.model."),
    (re.compile(r"^vision_tower\.(?:vision_model\.)?"), "vision_tower.vision_model."),
    (re.compile(r"^multi_modal_projector\."), "multi_modal_projector."),
)


def canonical(name: str) -> str:
    """The one name that this package uses for a tensor, whatever version of transformers saved it.

    Example:
        >>> canonical("model.language_model.norm.weight")
        'language_model.model.norm.weight'
        >>> canonical("vision_tower.post_layernorm.bias")
        'vision_tower.vision_model.post_layernorm.bias'
    """
    short = name.removeprefix("model.")
    for pattern, prefix in _PREFIXES:
        if pattern.match(short):
            return pattern.sub(prefix, short, count=1)
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConvertError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConvertError(f"expected a file {path}, found none; give a complete Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as err:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ConvertError(f"cannot read {path} as JSON ({_line(err)}); fetch the checkpoint again") from err
    if not isinstance(value, dict):
        raise ConvertError(f"expected a JSON object in {path}, got {type(value).__name__}; fetch the checkpoint again")
    return value


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies. `shape` is in PyTorch's order, `dtype` a safetensors name such as "BF16"."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes

    def read(self) -> Array:
        """The raw values as a read-only map (shape `shape`; BF16 as uint16). Raises ConvertError on NaN or infinity."""
        dtype = np.dtype(_DTYPES[self.dtype])
        count = math.prod(self.shape)
        if not count:
            return np.zeros(self.shape, dtype)
        try:
            data: Array = np.memmap(self.path, dtype, "r", self.offset, (count,))
        except (OSError, ValueError) as err:
            raise ConvertError(
                f"cannot map {self.path} ({_line(err)}); give the folder's files read permission"
            ) from err
        if self.dtype in _FLOATS and not _finite(data, self.dtype):
            raise ConvertError(
                f"expected finite weights, got NaN or infinity in {self.name} ({self.path.name}); "
                f"the checkpoint is damaged: fetch it again or retrain it"
            )
        return data.reshape(self.shape)


def _finite(flat: Array, dtype: str, step: int = 1 << 22) -> bool:
    """True if no value is NaN or infinite; in slices, so that the mask stays small beside the tensor."""
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        # In bfloat16's bits an exponent of all ones means NaN or infinity.
        good = (part & np.uint16(0x7F80)) != 0x7F80 if dtype == "BF16" else np.isfinite(part)
        if not good.all():
            return False
    return True


class Checkpoint:
    """The tensors of a checkpoint folder by canonical name, single file or sharded.

    Example:
        >>> try:
        ...     Checkpoint("no/such/folder")
        ... except ConvertError as err:
        ...     print(err)
        expected a checkpoint folder, got no/such/folder; give the folder that holds config.json
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConvertError(f"expected a checkpoint folder, got {folder}; give the folder that holds config.json")
        self.tensors: dict[str, TensorRef] = {}
        for ref in self._refs():
            name = canonical(ref.name)
            if name in self.tensors:
                raise ConvertError(
                    f"expected each tensor once, got {self.tensors[name].name} and {ref.name}; remove one of the two"
                )
            self.tensors[name] = ref

    def _refs(self) -> Iterator[TensorRef]:
        index = self.folder / _INDEX
        if not index.is_file():
            single = self.folder / _SINGLE
            if not single.is_file():
                raise ConvertError(
                    f"expected {_SINGLE} or {_INDEX} in {self.folder}, found neither; "
                    f"save the model with save_pretrained(..., safe_serialization=True)"
                )
            yield from _header(single).values()
            return
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            raise ConvertError(f"expected a weight_map of tensor and file names in {index}; fetch the checkpoint again")
        headers: dict[str, dict[str, TensorRef]] = {}
        for name, shard in places.items():
            if shard not in headers:
                path = self.folder / shard
                if Path(shard).name != shard or not path.is_file():
                    raise ConvertError(
                        f"expected the shard {path} that {_INDEX} names, found none; fetch the checkpoint again"
                    )
                headers[shard] = _header(path)
            if name not in headers[shard]:
                raise ConvertError(
                    f"expected tensor {name} in {shard} as {_INDEX} says, found none; fetch the checkpoint again"
                )
            yield headers[shard][name]


def _header(path: Path) -> dict[str, TensorRef]:
    """All tensors that one safetensors file lists, checked against its size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
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
        raise ConvertError(f"cannot read the header of {path} ({_line(err)}); fetch the checkpoint again") from err


def _entry(name: str, path: Path, entry: dict[str, Any], base: int, size: int) -> TensorRef:
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if dtype not in _DTYPES:
        raise ConvertError(
            f"expected float weights ({', '.join(_FLOATS)}), got {dtype} in {name}; "
            "convert the checkpoint that is not quantized"
        )
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ConvertError(
            f"expected {name} of shape {shape} to fill its bytes in {path.name}; fetch the checkpoint again"
        )
    if base + end > size:
        raise ConvertError(
            f"expected at least {base + end} bytes in {path}, got {size}: it is cut short; fetch the checkpoint again"
        )
    return TensorRef(name, path, dtype, shape, base + begin)
