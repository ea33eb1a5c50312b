"""Pipes, devices and links to them where a stranger's file is expected: one line, and nothing hangs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf.convert.output.imatrix import read_imatrix
from qap_gguf.convert.source.torch_file import torch_tensors
from qap_gguf.files.regular import open_regular, read_regular, read_text

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_link(path: Path) -> None:
    """To a pipe beside it, which is inside of the checkpoint and so allowed as a place."""
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that fails; it ends by itself, with no writer on the pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "qap_gguf", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (1, 2), done.stderr
    return done


def line(*words: str | Path) -> str:
    """The one line that a command says."""
    done = command(*words)
    lines = [text for text in done.stderr.splitlines() if text.startswith("qap-gguf: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize("make", [as_pipe, as_link, as_device])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "preprocessor_config.json",
     "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json"],
)  # fmt: skip
def test_a_checkpoint(plain_llava: Path, tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    """Converted, or refused in one line: some of these files may be missing."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain_llava, folder)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    code = (
        "import sys, qap_gguf as qap\n"
        "try:\n    qap.convert(sys.argv[1], sys.argv[2], force=True)\n"
        "except qap.ConvertError as err:\n    print('refused', err)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "out"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    if name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert done.stdout.startswith("refused")
    assert done.stdout.count("\n") <= 1


@pytest.mark.parametrize("make", [as_pipe, as_link, as_device])
def test_other_files(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "file.gguf"
    make(path)
    files = qap.packaged_model()
    assert "no regular file" in line("run", "--mmproj", files.mmproj, "-m", path, "-p", "a")
    assert "no regular file" in line("run", "--mmproj", path, "-m", files.model, "-p", "a")
    done = command("convert", "--check", path)
    assert "no regular file" in done.stdout + done.stderr
    assert "no regular file" in line("eval", path)
    assert "expected a file" in line("run", "--image", path, "-p", "a")
    for read in (open_regular, read_regular, read_text):
        with pytest.raises(OSError, match="no regular file"):
            read(path)
    with pytest.raises(qap.ConvertError, match="no regular file"):
        read_imatrix(path)
    with pytest.raises(qap.ImageError, match="found none"):
        qap.SourceRules().load(path)
    pytest.importorskip("torch")
    with pytest.raises(qap.ConvertError, match="no regular file"):
        torch_tensors(path)


def test_text_is_read_as_python_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a\r\nb\rc\n\xc3\xa9")
    assert read_text(path) == path.read_text(encoding="utf-8") == "a\nb\nc\n\u00e9"
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
