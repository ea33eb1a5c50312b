"""AMX kernels that the compiler broke are not used: what decides, and that quantized models run on any machine."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ggml_compiler
import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.runtime import amx as _amx


def library(folder: Path, *comments: bytes, name: str = "libggml-cpu.so") -> Path:
    """An ELF file that has nothing but a section of comments, as compilers and linkers leave it."""
    text, names = b"".join(comment + b"\0" for comment in comments), b"\0.comment\0.shstrtab\0"
    sections = [(0, 0, 0, 0), (1, 1, 64, len(text)), (10, 3, 64 + len(text), len(names))]  # name, type, offset, size
    table = b"".join(struct.pack("<IIQQQQIIQQ", n, kind, 0, 0, at, size, 0, 0, 1, 0) for n, kind, at, size in sections)
    head = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, 64 + len(text + names), 0, 64, 0, 0, 64, 3, 2)
    )
    path = folder / name
    path.write_bytes(head + text + names + table + b"GCC: (data, no comment) 9.1.0")
    return path


DEBIAN_12 = b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0"


@pytest.mark.parametrize(
    ("comments", "compiler", "sound"),
    [
        ([DEBIAN_12], "GCC 12", False),
        ([b"GCC: (Ubuntu 13.2.0-4ubuntu3) 13.2.0", b"GCC: (GNU) 9.1.1"], "GCC 9", False),
        ([b"GCC: (GNU) 14.1.0"], "GCC 14", True),
        ([b"GCC: (GNU) 14.1.0", b"GCC: (GNU) 13.3.0"], "GCC 13", False),
        ([b"clang version 18.1.3"], "clang 18", True),
        # what clang links on Linux: the start files of the C runtime are GCC's
        ([DEBIAN_12, b"Debian clang version 14.0.6"], "clang 14", True),
        ([b"Linker: LLD 18.1.3", b"Ubuntu clang version 18.1.3 (1ubuntu1)", DEBIAN_12], "clang 18", True),
        ([b"Intel(R) oneAPI DPC++/C++ Compiler 2024.1.0", DEBIAN_12], "GCC 12", False),
        ([b"rustc version 1.80.0"], "an unknown compiler", False),
        ([], "an unknown compiler", False),
    ],
)
def test_the_compiler_is_read_from_the_library(
    tmp_path: Path, comments: list[bytes], compiler: str, sound: bool
) -> None:
    found = _amx.compiler_of(library(tmp_path, *comments))
    assert (str(found), found.sound) == (compiler, sound)


@pytest.mark.parametrize("keep", [0, 3, 20, 70, 100, 200])
def test_a_file_that_is_cut_short_names_no_compiler(tmp_path: Path, keep: int) -> None:
    path = library(tmp_path, DEBIAN_12)
    path.write_bytes(path.read_bytes()[:keep])
    assert _amx.compiler_of(path) == _amx.Compiler("an unknown compiler", None)


def test_the_real_compiler_of_this_machine_is_found(tmp_path: Path) -> None:
    """Whatever compilers are here: what they link says their names."""
    (tmp_path / "a.c").write_text("int a(void) { return 1; }\n")
    seen = 0
    for command, name in (("gcc", "GCC"), ("clang", "clang")):
        made = tmp_path / f"libggml-cpu-{name}.so"
        if sys.platform != "linux" or shutil.which(command) is None:
            continue
        subprocess.run([command, "-shared", "-fPIC", "-o", str(made), str(tmp_path / "a.c")], check=True)
        assert _amx.compiler_of(made).name == name
        assert _amx.compiler_of(made).version is not None
        seen += 1
    if not seen:
        pytest.skip("neither gcc nor clang, or not Linux")


def test_one_broken_library_of_several_decides(tmp_path: Path) -> None:
    library(tmp_path, b"GCC: (GNU) 14.1.0", name="libggml-cpu-a.so")
    assert str(_amx.ggml_compiler(tmp_path)) == "GCC 14"
    library(tmp_path, DEBIAN_12, name="libggml-cpu-b.so")
    assert str(_amx.ggml_compiler(tmp_path)) == "GCC 12"
    assert _amx.ggml_compiler(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("comments", "words"),
    [([DEBIAN_12], "broken;GCC 12"), ([DEBIAN_12, b"clang version 15.0.0"], "sound;clang 15"), (None, "broken;none")],
)
def test_the_build_asks_the_same_library(
    tmp_path: Path, comments: list[bytes] | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if comments is not None:
        library(tmp_path, *comments)
    assert ggml_compiler.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == words
    assert ggml_compiler.main([str(tmp_path / "nowhere")]) == 1
    assert "expected a folder" in capsys.readouterr().err


class Core:
    """The native module, as far as the guard uses it."""

    def __init__(self, features: str = "AMX_INT8 = 1", obeys: bool = True) -> None:
        self.features, self.obeys, self.calls = features, obeys, 0

    def system_info(self) -> str:
        return f"CPU : SSE3 = 1 | {self.features} | "

    def avoid_amx(self) -> bool:
        self.calls += 1
        return self.obeys


@pytest.mark.parametrize(
    ("gcc", "features", "variable", "calls"),
    [
        (b"12.2.0", "AMX_INT8 = 1", None, 1),
        (b"13.3.0", "AMX_INT8 = 1", "0", 1),
        (b"14.1.0", "AMX_INT8 = 1", None, 0),
        (b"12.2.0", "AVX2 = 1", None, 0),
        (b"12.2.0", "AMX_INT8 = 1", "1", 0),
    ],
)
def test_only_a_broken_build_on_such_a_cpu_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gcc: bytes, features: str, variable: str | None, calls: int
) -> None:
    monkeypatch.setattr(_amx, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.delenv(_amx.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(_amx.VARIABLE, variable)
    library(tmp_path, b"GCC: (GNU) " + gcc)
    core: Any = Core(features)
    _amx.avoid_broken(core, tmp_path)
    assert core.calls == calls


def test_too_late_is_a_warning_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_amx, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.delenv(_amx.VARIABLE, raising=False)
    library(tmp_path, b"GCC: (GNU) 12.2.0")
    core: Any = Core(obeys=False)
    with pytest.warns(RuntimeWarning, match="which GCC 12 miscompiles.*import qap_gguf first"):
        _amx.avoid_broken(core, tmp_path)


def test_the_real_library_obeys() -> None:
    """True on every machine: there is no AMX, or it was switched off when qap_gguf was imported (GCC before 14)."""
    if _amx.broken_by(_core, Path(_core_folder())) is not None:
        assert _core.avoid_amx()


@pytest.mark.parametrize(
    ("flags", "features", "comment", "variable", "used", "lost"),
    [
        ("avx2 amx_int8 amx_tile", "AMX_INT8 = 1", DEBIAN_12, None, False, "GCC 12 miscompiles them"),
        ("avx2 amx_int8 amx_tile", "AMX_INT8 = 1", DEBIAN_12, "1", True, None),
        ("avx2 amx_int8 amx_tile", "AMX_INT8 = 1", b"GCC: (GNU) 14.2.0", None, True, None),
        ("avx2 amx_int8 amx_tile", "AVX2 = 1", b"GCC: (GNU) 14.2.0", None, False, "ggml was built without them"),
        ("avx2", "AVX2 = 1", DEBIAN_12, None, False, None),
        ("avx2", "AMX_INT8 = 1", DEBIAN_12, None, False, None),
    ],
)
def test_info_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, features: str, comment: bytes, variable: str | None,
    used: bool, lost: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(_amx, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.delenv(_amx.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(_amx.VARIABLE, variable)
    library(tmp_path, comment)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags} sse\n")
    core: Any = Core(features)
    found = _amx.state(core, tmp_path, tmp_path / "cpuinfo")
    assert (found["cpu"], found["used"]) == ("amx_int8" in flags, used)
    assert (found["lost"] is None) == (lost is None)
    assert lost is None or (lost in found["lost"] and "GCC 14 or later, or with clang" in found["lost"])
    assert set(qap.info()["amx"]) == set(found)


def _core_folder() -> str:
    import llama_cpp

    assert llama_cpp.__file__ is not None
    return str(Path(llama_cpp.__file__).parent / "lib")


def test_a_quantized_model_answers_in_a_fresh_process() -> None:
    code = (
        "import qap_gguf as qap\n"
        "with qap.VisionModel() as vlm:\n"
        "    print(vlm.generate([qap.packaged_model().sample, 'What is in row 1, column 2?'], max_tokens=4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "house"
