"""Checks of plain arguments before anything is loaded or computed: numbers, sampling settings.

Each raises one line that says what was expected, what came and what to do; none of them changes anything.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

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


def check_flag(name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected True or False, got {value!r}; choose one of these")


def check_threads(n_threads: object) -> None:
    """`n_threads` is None (:func:`n_threads_default`) or 1..1024."""
    if n_threads is not None and (type(n_threads) is not int or not 1 <= n_threads <= 1024):
        raise ConfigError(f"n_threads: expected 1..1024, got {n_threads!r}; leave it out for a core each")


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


def n_threads_default(root: Path = Path("/")) -> int:
    """CPU threads where none were asked for: ``QAP_THREADS`` of the environment, else a core each.

    ggml's threads wait for each other after every operation: two that share a core wait more than they compute, and
    on a busy machine all of them wait for the slowest. So this counts as llama.cpp's own programs do: physical cores,
    fast ones where there are slow ones too; of them those that the process may use, and no more than its control
    groups give it time for.

    Args:
        root: where the system's folders proc and sys are.

    Raises:
        ConfigError: QAP_THREADS is no number from 1 to 1024.

    Example:
        >>> n_threads_default() >= 1
        True
    """
    text = os.environ.get("QAP_THREADS", "")
    if text:
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
            raise ConfigError(f"QAP_THREADS: expected 1..1024, got {text!r}; unset it for a core each")
        return int(text)
    count = os.cpu_count() or 1
    allowed = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(count))
    return max(1, min(_cores(allowed, root), _cpu_quota(root)))


def _cores(allowed: set[int], root: Path) -> int:
    """Physical cores among logical processors."""
    if sys.platform == "darwin":
        return min(len(allowed), _mac_cores() or len(allowed))
    fast = _numbers(_read(root / "sys/devices/cpu_core/cpus"))  # hybrid processors of Intel
    chosen = allowed & fast or allowed
    siblings = {_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in chosen}
    return len(siblings)


def _mac_cores() -> int:
    """Physical cores of the fastest kind, 0 where the system does not say."""
    value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
    ask = ctypes.CDLL(None).sysctlbyname
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        if ask(name, ctypes.byref(value), ctypes.byref(size), None, 0) == 0 and value.value > 0:
            return value.value
    return 0


def _numbers(text: str) -> set[int]:
    """The numbers of a list such as 0-3,8."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _cpu_quota(root: Path) -> int:
    """Processors that the control groups around this process give it time for, versions 1 and 2."""
    quota = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        mounts = [f"sys/fs/cgroup/{kinds}", "sys/fs/cgroup/cpu"] if kinds else ["sys/fs/cgroup"]
        mount = next((root / name for name in mounts if (root / name).is_dir()), root / mounts[0])
        parts = [part for part in path.split("/") if part]
        for n in range(len(parts) + 1):  # every group around this one limits it too
            folder = mount.joinpath(*parts[:n])
            words = _read(folder / "cpu.max").split() if not kinds else []
            if kinds:
                words = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
                quota = min(quota, math.ceil(int(words[0]) / int(words[1])))
    return max(1, int(quota)) if quota < math.inf else _INT_MAX


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
