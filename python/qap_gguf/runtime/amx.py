"""Keep ggml away from the AMX kernels of Intel's server CPUs where the compiler that built them broke them.

GCC before 14 may leave the AMX tile configuration unwritten, and the first product with a quantized matrix ends the
process by a signal (llama.cpp issue #20824 and pull request #26954; measured with GCC 12.2 on a CPU with amx_int8).
llama-cpp-python is compiled on the user's machine, so this is decided by what its library says of its compiler: each
object file leaves a line in the ELF section `.comment`. A library that clang linked on Linux has a line of GCC too,
that of the C runtime's start files, so a line of clang decides. (C code by clang and C++ code by GCC would be taken for
clang's; nothing builds ggml like that unless told to.) Other kernels take over where AMX stays off.

The build runs this file by itself (tools/build/ggml_compiler.py): it imports the standard library only.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

#: QAP_AMX=1 leaves ggml alone: for a build that is known to be right.
VARIABLE: Final = "QAP_AMX"

_SOUND_GCC: Final = 14
_GCC: Final = re.compile(rb"GCC: \([^)\0]*\) (\d+)\.[0-9.]+")
_CLANG: Final = re.compile(rb"clang version (\d+)")
_MOST: Final = 1 << 20  # bytes of a section of names or comments; real ones have some hundred


@dataclass(frozen=True)
class Compiler:
    """What a library says of the compiler that made it; `version` is the oldest major one, None where it says none.

    Example:
        >>> [Compiler(*one).sound for one in (("GCC", 12), ("GCC", 14), ("clang", 15), ("an unknown compiler", None))]
        [False, True, True, False]
        >>> str(Compiler("GCC", 12))
        'GCC 12'
    """

    name: str
    version: int | None

    @property
    def sound(self) -> bool:
        """Whether it is known to compile ggml's AMX kernels rightly."""
        return self.name == "clang" or (self.name == "GCC" and self.version is not None and self.version >= _SOUND_GCC)

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name} {self.version}"


def compiler_of(library: Path) -> Compiler:
    """The compiler that a library names in its section `.comment`.

    Example:
        >>> str(compiler_of(Path(__file__)))
        'an unknown compiler'
    """
    try:
        with library.open("rb") as file:
            comments = _section(file, b".comment")
    except (OSError, struct.error):
        comments = b""
    for name, pattern in (("clang", _CLANG), ("GCC", _GCC)):
        if versions := [int(match[1]) for match in pattern.finditer(comments)]:
            return Compiler(name, min(versions))
    return Compiler("an unknown compiler", None)


def _section(file: IO[bytes], name: bytes) -> bytes:
    """The bytes of a section of a 64-bit little-endian ELF file, empty where there is none. Facts: elf(5)."""
    head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01":
        return b""
    table, entry, count, names_at = struct.unpack("<Q10xHHH", head[40:64])
    sections = []
    for i in range(count):
        file.seek(table + i * entry)
        sections.append(struct.unpack("<IIQQQQ", file.read(40)))  # name, type, flags, address, offset, size

    def content(section: tuple[int, ...]) -> bytes:
        file.seek(section[4])
        return file.read(min(section[5], _MOST))

    names = content(sections[names_at]) if names_at < count else b""
    for section in sections:
        if names[section[0] :].partition(b"\0")[0] == name:
            return content(section)
    return b""


def ggml_compiler(folder: Path) -> Compiler | None:
    """The compiler of ggml's CPU library in `folder`; of several that of the first that broke its kernels.

    None where there is no such library.
    """
    found = [compiler_of(path) for path in sorted(folder.glob("libggml-cpu*.so"))]
    return next((one for one in found if not one.sound), found[0] if found else None)


def broken_by(core: Any, folder: Path) -> Compiler | None:
    """The compiler that broke the AMX kernels of ggml's library in `folder`; None where they are sound or missing.

    Args:
        core: the native module.
        folder: where llama-cpp-python keeps its libraries.
    """
    if not sys.platform.startswith("linux") or not _built(core):
        return None
    found = ggml_compiler(folder)
    return found if found is not None and not found.sound else None


def _built(core: Any) -> bool:
    return "AMX_INT8 = 1" in core.system_info()


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
        f"expected to switch off ggml's AMX kernels, which {found} miscompiles, but a model was loaded before; "
        "import qap_gguf first, or quantized models may end the process",
        RuntimeWarning,
        stacklevel=2,
    )


def state(core: Any, folder: Path, cpu_info: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """What `qap-gguf info` says of AMX: has the CPU it, has the build, ggml's compiler, is it used, what is lost.

    Args:
        core: the native module.
        folder: where llama-cpp-python keeps its libraries.
        cpu_info: where Linux lists the CPU's features.
    """
    try:
        has_amx = re.search(r"\bamx_int8\b", cpu_info.read_text("utf-8", "replace")) is not None
    except OSError:
        has_amx = False
    built, compiler, broken = _built(core), ggml_compiler(folder), broken_by(core, folder)
    forced = os.environ.get(VARIABLE) == "1"
    used = has_amx and built and (broken is None or forced)
    lost = None
    if has_amx and not used:
        why = f"{broken} miscompiles them" if built else "ggml was built without them"
        lost = (
            f"faster products with quantized matrices: this CPU has AMX kernels in ggml, but {why}; "
            "build llama-cpp-python anew on this machine with GCC 14 or later, or with clang"
        )
    return {
        "cpu": has_amx,
        "built": built,
        "compiler": None if compiler is None else str(compiler),
        "used": used,
        "lost": lost,
    }
