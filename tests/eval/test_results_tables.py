"""The tables of docs/results.md: what stands in them, and where they are put."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qap_gguf.eval as qe
import results_tables
from qap_gguf.config import PruneConfig

Said = pytest.CaptureFixture[str]
SETUPS = (qe.Setup("m-F16", "f16"), qe.Setup("m-Q2_K", "q4_0"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def run(errors: tuple[str, ...] = ()) -> dict[str, Any]:
    """A finished run: dense is always right, qap on every second picture, the others never."""
    outcomes = []
    compared = qe.variants(
        ["dense", "qap", "semantic", "dpp", "dpp-semantic", "dpp-flat"],
        [qe.Budget(n_keep=36), qe.Budget(n_keep=18)], PruneConfig(), errors=errors,
    )  # fmt: skip
    for setup in SETUPS:
        for variant in compared:
            for picture in range(6):
                right = variant.method == "dense" or (variant.method == "qap" and picture % 2 == 0)
                said = ("yes" if right else "no",)
                question = qe.Question(Path(f"{picture}.png"), "q?", "yes")
                outcomes.append(qe.Outcome(question, variant, said, 18, (0.01,), setup))
    return qe.Evaluation(qe.summarise(outcomes), 6, 6, interactions=qe.interactions(outcomes)).to_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, errors in (("methods", ()), ("grid", ()), ("flat", ()), ("w4a4", ()), ("errors", ("int4", "q4_0"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(run(errors)))
    return tmp_path


def test_rows_and_columns(folder: Path) -> None:
    found = json.loads((folder / "grid" / "results.json").read_text())
    header, body = results_tables.by_setup(found, 18)
    assert header == ("model", "KV", "dense", "qap", "semantic", "dpp", "dpp-semantic", "dpp-flat")
    assert body[1][:4] == ("m-Q2_K", "q4_0", "100.0 (100.0 to 100.0)", "50.0 (16.7 to 83.3)")
    header, body = results_tables.interactions(found, results_tables.PAIRS)
    assert header[2] == "qap - semantic"
    assert body == [("m-Q2_K", "q4_0", *["+0.0 (+0.0 to +0.0)"] * 4)]
    header, body = results_tables.versus(found, ["semantic"])
    assert header == ("method", "minus", "K = 36", "K = 18")
    assert body == [("qap", "semantic", *["**+50.0** (+16.7 to +83.3)"] * 2)]
    header, body = results_tables.by_kind(found, 18)
    assert header == ("method", "any (6)")
    assert body[:2] == [("dense", "100.0"), ("qap", "50.0")]
    with_errors = json.loads((folder / "errors" / "results.json").read_text())
    header, body = results_tables.by_setting(with_errors, {"qap": "semantic"})
    assert header == ("setting", "qap, K = 36", "dpp, K = 36", "qap, K = 18", "dpp, K = 18")
    assert body[1] == ("q4_0", *["50.0; **+50.0** (+16.7 to +83.3)", "0.0"] * 2)


def test_tables_go_to_their_places_and_nothing_else_changes(folder: Path, capsys: Said) -> None:
    page = folder / "results.md"
    names = [name for name, (where, _) in results_tables.TABLES.items() if where != "alpha" and where != "hard"]
    page.write_text("# Head\n" + "".join(f"\n{n}:\n<!-- table {n} -->\nold\n<!-- end -->\n" for n in names) + "foot\n")
    assert results_tables.main([str(folder), "--write", str(page)]) == 0
    assert "table alpha is left alone" in capsys.readouterr().err
    text = page.read_text()
    assert text.startswith("# Head\n\nmethods:\n<!-- table methods -->\n\n| method")
    assert text.endswith("foot\n")
    assert "old" not in text
    assert text.count("6 questions about 6 pictures.") == len(names)
    assert "Above 0 in 4, below 0 in 0 of 4 cells; mean +50.0." in text
    assert results_tables.main([str(folder), "--write", str(page)]) == 0
    assert page.read_text() == text


def test_printed_by_name(folder: Path, capsys: Said) -> None:
    assert results_tables.main([str(folder), "--only", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "methods:"
    assert cells(lines[2]) == ["method", "all tokens", "K = 36", "K = 18"]


def test_what_is_missing_is_one_line(folder: Path, capsys: Said) -> None:
    assert results_tables.main([str(folder), "--only", "alpha"]) == 1
    page = folder / "page.md"
    page.write_text("no place")
    assert results_tables.main([str(folder), "--write", str(page)]) == 1
    assert page.read_text() == "no place"
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 2
