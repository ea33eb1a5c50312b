"""Peak memory of a stretch of work, and the cells of a KV cache in bytes.

Linux keeps the peak of a process's resident memory and lets the process reset it (proc(5): ``clear_refs``, ``VmHWM``).
Other systems know the peak of the whole life only, which says nothing about one pass: there it is None.
"""

from __future__ import annotations

import re
from pathlib import Path

import llama_cpp

_RESET = "5"


def reset_peak() -> bool:
    """Let the peak start again from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET)
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Peak of resident memory since :func:`reset_peak`, in bytes; None where the system cannot say."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def kv_bytes(llama: llama_cpp.Llama) -> int:
    """Bytes of the cells in use: the size of the saved sequence, which is keys and values and some bytes a cell."""
    return int(llama_cpp.llama_state_seq_get_size(llama._ctx.ctx, 0))
