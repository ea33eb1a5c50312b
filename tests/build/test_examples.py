"""The examples run as they are, in interpreters of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)


ONE = ("--threads", "1")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: str | Path, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of an example."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout, done.stderr


def test_all_are_tested() -> None:
    """Here, and in tests/batch/test_ray.py, which has a cluster."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "call_server.py", "plain_llama_cpp_python.py", "ray_captions.py", "ten_questions.py",
    }  # fmt: skip


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


def test_plain_llama_cpp_python() -> None:
    out, err = run("plain_llama_cpp_python.py", *ONE, "--n-keep", "72")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["all", "72"]
    assert [row[-1] for row in rows] == ["house", "house"]
    assert err == ""  # no log


def test_call_server() -> None:
    pytest.importorskip("openai", reason="needs the openai client")
    from serve.conftest import serving

    with serving("--ctx", "512") as server:
        out, _ = run("call_server.py", "--port", server.url.rpartition(":")[2])
    assert out.splitlines()[-2:] == ["{'n_keep': 72}: house", "None: house"]
