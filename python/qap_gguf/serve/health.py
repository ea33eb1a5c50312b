"""When llama-server counts as ill: how much memory it may take, and how long its loop may stand still."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

from qap_gguf import _core
from qap_gguf.serve.child import Child

EVERY_S: Final = 0.25
PROBE_EVERY_S: Final = 5.0
_PART_OF_FREE: Final = 0.75


def free_memory() -> float:
    """Bytes that this machine, or the container around this process, has for more; infinite where neither says.

    Example:
        >>> free_memory() > 2**20
        True
    """
    _, in_container = _core.container_room("/proc/self/cgroup", "/sys/fs/cgroup")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return in_container
    return min(float(available), in_container)


def most_memory(child: Child) -> float:
    """Bytes that llama-server may take for its own: what it has now, and three quarters of what is free besides."""
    free = free_memory()
    return math.inf if math.isinf(free) else child.anonymous() + _PART_OF_FREE * free


def seconds_to_stall(asked: float | None = None) -> float:
    """How long its loop may stand still; None is 30, or QAP_SERVE_STALLED_SECONDS."""
    return float(os.environ.get("QAP_SERVE_STALLED_SECONDS") or 30) if asked is None else asked
