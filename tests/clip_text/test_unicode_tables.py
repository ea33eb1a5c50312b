"""The checked-in Unicode tables are those that the tool writes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

import make_unicode_tables

NAMES = ("unicode-classes.inc", "unicode-forms.inc")


def test_the_tables_are_what_the_tool_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked_in = {name: (make_unicode_tables.NATIVE / name).read_text(encoding="ascii") for name in NAMES}
    version = f"Unicode {unicodedata.unidata_version};"
    if version not in checked_in[NAMES[0]].splitlines()[0]:
        pytest.skip(f"the tables are of another version than this Python's {version}")
    monkeypatch.setattr(make_unicode_tables, "NATIVE", tmp_path)
    assert make_unicode_tables.main() == 0
    assert {name: (tmp_path / name).read_text(encoding="ascii") for name in NAMES} == checked_in
