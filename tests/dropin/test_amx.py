"""AMX kernels that the compiler broke are not used: what decides, and that quantized models run on any machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qap_gguf import _core
from qap_gguf.runtime import amx as _amx


def library(folder: Path, *comments: bytes) -> Path:
    path = folder / "libggml-cpu.so"
    path.write_bytes(b"\x7fELF" + bytes(100) + b"\0".join(comments) + bytes(100))
    return path


@pytest.mark.parametrize(
    ("comments", "version"),
    [
        ([b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0"], 12),
        ([b"GCC: (Ubuntu 13.2.0-4ubuntu3) 13.2.0", b"GCC: (GNU) 9.1.1"], 9),
        ([b"GCC: (GNU) 14.1.0"], 14),
        ([b"clang version 18.1.3"], None),
        ([], None),
    ],
)
def test_the_compiler_is_read_from_the_library(tmp_path: Path, comments: list[bytes], version: int | None) -> None:
    assert _amx.gcc_version(library(tmp_path, *comments)) == version


def test_an_empty_file_names_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "x.so").touch()
    assert _amx.gcc_version(tmp_path / "x.so") is None


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
    found = [_amx.gcc_version(path) for path in Path(_core_folder()).glob("libggml-cpu*.so")]
    assert found
    if all(version is not None and version < 14 for version in found):
        assert _core.avoid_amx()


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
