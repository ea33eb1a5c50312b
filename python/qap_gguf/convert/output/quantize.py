"""llama.cpp's own quantizer, called through llama-cpp-python's bindings.

Facts: include/llama.h (llama_ftype, llama_model_quantize_params), tools/quantize/quantize.cpp (names and aliases),
src/llama-quant.cpp (which types need an importance matrix, how widths that are no multiple of 256 fall back).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import gguf

from qap_gguf import _core
from qap_gguf.convert.output.imatrix import Imatrix
from qap_gguf.errors import ConvertError

__all__ = ["FLOAT_TYPES", "QUANTIZE_TYPES", "file_type", "quantize_file"]

# Name -> llama_ftype. The first three are written directly.
QUANTIZE_TYPES: dict[str, int] = {
    "F32": 0, "F16": 1, "BF16": 32,
    "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q5_1": 9, "Q5_0": 8,
    "Q4_K_M": 15, "Q4_K_S": 14, "Q4_1": 3, "Q4_0": 2, "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11,
    "Q2_K": 10, "Q2_K_S": 21,
    "IQ4_NL": 25, "IQ4_XS": 30, "IQ3_M": 27, "IQ3_S": 26, "IQ3_XS": 22, "IQ3_XXS": 23,
    "IQ2_M": 29, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24,
    "TQ2_0": 37, "TQ1_0": 36, "MXFP4_MOE": 38, "Q2_0": 41, "Q1_0": 40,
}  # fmt: skip
FLOAT_TYPES = ("F32", "F16", "BF16")
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_MAX_BUFFER = 256 << 20  # bytes of rows that the quantizer holds at once; its own default is 8 GiB
_STEP = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")  # "[   3/ 291]" in front of each tensor in the quantizer's log


def file_type(name: str) -> str:
    """The type's name as the file name shows it. Raises ConvertError for a name that llama.cpp does not know.

    Example:
        >>> file_type("q4_k")
        'Q4_K_M'
    """
    upper = name.upper() if isinstance(name, str) else name
    upper = _ALIASES.get(upper, upper)
    if upper not in QUANTIZE_TYPES:
        raise ConvertError(
            f"expected quantize as one of {', '.join(QUANTIZE_TYPES)}, got {name!r}; choose one of these"
        )
    return upper


def least_bytes(name: str, n_weights: int) -> int:
    """A lower bound for the size of a model of `n_weights` in a type of QUANTIZE_TYPES, for a look at the disk.

    The name says which ggml type most matrices get (_S, _M and _L only say how many get a larger one).

    Example:
        >>> least_bytes("Q4_K_M", 256), least_bytes("Q8_0", 256)
        (144, 272)
    """
    known = {kind.name: kind for kind in gguf.GGMLQuantizationType}
    short = name.rsplit("_", 1)[0]
    kind = known.get(name) or known.get(short) or known.get(f"{short}_S")
    if kind is None:  # newer than gguf-py
        return n_weights // 8
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return n_weights // block * size


def quantize_file(
    source: Path,
    target: Path,
    name: str,
    on_tensor: Callable[[int, int], None] | None = None,
    imatrix: Imatrix | None = None,
) -> None:
    """Quantizes the GGUF file `source` to `target`. `on_tensor(done, total)` follows the quantizer's log.

    Raises ConvertError with the quantizer's own words where it refuses (no importance matrix, no space, ...). Ctrl-C is
    heard at once but raised when the quantizer returns, because C code cannot be left in the middle.
    """
    import llama_cpp
    from llama_cpp import _logger

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTIZE_TYPES[name]
    params.max_buf_size = _MAX_BUFFER
    if imatrix is not None:
        importance, keys = imatrix.native(), imatrix.keys()  # must live until the quantizer returns
        params.imatrix, params.kv_overrides = importance, keys
    errors: list[str] = []
    raised: list[BaseException] = []

    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        try:
            if level == _ERROR_LEVEL:
                errors.append(" ".join(text.decode("utf-8", "replace").split()))
            step = _STEP.search(text)
            if step and on_tensor is not None and not raised:
                on_tensor(int(step[1]), int(step[2]))
        except BaseException as err:  # nothing can be thrown through C (Ctrl-C arrives here too): raised below
            raised.append(err)

    callback = llama_cpp.llama_log_callback(log)  # must live as long as it is set
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
        _core.quiet_install()
    if raised:
        raise raised[0]
    if status:
        reason = " ".join(word for text in errors for word in text.split() if word.strip("=")) or "no reason given"
        if "iostream" in reason:  # what the C++ library says where a write failed
            raise ConvertError(
                f"expected to write {name} to {target.parent}, got a refusal (llama.cpp's quantizer cannot write); "
                "free some space or choose another OUT"
            )
        raise ConvertError(
            f"expected llama.cpp to quantize to {name}, got a refusal ({reason}); "
            "choose another type, Q4_K_M for example"
        )
