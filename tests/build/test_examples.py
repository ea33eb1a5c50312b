"""The examples run as they are, in interpreters of their own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap

ONE = ("--threads", "1")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: str | Path, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of an example."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout, done.stderr


def test_all_are_tested_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "call_server.py", "caption_folder.py", "compare_k.py", "plain_llama_cpp_python.py", "ten_questions.py",
    }  # fmt: skip


def test_caption_folder(tmp_path: Path) -> None:
    shutil.copy(qap.packaged_model().sample, tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.txt").write_text("text")
    out, err = run("caption_folder.py", tmp_path, *ONE, "--n-keep", "144", code=1)
    assert out == "a.png\tfour\n"
    assert err.startswith("b.png: image: ")


def test_ten_questions() -> None:
    out, _ = run("ten_questions.py", *ONE, "--n-keep", "72")
    lines = out.splitlines()
    assert len(lines) == 12
    assert re.fullmatch(r"What is in row 1, column 2\? +[\d.]+ +[\d.]+  house", lines[2])
    assert lines[-1].endswith("encoder passes: 1")
    out, _ = run("ten_questions.py", *ONE, "--rounds", "2", "--json")
    figures = json.loads(out)
    assert figures["encoder_passes"] == 1
    assert min(figures["first_ms"], figures["others_median_ms"], figures["stock_median_ms"]) > 0


def test_compare_k() -> None:
    out, _ = run("compare_k.py", *ONE)
    rows = [line.split(maxsplit=2) for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["144", "72", "36", "18", "9"]
    assert rows[0][2] == "house"


def test_plain_llama_cpp_python() -> None:
    out, _ = run("plain_llama_cpp_python.py", *ONE, "--n-keep", "72")
    dense, pruned = (int(line.split()[0]) for line in out.splitlines())
    assert dense - pruned == 72


def test_call_server() -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    pytest.importorskip("openai", reason="needs the openai client")
    from serve.conftest import serving

    with serving("--ctx", "512") as server:
        out, _ = run("call_server.py", "--port", server.url.rpartition(":")[2])
    assert out.splitlines()[-2:] == ["{'n_keep': 72}: house", "None: house"]
