"""`compare` with the packaged model: the table, JSON, the picture, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qap_gguf as qap
from qap_gguf.cli import main

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

Said = pytest.CaptureFixture[str]
ONE = ("--threads", "1")


@pytest.fixture(autouse=True)
def fake() -> None:
    """Take the place of the fixture of that name: these tests want the real model."""


def test_each_row_is_an_answer_of_its_own(capsys: Said) -> None:
    words = ["compare", "-p", "How many objects are there?", "-p", "What is in row 1, column 2?", "--n-keep", "72"]
    assert main([*words, "--n-keep", "9", "--select", "topk", "--json", *ONE]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [question["prompt"] for question in found["questions"]] == [words[2], words[4]]
    for question in found["questions"]:
        rows = question["rows"]
        assert [(row["n_kept"], row["n_tokens"]) for row in rows] == [(144, 144), (72, 144), (9, 144)]
        for row in rows:
            if row["answer"] == rows[0]["answer"]:
                assert row["n_kv"] - rows[0]["n_kv"] == row["n_kept"] - 144
        assert all(row["first_s"] > row["prefill_s"] > 0 for row in rows)
    with qap.VisionModel(n_threads=1) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
        for question in found["questions"]:
            for row in question["rows"]:
                cfg = None if row["config"] is None else qap.PruneConfig.from_dict(row["config"])
                assert vlm.generate([image, question["prompt"]], prune=cfg, max_tokens=64) == row["answer"]
                if cfg is not None:
                    assert vlm.prune(image, cfg, question["prompt"]).indices.tolist() == row["kept"]


@pytest.mark.parametrize("words", [["compare", "--n-keep", "9", "-p"], ["run", "--n-keep", "9", "-p"]])
def test_what_was_kept_is_that_of_the_answer(words: list[str], capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores behind the numbers of the kept tokens are computed once."""
    calls, prune = [], qap.VisionModel.prune

    def counted(vlm: qap.VisionModel, *args: Any, **kwargs: Any) -> qap.PrunedImage:
        calls.append(prune(vlm, *args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(qap.VisionModel, "prune", counted)
    assert main([*words, "How many?", "--json", *ONE]) == 0
    found = json.loads(capsys.readouterr().out)
    (cut,) = calls
    kept = found["questions"][0]["rows"][1]["kept"] if words[0] == "compare" else found["kept"][0]
    assert kept == cut.indices.tolist()


def test_the_table_says_where_the_answer_stays(capsys: Said) -> None:
    assert main(["compare", *ONE]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["144", "72", "36", "18", "9"]
    dense = lines[2].split("|")[-2].strip()
    assert dense == "boat"
    for line in lines[3:]:
        answer = line.split("|")[-2].strip()
        assert (answer == f"{dense} (same)") or not answer.startswith(f"{dense} (")
    assert "packaged sample" in said.err


def test_the_picture_dims_what_is_dropped(tmp_path: Path, capsys: Said) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    target = tmp_path / "c.png"
    assert main(["compare", "--n-keep", "36", "--png", str(target), *ONE]) == 0
    drawn = np.asarray(Image.open(target))
    assert drawn.shape[1] == 2 * (300 + 16) + 16
    dense, pruned = drawn[60:340, 20:310], drawn[60:340, 336:626]
    changed = (np.abs(dense.astype(int) - pruned).max(axis=2) > 20).mean()
    assert 0.6 < changed < 0.85  # 108 of 144 patches
    assert main(["compare", "--png", str(target)]) == 1
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["photo.jpg"], 2, "-p/--prompt"),
        (["-p", " "], 2, "empty"),
        (["--n-keep", "3", "--keep-ratio", "0.5"], 2, "exclude"),
        (["--keep-ratio", "2"], 2, "keep_ratio"),
        (["--png", "x.jpg"], 2, ".png"),
        (["nothing.png", "-p", "What?"], 1, "nothing.png"),
        (["-m", "model.gguf"], 2, "--mmproj"),
    ],
)
def test_what_it_refuses(words: list[str], code: int, said: str, capsys: Said) -> None:
    assert main(["compare", *words]) == code
    assert said in capsys.readouterr().err
