"""The tables of benchmarks/imatrix_tables.py and model_error.py, from answers that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import imatrix_tables
import model_error
from qap_gguf.eval import Budget, Outcome, Question, variants

PICTURES = [Path(f"{i // 3}.png") for i in range(30)]


def answers(right: float, kl: float) -> list[dict[str, Any]]:
    """Of 30 questions read in two ways; the first ones are right."""
    return [
        {"number": i, "way": way, "said": "a", "right": float(i < 30 * right), "kl": kl}
        for way in ("all tokens", "part")
        for i in range(30)
    ]


FOUND = {
    ("Q4_0", "none"): answers(0.5, 0.02),
    ("Q4_0", "text"): answers(0.6, 0.02),
    ("Q4_0", "pruned"): answers(0.8, 0.005),
    ("IQ1_M", "pruned"): answers(0.2, 0.1),
}


def test_a_row_for_each_type_and_matrix() -> None:
    header, body = imatrix_tables.table(FOUND, ["Q4_0", "IQ1_M"], "part", PICTURES)
    rows = {row[:2]: row[2:] for row in body}
    assert header[2:] == ("right, %", "minus none", "KL, 1/1000 nat", "minus none")
    assert len(rows) == 8
    assert rows["Q4_0", "none"] == ("50.0", "", "20.0", "")
    assert rows["Q4_0", "dense"] == ("-", "", "-", "")
    right, gained, kl, lower = rows["Q4_0", "pruned"]
    assert (right, kl, lower) == ("80.0", "5.0", "**-15.0** (-15.0 to -15.0)")
    assert gained.startswith("+30.0 (+0.0 to ")
    assert rows["IQ1_M", "pruned"] == ("20.0", "", "100.0", "")


def test_the_mean_over_types_takes_those_that_have_both() -> None:
    found = {**FOUND, ("Q2_K", "none"): answers(0.5, 0.04), ("Q2_K", "pruned"): answers(0.6, 0.03)}
    header, body = imatrix_tables.over_types(found, ["Q4_0", "Q2_K", "IQ1_M"], "all tokens", "kl", PICTURES)
    assert header[1:] == ("minus none", "minus text", "minus dense")
    rows = {row[0]: row[1:] for row in body}
    assert rows["pruned"] == ("**-12.5** (-12.5 to -12.5)", "**-15.0** (-15.0 to -15.0)", "")
    assert rows["text"] == ("+0.0 (+0.0 to +0.0)", "", "")
    assert rows["dense"] == ("", "", "")


def test_answers_go_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"kl": 1}) + "\n" + '{"kl": ', encoding="utf-8")
    known = imatrix_tables.Answers(path)
    known.add({"kl": 2})
    assert [row["kl"] for row in imatrix_tables.Answers(path).rows] == [1, 2]


def test_divergence_is_that_of_probabilities() -> None:
    truth, other = imatrix_tables.log_softmax([0.0, 0.0]), imatrix_tables.log_softmax([np.log(3.0), 0.0])
    assert imatrix_tables.divergence(truth, other) == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))


def test_either_error_is_compared_with_the_other() -> None:
    compared = variants(["qap"], [Budget(n_keep=18)], errors=("int4", "model"))
    outcomes = []
    for i, picture in enumerate(PICTURES):
        question = Question(picture, "What?", "cat")
        for variant in compared:
            known = variant.configs[0] is not None and variant.configs[0].error == "model"
            outcomes.append(Outcome(question, variant, ("cat" if i < (20 if known else 10) else "dog",), 18, ()))
    header, body = model_error.table(outcomes)
    assert header == ("model", "method", "K", "int4", "model", "model minus int4", "other answers, %")
    ((_, method, k, plain, weighted, difference, differ),) = body
    assert (method, k, plain, weighted, differ) == ("qap", "18", "33.3", "66.7", "33.3")
    assert difference.startswith("**+33.3** (+")
