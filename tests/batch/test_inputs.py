"""What can be read: folders, patterns, lists, JSON lines, CSV, Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.batch.inputs import find_input
from qap_gguf.batch.rows import Defaults, read_row
from qap_gguf.errors import DataError, UnsupportedError


def ids(found: Any) -> list[str]:
    return [read_row(row, number, Defaults("?")).id for number, row in enumerate(found.read(), start=1)]


def values(found: Any) -> list[Any]:
    return [row.values for row in found.read()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a/z.JPG", "a/b/c.webp", "a.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.png").mkdir()
    return tmp_path


def test_a_folder_with_the_folders_in_it(folder: Path) -> None:
    found = find_input([folder])
    assert ids(found) == ["a.png", "b.png", "a/z.JPG", "a/b/c.webp"]
    assert found.total == 4
    assert ids(found) == ids(find_input([folder]))  # each time the same


def test_patterns_lists_and_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert ids(find_input(["**/*.p*g"])) == ["a.png", "b.png"]
    (folder / "list.txt").write_text("a.png\r\n\n a/z.JPG \n")
    found = find_input(["list.txt", "b.png"])
    assert ids(found) == ["a.png", "a/z.JPG", "b.png"]
    assert next(found.read()).folder == Path()


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "a.png", "id": "x", "label": 3}\n\nnonsense\n[1]\n{"image": "b.png"}')
    found = find_input([path])
    assert (found.total, found.is_openai, found.unused) == (4, False, ("label",))
    assert ids(found) == ["x", "2", "3", "4"]
    assert [row.error is not None for row in found.read()] == [False, True, True, False]
    assert next(found.read()).values == {"image": "a.png", "id": "x"}
    openai = json.dumps({"custom_id": "c", "body": {}, "method": "POST"})
    path.write_text(f"{openai}\nnonsense\n{{}}\n")
    found = find_input([path])
    assert found.is_openai
    rows = [read_row(row, number, Defaults("?")) for number, row in enumerate(found.read(), start=1)]
    assert [row.error is None for row in rows] == [True, False, False]
    assert rows[0].body == {"stream": False}
    path.write_text(f'{{"image": "a.png"}}\n{openai}\n')
    others = [read_row(row, 1, Defaults("?")) for row in find_input([path]).read()]
    assert [row.error is None for row in others] == [True, False]  # the first line decides: the output has one form


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        '\ufeffimage,prompt,n_keep,stop,label\na.png,"Two\nlines, a comma",36,"[""x""]",7\nb.png,,,,\nc.png\n'
    )
    found = find_input([path])
    assert (found.total, found.unused) == (3, ("label",))
    first, second, third = found.read()
    assert first.values == {"image": "a.png", "prompt": "Two\nlines, a comma", "n_keep": 36, "stop": ["x"]}
    assert second.values == {"image": "b.png"}
    assert third.error == "record 4: expected 5 cells, got 1; correct it"


def test_texts_of_a_csv_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,image,prompt,temperature,dense\n007,12,3,0.5,true\n")
    assert values(find_input([path])) == [
        {"id": "007", "image": "12", "prompt": "3", "temperature": 0.5, "dense": True}
    ]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra batch")
    import pyarrow.parquet

    table = arrow.table({"image": ["a.png", "b.png"], "n_keep": [36, None], "x": [1, 2], "prompt": ["?", None]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = find_input([tmp_path / "rows.parquet"])
    assert (found.total, found.unused) == (2, ("x",))
    assert values(found)[0] == {"image": "a.png", "n_keep": 36, "prompt": "?"}
    assert read_row(list(found.read())[1], 2, Defaults("?")).body.get("prune") is None
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="expected a file to read"):
        find_input([tmp_path / "bad.parquet"])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UnsupportedError, match="pip install pyarrow"):
        find_input([tmp_path / "rows.parquet"])


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        (None, "rows.jsonl", "expected a file to read"),
        ("", "rows.jsonl", "expected rows, found none"),
        ("image,prompt\n", "rows.csv", "expected rows, found none"),
        ("path\na.png\n", "rows.csv", "the column image"),
        ('image\n"a.png\n', "rows.csv", "expected a file to read"),
        (None, "none.xyz", "expected a folder, a pattern"),
        (None, "no\x00ne", "expected a folder, a pattern"),
        (None, "*.png", "expected pictures, found none"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str | None, name: str, why: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=why) as found:
        find_input([str(tmp_path / name)])
    assert "\n" not in str(found.value)


def test_a_table_beside_something_else(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="expected a table alone"):
        find_input([folder / "rows.jsonl", folder])
    with pytest.raises(DataError, match="expected pictures, found none"):
        find_input([folder / "d.png"])
