"""Checks of plain arguments before anything is loaded or computed: numbers, sampling settings.

Each raises one line that says what was expected, what came and what to do; none of them changes anything.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt

from qap_gguf.errors import ArrayError, ConfigError

_INT_MAX = 2**31 - 1
#: Above this a limit on the tokens of a picture is refused (native/src/families/limits.cpp).
MOST_IMAGE_TOKENS = 65536


def check_integer(name: str, value: object, low: int, high: int = _INT_MAX) -> None:
    """`value` is an int (no bool) in low..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        upto = "" if high == _INT_MAX else f" to {high}"
        raise ConfigError(f"{name}: expected an integer from {low}{upto}, got {value!r}; choose one in that range")


def check_number(name: str, value: object, high: float) -> None:
    """`value` is a number (no bool, no NaN) in 0..high; infinite `high` excludes infinity itself."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= high or value == math.inf:  # type: ignore[operator]
        upto = "" if high == math.inf else f" to {high:g}"
        raise ConfigError(f"{name}: expected a number from 0{upto}, got {value!r}; choose one in that range")


def check_threads(n_threads: object) -> None:
    """`n_threads` is None (all processors) or 1..1024."""
    if n_threads is not None and (type(n_threads) is not int or not 1 <= n_threads <= 1024):
        raise ConfigError(f"n_threads: expected 1..1024, got {n_threads!r}; leave it out for all processors")


def check_sampling(max_tokens: object, temperature: object, top_k: object, top_p: object, min_p: object) -> None:
    """The settings of an answer, as :meth:`qap_gguf.VisionModel.chat` documents them."""
    check_integer("max_tokens", max_tokens, 1)
    check_number("temperature", temperature, math.inf)
    check_integer("top_k", top_k, 0)
    check_number("top_p", top_p, 1.0)
    check_number("min_p", min_p, 1.0)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: Python's str may hold lone surrogates, which JSON can bring in.

    Example:
        >>> is_unicode("text"), is_unicode(chr(0xD800))
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(err: BaseException) -> str:
    """Upstream's words without its function names in front of ours."""
    text = " ".join(str(err).split())
    return text[text.index("qap: ") + len("qap: ") :] if "qap: " in text else text


FloatArray = npt.NDArray[np.float32]


IndexArray = npt.NDArray[np.int32]


def check_array(name: str, value: object, ndim: int) -> FloatArray:
    """`value` as a float32 array in C order with `ndim` dimensions, or an ArrayError that says the cure."""
    if not isinstance(value, np.ndarray):
        raise ArrayError(f"{name}: expected a NumPy array, got {type(value).__name__}; use numpy.asarray(..., 'f4')")
    if value.dtype != np.float32:
        raise ArrayError(f"{name}: expected float32, got {value.dtype}; use .astype('float32')")
    if value.ndim != ndim or 0 in value.shape:
        wanted = "(n_tok, n_embd)" if ndim == 2 else "(n_tok,)"
        raise ArrayError(f"{name}: expected shape {wanted} without empty sides, got {value.shape}; reshape it")
    if not value.flags.c_contiguous:
        raise ArrayError(f"{name}: expected C order, got a strided view; use numpy.ascontiguousarray(...)")
    return value


def n_threads_default() -> int:
    """Threads for scores: the processors that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, count or 1)
