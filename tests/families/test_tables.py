"""The tables that know families agree: layout, gate and resize (native), defects, bench shapes, patches and the docs.

A family that is added to one of them and forgotten in another is found here. CONTRIBUTING.md has the whole list.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from qap_gguf import _core
from qap_gguf.bench.shapes import SHAPES
from qap_gguf.convert import defects
from qap_gguf.files.gguf import GgufInfo
from tiny_mmproj import PROJECTORS

ROOT = Path(__file__).resolve().parents[2]
LAYOUT, GATE, RESIZE = (set(_core.projectors(table)) for table in ("layout", "gate", "resize"))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def bare(projector: str) -> list[defects.Defect]:
    """Defects of a file with this projector and a class token, and nothing else."""
    return list(defects.find_defects(GgufInfo(Path("x"), {}, {"v.class_embd": ("F32", 4)}), projector))


def test_the_native_tables_are_there() -> None:
    assert "mlp" in LAYOUT & GATE
    assert "gemma3" in LAYOUT & GATE & RESIZE
    assert _core.projectors("another") == []


def test_what_can_be_pruned_is_checked_and_what_is_stretched_can_be_pruned() -> None:
    assert GATE == LAYOUT
    assert RESIZE <= LAYOUT


def test_tiny_files_exist_of_every_projector() -> None:
    """They are what is damaged (tools/fuzz/mutate.py), measured and placed; the packaged file stands for LLaVA's."""
    assert set(PROJECTORS) | {"mlp"} == LAYOUT


def test_the_page_of_models_lists_the_layout_table() -> None:
    rows = [line.split("|") for line in page("models.md").splitlines() if line.startswith("| ")]
    listed = {cells[2].strip() for cells in rows if len(cells) > 8} - {"projector in the file", ":--"}
    assert listed == LAYOUT


def test_the_page_of_the_design_lists_the_gate() -> None:
    text = " ".join(page("design.md").split())
    found = re.search(r"Complete rules exist for the projectors (.*?), and for language models", text)
    assert found is not None
    assert set(re.findall(r"`([^`]+)`", found[1])) == GATE


def test_every_stretched_family_is_said_to_be_letterboxed_by_stock() -> None:
    for projector in LAYOUT:
        found = bare(projector)
        said = any("with black" in defect.text or defect.patch == "008-internvl-tiles.patch" for defect in found)
        assert said == (projector in RESIZE)


#: Patches that fix nothing: they call our code.
CALL_SITES = {
    "001-hooks.patch",
    "009-padding.patch",
    "010-server-prune.patch",
    "011-encode-once.patch",
    "012-early-drop.patch",
    "013-repack.patch",
    "015-hunyuan-positions.patch",
}


def test_defects_name_the_patches_that_are_there() -> None:
    """Each patch but the call sites fixes a defect that `convert --check` names, and docs/upstream.md describes it."""
    there = {path.name for path in (ROOT / "native" / "upstream").glob("*.patch")} - CALL_SITES
    assert {defect.patch for _, defect in defects._TABLE if defect.patch is not None} == there
    fixes = set(re.findall(r"\b0\d\d\b", page("upstream.md")))
    assert {name[:3] for name in there} <= fixes


def test_shapes_to_measure_can_be_pruned() -> None:
    assert {shape.vision.projector for shape in SHAPES.values()} <= LAYOUT
