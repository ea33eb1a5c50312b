"""Importance matrices: for each matrix of a language model, how strongly each of its input channels is used.

llama-imatrix of llama.cpp measures them on sample text; the quantizer then rounds what matters more carefully. Facts:
common/imatrix-loader.cpp (both file formats), tools/quantize/quantize.cpp (the division by the counts, and the keys
that the quantized file gets), src/llama-quant.cpp (which sizes it refuses), include/llama.h.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
import numpy.typing as npt

from qap_gguf.errors import ConvertError, ModelFileError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.files.regular import open_regular

__all__ = ["Imatrix", "channel_weights", "read_imatrix"]

FloatArray = npt.NDArray[np.float32]
_CURE = "give the file that llama-imatrix wrote for this model"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_MAX_NAME = 1 << 10
# What reads a token first: products with one input, in the order of what most models have (llama-arch.cpp).
_FIRST = tuple(f"blk.0.attn_{name}.weight" for name in ("q", "k", "v", "qkv", "q_a", "kv_a_mqa"))
_KV_INT, _KV_STR = 0, 3  # llama_model_kv_override_type
_KV_LENGTH = 127  # bytes that an override's text can have


@dataclass(frozen=True)
class Imatrix:
    """Importance of the input channels of each matrix.

    Attributes:
        path: the file.
        entries: name of a tensor to float32 (channels times experts,), finite and not negative.
        dataset: what it was measured on, "" where the file does not say.
        n_chunks: pieces of text that were read.
    """

    path: Path
    entries: Mapping[str, FloatArray]
    dataset: str
    n_chunks: int

    def check(self, widths: Mapping[str, int]) -> None:
        """Raises ConvertError unless the file was made for a model whose matrices have these rows (name to width)."""
        common = self.entries.keys() & widths.keys()
        if not common:
            have = ", ".join(sorted(self.entries)[:3])
            raise ConvertError(f"expected an imatrix with this model's tensors, got {have} in {self.path}; {_CURE}")
        for name in sorted(common - {"token_embd.weight"}):  # passed over by the quantizer where its size differs
            if self.entries[name].size != widths[name]:
                raise ConvertError(
                    f"expected an imatrix of {widths[name]} channels for {name}, got {self.entries[name].size} in "
                    f"{self.path}; {_CURE}"
                )

    def native(self) -> Any:
        """A ctypes array of llama_model_imatrix_data that ends with an empty one. Valid while `self` lives."""
        import llama_cpp

        data = (llama_cpp.llama_model_imatrix_data * (len(self.entries) + 1))()
        for item, (name, values) in zip(data, self.entries.items(), strict=False):
            item.name, item.size = name.encode(), values.size
            item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return data

    def keys(self) -> Any:
        """A ctypes array of llama_model_kv_override: what llama-quantize notes in the file that it makes."""
        import llama_cpp

        texts = {"quantize.imatrix.file": self.path.name, "quantize.imatrix.dataset": self.dataset}
        numbers = {"quantize.imatrix.entries_count": len(self.entries), "quantize.imatrix.chunks_count": self.n_chunks}
        given = {key: text for key, text in texts.items() if text} | {k: n for k, n in numbers.items() if n > 0}
        data = (llama_cpp.llama_model_kv_override * (len(given) + 1))()
        for item, (key, value) in zip(data, given.items(), strict=False):
            item.key = key.encode()
            if isinstance(value, int):
                item.tag, item.value.val_i64 = _KV_INT, value
            else:  # cut between characters, not inside one
                item.tag = _KV_STR
                item.value.val_str = value.encode()[:_KV_LENGTH].decode(errors="ignore").encode()
        return data


def read_imatrix(path: str | Path) -> Imatrix:
    """Reads an imatrix file in GGUF or in the older format (*.dat, *.imatrix).

    Raises ConvertError where it is missing, damaged or another kind of file.

    Example:
        >>> try:
        ...     read_imatrix("no/such/file")
        ... except ConvertError as err:
        ...     print(err)
        expected an imatrix file, cannot open no/such/file (No such file or directory); check the path
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            if file.read(4) == b"GGUF":
                return _read_gguf(path)
            file.seek(0)
            entries, n_chunks, dataset = _read_old(file, path.stat().st_size)
    except OSError as err:
        raise ConvertError(f"expected an imatrix file, cannot open {path} ({err.strerror}); check the path") from err
    except (struct.error, UnicodeDecodeError, _NotOldError) as err:
        raise ConvertError(f"expected an imatrix file, got another kind or a damaged one at {path}; {_CURE}") from err
    return Imatrix(path, _checked(entries, path), dataset, n_chunks)


def channel_weights(imatrix: str | Path | Imatrix) -> FloatArray:
    """How important each channel of a token is to a language model, for ``PruneConfig(error="model")``.

    That is the mean square of what the first layer's attention matrices are multiplied with: the token's channels after
    the first norm, whose weights are in it. docs/method.md says what becomes of it.

    Args:
        imatrix: a file of `qap-gguf imatrix` or llama-imatrix, or what :func:`read_imatrix` made of it.

    Returns:
        float32 (width of a token,), finite, from 0, not all 0.

    Raises:
        ConvertError: the file cannot be read, or holds no such matrix.

    Example:
        >>> weights = np.arange(4, dtype=np.float32)
        >>> channel_weights(Imatrix(Path("a.gguf"), {"blk.0.attn_q.weight": weights}, "", 1))
        array([0., 1., 2., 3.], dtype=float32)
    """
    read = imatrix if isinstance(imatrix, Imatrix) else read_imatrix(imatrix)
    found = next((read.entries[name] for name in _FIRST if name in read.entries), None)
    if found is None:
        have = ", ".join(sorted(read.entries)[:3])
        raise ConvertError(
            f"expected an imatrix with the first layer's attention ({_FIRST[0]} or the like), got {have} in "
            f"{read.path}; measure one of the whole model"
        )
    if not found.any():
        raise ConvertError(f"expected numbers above 0 for {_FIRST[0]}, got zeros in {read.path}; measure it anew")
    return found


def _read_gguf(path: Path) -> Imatrix:
    try:
        keys = read_gguf(path).metadata
    except ModelFileError as err:
        raise ConvertError(str(err)) from err
    if any(key not in keys for key in _KEYS):
        raise ConvertError(f"expected the keys {', '.join(_KEYS)} of an imatrix, got other keys in {path}; {_CURE}")
    reader = gguf.GGUFReader(path)
    floats = {t.name: np.array(t.data) for t in reader.tensors if t.tensor_type == gguf.GGMLQuantizationType.F32}
    names = {name.removesuffix(_SUMS) for name in floats if name.endswith(_SUMS)}
    entries = {}
    for name in sorted(names):
        sums, counts = floats[name + _SUMS], floats.get(name + _COUNTS, np.zeros(0))
        if not counts.size or sums.size % counts.size or not np.isfinite(counts).all():
            raise ConvertError(f"expected one count for each row of {name}{_SUMS}, got others in {path}; {_CURE}")
        rows, n = sums.reshape(counts.size, -1), np.round(counts.reshape(-1, 1))
        # A matrix (an expert) that was never used: all of its channels count the same.
        entries[name] = np.where(n > 0, rows / np.maximum(n, 1), 1)
    datasets = reader.fields["imatrix.datasets"].contents()
    dataset = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], str) else ""
    n_chunks = keys["imatrix.chunk_count"]
    return Imatrix(path, _checked(entries, path), dataset, n_chunks if isinstance(n_chunks, int) else 0)


class _NotOldError(Exception):
    """The bytes are not of the older format."""


def _read_old(file: IO[bytes], size: int) -> tuple[dict[str, npt.NDArray[Any]], int, str]:
    """Number of entries; for each: length and name, number of calls, number of values, values; chunks; data set."""

    def number() -> int:
        (value,) = struct.unpack("<i", file.read(4))
        return int(value)

    def take(n_bytes: int, limit: int) -> bytes:
        if not 0 < n_bytes <= min(limit, size - file.tell()):
            raise _NotOldError
        return file.read(n_bytes)

    entries = {}
    for _ in range(number()):
        name = take(number(), _MAX_NAME).decode()
        n_calls = number()
        values = np.frombuffer(take(4 * number(), size), "<f4")
        entries[name] = values / n_calls if n_calls > 0 else values
    if file.tell() == size:  # the rest is missing in the oldest files
        return entries, 0, ""
    n_chunks, n_text = number(), number()
    return entries, n_chunks, take(n_text, size).decode() if n_text else ""


def _checked(entries: dict[str, npt.NDArray[Any]], path: Path) -> dict[str, FloatArray]:
    if not entries:
        raise ConvertError(f"expected an imatrix with entries, found none in {path}; {_CURE}")
    out = {name: np.ascontiguousarray(values, dtype=np.float32).reshape(-1) for name, values in entries.items()}
    for name, values in out.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ConvertError(f"expected finite values from 0 up for {name}, got others in {path}; {_CURE}")
    return out
