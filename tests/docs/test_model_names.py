"""docs/models.md, "Names people paste": each family of the layout table is there, with what can be an id of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from convert.gguf_files import CLASS_TOKEN, LLAVA_KEYS, LLAVA_TENSORS, build, text
from qap_gguf import _core
from qap_gguf.files.hub import is_id, split_id

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Names people paste\n")[2].partition("\n## ")[0]


def rows() -> Iterator[tuple[str, list[str], list[str], str]]:
    """Family, projectors, repositories, and who names them."""
    for line in SECTION.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] not in ("family", ":--"):
            family, projectors, repositories, named_by = cells
            yield family, *(re.findall(r"`([^`]+)`", cell) for cell in (projectors, repositories)), named_by  # type: ignore[misc]


def known(projector: str, folder: Path) -> bool:
    """Whether libmtmd has heard of a projector: it refuses others by that name."""
    keys = [(name, text(projector) if name == "clip.projector_type" else value) for name, value in LLAVA_KEYS]
    path = build(folder / "a.gguf", keys, [CLASS_TOKEN, *LLAVA_TENSORS])
    try:
        _core.inspect_mmproj(str(path), None)
    except RuntimeError as err:
        return "unknown projector type" not in str(err)
    return True


def test_every_family_of_the_layout_table_has_names() -> None:
    listed = {projector for _, projectors, _, _ in rows() for projector in projectors}
    assert set(_core.projectors("layout")) - listed == set()


def test_every_projector_of_the_list_is_one_of_libmtmd(tmp_path: Path) -> None:
    assert not known("nothing_of_that_name", tmp_path)
    projectors = {projector for _, projectors, _, _ in rows() for projector in projectors}
    assert {projector for projector in projectors if not known(projector, tmp_path)} == set()


def test_names_are_ids_and_each_stands_once() -> None:
    found = [name for _, _, repositories, _ in rows() for name in repositories]
    assert len(found) == len(set(found)) > 40
    for name in found:
        assert is_id(name)
        assert split_id(name) == (name, None)
        assert name.lower().endswith("-gguf")
    families = [family for family, _, _, _ in rows()]
    assert len(families) == len(set(families))
    assert all(re.match(r"docs|tests|others|pull request \d+", named_by) for _, _, _, named_by in rows())
    assert "Not tried\nhere: no hub on our machines" in SECTION
