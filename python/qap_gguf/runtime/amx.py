"""Keep ggml away from the AMX kernels of Intel's server CPUs where the compiler that built them broke them.

GCC before 14 may leave the AMX tile configuration unwritten, and the first product with a quantized matrix ends the
process by a signal (llama.cpp issue #20824 and pull request #26954; measured with GCC 12.2 on a CPU with amx_int8).
llama-cpp-python is compiled on the user's machine, so this is decided where it runs. Other kernels take over.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Final

#: QAP_AMX=1 leaves ggml alone: for a build that is known to be right.
VARIABLE: Final = "QAP_AMX"

_SOUND_GCC: Final = 14
_COMMENT: Final = re.compile(rb"GCC: \([^)\0]*\) (\d+)\.[0-9.]+")


def gcc_version(library: Path) -> int | None:
    """The oldest major version of GCC that an ELF file names in its comments; None where it names none (clang).

    Example:
        >>> gcc_version(Path(__file__)) is None
        True
    """
    with library.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return min((int(match[1]) for match in _COMMENT.finditer(data)), default=None)


def broken_by(core: Any, folder: Path) -> int | None:
    """The GCC that broke the AMX kernels of ggml's library in `folder`; None where they are sound, or not for this CPU.

    Args:
        core: the native module.
        folder: where llama-cpp-python keeps its libraries.
    """
    if not sys.platform.startswith("linux") or "AMX_INT8 = 1" not in core.system_info():
        return None
    found = min(filter(None, map(gcc_version, folder.glob("libggml-cpu*.so"))), default=None)
    return found if found is not None and found < _SOUND_GCC else None


def avoid_broken(core: Any, folder: Path) -> None:
    """Make ggml decide against AMX kernels that are broken; arguments as for :func:`broken_by`.

    Warns (RuntimeWarning) where ggml has decided for them before: a model was loaded before qap_gguf.
    """
    if os.environ.get(VARIABLE) == "1":
        return
    found = broken_by(core, folder)
    if found is None or core.avoid_amx():
        return
    warnings.warn(
        f"expected to switch off ggml's AMX kernels, which GCC {found} miscompiles, but a model was loaded before; "
        "import qap_gguf first, or quantized models may end the process",
        RuntimeWarning,
        stacklevel=2,
    )
