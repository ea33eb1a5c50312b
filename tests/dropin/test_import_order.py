"""`import qap_gguf` refuses what cannot work: too late, another libmtmd, another llama-cpp-python, or none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dropin.children import outcome, python
from qap_gguf.runtime.load import LLAMA_CPP_PYTHON, library_folder

TRY = """
try:
    import qap_gguf
except ImportError as err:
    assert type(err).__name__ == "PinError", type(err)
    print(err)
else:
    print("imported")
"""


def said(code: str, env: dict[str, str] | None = None) -> str:
    """The only line that `code` prints."""
    done = python(code, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    return done.stdout.strip()


@pytest.mark.parametrize(
    "first", ["import llama_cpp.mtmd_cpp", "from llama_cpp import llama_chat_format, mtmd_cpp"], ids=["module", "from"]
)
def test_a_late_import(first: str) -> None:
    line = said(first + TRY)
    assert "before llama_cpp.mtmd_cpp" in line
    assert "put `import qap_gguf` before" in line


def test_llama_cpp_itself_may_come_first() -> None:
    assert said("import llama_cpp, llama_cpp.llama_chat_format" + TRY) == "imported"
    assert said("import qap_gguf, llama_cpp.mtmd_cpp" + TRY) == "imported"


def test_another_libmtmd_asked_for(tmp_path: Path) -> None:
    line = said(TRY, {"MTMD_CPP_LIB": str(tmp_path)})
    assert str(tmp_path) in line
    assert "unset it" in line


def test_our_own_libmtmd_asked_for() -> None:
    assert said(TRY, {"MTMD_CPP_LIB": str(library_folder())}) == "imported"


def test_the_variable_does_not_stay_behind() -> None:
    assert said("import os, qap_gguf; print(os.environ.get('MTMD_CPP_LIB'))") == "None"


def stub(folder: Path, text: str) -> dict[str, str]:
    (folder / "llama_cpp").mkdir()
    (folder / "llama_cpp" / "__init__.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("version", ["0.3.35", "0.3.37", "1.0"])
def test_another_version_of_llama_cpp_python(tmp_path: Path, version: str) -> None:
    line = said(TRY, stub(tmp_path, f"__version__ = {version!r}\n"))
    assert f"expected llama-cpp-python {LLAMA_CPP_PYTHON}, got {version}" in line
    assert f"pip install llama-cpp-python=={LLAMA_CPP_PYTHON}" in line


def test_a_llama_cpp_python_that_does_not_load(tmp_path: Path) -> None:
    line = said(TRY, stub(tmp_path, "raise ImportError('libllama.so.0: cannot open shared object file')\n"))
    assert "cannot open shared object file" in line
    assert "pip install llama-cpp-python" in line


def test_no_version_at_all(tmp_path: Path) -> None:
    assert "got unknown" in said(TRY, stub(tmp_path, ""))


def test_the_command_says_it_in_one_line_too(tmp_path: Path) -> None:
    env = stub(tmp_path, "__version__ = '0.3.35'\n")
    done = outcome([sys.executable, "-m", "qap_gguf", "info"], env=env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "got 0.3.35" in done.stderr
