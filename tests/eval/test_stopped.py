"""Ctrl-C in the middle of an evaluation: one line says how to go on, and going on gives what a whole run gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf import eval as package
from qap_gguf.cli import main

Said = pytest.CaptureFixture[str]
WORDS = ("--methods", "dense,dpp", "--n-keep", "18", "--threads", "1", "--json")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    shutil.copy(qap.packaged_model().sample, tmp_path / "a.png")
    rows = [("What is in row 1, column 2?", "house"), ("How many objects are there?", "four")]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"image": "a.png", "question": q, "answer": a}) + "\n" for q, a in rows))
    return path


def test_going_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    real = package.Journal.add
    left = [2]

    def add(journal: Any, *args: Any) -> None:
        real(journal, *args)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    words = ["eval", str(data), *WORDS, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(package.Journal, "add", add)
        assert main(words) == 130
    (line,) = filter(None, capsys.readouterr().err.splitlines())
    assert "run the same command again" in line
    assert str(tmp_path / "out" / "journal.jsonl") in line
    assert main(words) == 0
    said = capsys.readouterr()
    assert "2 answers are known" in said.err
    assert main(["eval", str(data), *WORDS]) == 0
    whole = json.loads(capsys.readouterr().out)["results"]
    assert [row["accuracy"] for row in json.loads(said.out)["results"]] == [row["accuracy"] for row in whole]


def test_without_a_folder(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "evaluate_grid", stop)
    assert main(["eval", str(data), *WORDS]) == 130
    (line,) = filter(None, capsys.readouterr().err.splitlines())
    assert "--out DIR" in line
