"""Quantize and dequantize features by gguf-py, or by ggml itself through ctypes: the truth for the ggml-type errors.

gguf-py (a NumPy implementation of the format) quantizes q4_0, q4_1, q5_0, q5_1 and q8_0. For the others the loaded
libggml-base of llama-cpp-python is called: `ggml_quantize_chunk`, which writes model files, or `quantize_row_*_ref`,
which ggml's CPU backend uses when a graph casts floats to that type. Dequantizing is always gguf-py's. No test in here.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import llama_cpp
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@cache
def libggml_base() -> ctypes.CDLL:
    """The same file that the package's native part runs on."""
    folder = Path(llama_cpp.__file__).parent
    found = sorted(p for p in folder.rglob("*ggml-base*") if p.suffix in (".so", ".dylib", ".dll") or ".so." in p.name)
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.quantize_row_iq4_nl_ref.restype = None
    library.quantize_row_iq4_nl_ref.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return library


def block_size(name: str) -> int:
    """Channels that share a block."""
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][0])


def zero_filled(x: F32, block: int) -> F32:
    """`x` with zeros appended to each row up to a multiple of `block`."""
    filled = np.zeros((x.shape[0], -(-x.shape[1] // block) * block), np.float32)
    filled[:, : x.shape[1]] = x
    return filled


def quantized(x: F32, name: str, how: str) -> Any:
    """Bytes (n_tok, n_bytes). `how`: "gguf-py", "file" (ggml_quantize_chunk) or "cast" (quantize_row_*_ref)."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    filled = zero_filled(x, block)
    if how == "gguf-py":
        return gguf.quants.quantize(filled, kind)
    n, width = filled.shape
    out = np.zeros((n, width // block * size), np.uint8)
    if how == "cast":
        row = getattr(libggml_base(), f"quantize_row_{name}_ref")
        row(filled.ctypes.data, out.ctypes.data, filled.size)
        return out
    written = libggml_base().ggml_quantize_chunk(
        int(kind), filled.ctypes.data, out.ctypes.data, 0, n, width, None
    )  # None: no importance matrix
    assert written == out.nbytes
    return out


def there_and_back(x: F32, name: str, how: str) -> F64:
    """What is left of `x` after quantizing and dequantizing, without the zeros that filled it up."""
    back = gguf.quants.dequantize(quantized(x, name, how), gguf.GGMLQuantizationType[name.upper()])
    return np.asarray(back[:, : x.shape[1]], dtype=np.float64)


def error(x: F32, name: str, how: str) -> F64:
    """|| x_i - Q(x_i) ||_2 in float64, (n_tok,)."""
    return np.asarray(np.sqrt(np.square(x.astype(np.float64) - there_and_back(x, name, how)).sum(axis=1)))
