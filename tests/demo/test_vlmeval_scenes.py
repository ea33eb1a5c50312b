"""tools/demo/vlmeval_scenes.py: what VLMEvalKit reads is what the file of questions says."""

from __future__ import annotations

import ast
import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import vlmeval_scenes

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "Where is\tthe dog?", "answer": "row 1", "kind": "where"},
    {"image": "b.png", "question": 'Is there a "cat"?', "answer": "no", "choices": ["yes", "no"]},
    {"image": "a.png", "question": "How many?", "answers": ["two", "2", "two"]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "questions.jsonl"


def test_a_row_for_each_question(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "LMUData" / "mine.tsv"
    assert vlmeval_scenes.main([str(data), "--out", str(out)]) == 0
    with out.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t"))
    assert [row["index"] for row in found] == ["0", "1", "2"]
    assert [row["question"] for row in found] == [row["question"] for row in ROWS]
    assert [row["answer"] for row in found] == ["row 1", "no", "two"]
    assert [row["category"] for row in found] == ["where", "any", "any"]
    assert [ast.literal_eval(row["answers"]) for row in found] == [["row 1"] * 10, ["no"] * 10, ["two", "2", "two"]]
    assert found[2]["image"] == "0"  # the picture of row 0
    for row, name in zip(found, "ab", strict=False):
        assert base64.b64decode(row["image"]) == (tmp_path / f"{name}.png").read_bytes()
        assert len(row["image"]) > 64  # what is shorter VLMEvalKit takes for an index


def test_the_first_questions_only(data: Path, tmp_path: Path) -> None:
    assert vlmeval_scenes.main([str(data), "--out", str(tmp_path / "mine.tsv"), "--limit", "1"]) == 0
    assert len((tmp_path / "mine.tsv").read_text(encoding="utf-8").splitlines()) == 2


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmeval_scenes.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "mine.tsv")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("vlmeval_scenes: error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "mine.tsv").exists()
