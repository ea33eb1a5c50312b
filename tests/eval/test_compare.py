"""The table of one method against another: cells, certainty, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compare

Said = pytest.CaptureFixture[str]


def row(kept: float, value: float, half: float, method: str = "qap", **more: Any) -> dict[str, Any]:
    versus = {"semantic": {"value": value, "low": value - half, "high": value + half}}
    return {"model": "m", "kv": "", "method": method, "settings": "", "n_kept": kept, "versus": versus} | more


def test_cells_are_bold_where_the_interval_excludes_nothing(tmp_path: Path, capsys: Said) -> None:
    rows = [row(18, 0.02, 0.01), row(72, 0.0, 0.01), row(18, -0.05, 0.01, kv="q4_0"), row(18, 0.9, 0.1, method="dpp")]
    (tmp_path / "results.json").write_text(json.dumps({"results": rows}))
    assert compare.main([str(tmp_path / "results.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["model", "KV", "K = 72", "K = 18"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "m", "f16", "+0.0 (-1.0 to +1.0)", "**+2.0** (+1.0 to +3.0)",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["m", "q4_0", "-", "**-5.0** (-6.0 to -4.0)"]
    assert lines[-1] == "qap minus semantic, points: above 0 in 1, below 0 in 1 of 3 cells, mean -1.0"


def test_settings_make_rows_of_their_own_and_one_picture_is_never_certain() -> None:
    unknown = {"semantic": {"value": 0.5, "low": None, "high": None}}
    rows = [row(18, 0.5, 0.1, settings="int4"), row(18, 0.5, 0.1, settings="q4_0", versus=unknown)]
    table, differences = compare.compare(rows, "qap", "semantic")
    assert table[0] == ("model", "KV", "setting", "K = 18")
    assert table[1][1] == ("m", "f16", "q4_0", "+50.0")
    assert [compare.is_certain(difference) for difference in differences] == [1, 0]


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"results": [row(18, 0.1, 0.1)]}))
    assert compare.main([str(tmp_path / "results.json"), "--versus", "dense"]) == 1
    assert compare.main([str(tmp_path / "none.json")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 2
