"""Other layouts: where the objects lie, what the background is, and that nothing is asked that has no answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import emoji_scenes as es
import emoji_scenes_layouts as el
import make_scenes as ms

SEEDS = st.integers(0, 2**63)
SIDES = {"": 192, "large-": 224}


def block(emoji: str, pixels: int) -> Image.Image:
    """A sprite that needs no font: a square that no background resembles."""
    return Image.new("RGBA", (pixels, pixels), (0, 0, 0, 255))


def drawn(kind: str, seed: int) -> es.Scene:
    return el.LAYOUT_KINDS[kind][0](random.Random(seed), block)


def filled(scene: es.Scene) -> list[int]:
    """Pixels of objects in each cell."""
    cell = scene.pixels.shape[0] // es.GRID
    dark = (scene.pixels.max(axis=2) < 40).reshape(es.GRID, cell, es.GRID, cell)
    counts: list[int] = dark.sum(axis=(1, 3)).ravel().tolist()
    return counts


@given(st.sampled_from(list(el.LAYOUT_KINDS)), SEEDS)
def test_objects_lie_where_the_scene_says(kind: str, seed: int) -> None:
    scene = drawn(kind, seed)
    side = SIDES["large-" if kind.startswith("large") else ""]
    assert scene.pixels.shape == (side, side, 3)
    cells = [placed.cell for placed in scene.objects]
    assert len(set(cells)) == len(cells)
    assert [count > 0 for count in filled(scene)] == [cell in cells for cell in range(es.GRID**2)]


@given(st.sampled_from(list(SIDES)), SEEDS)
def test_their_number(size: str, seed: int) -> None:
    assert len(drawn(f"{size}two", seed).objects) == 2
    assert len(drawn(f"{size}six", seed).objects) == 6


@given(st.sampled_from(list(SIDES)), SEEDS)
def test_lines_have_no_gaps(size: str, seed: int) -> None:
    scene = drawn(f"{size}lines", seed)
    cells, side = sorted(placed.cell for placed in scene.objects), SIDES[size] // es.GRID
    assert 3 <= len(cells) <= 6
    assert cells[0] % es.GRID == 0
    assert cells == list(range(cells[0], cells[0] + len(cells)))
    assert all(count >= 0.95 * (side - 6) ** 2 for count in filled(scene) if count)


@given(SEEDS)
def test_small_objects_have_one_to_two_patches(seed: int) -> None:
    assert all(0.95 * 14**2 <= count <= 24**2 for count in filled(drawn("large-small", seed)) if count)


@given(st.sampled_from(list(SIDES)), SEEDS)
def test_a_patchwork_has_four_colours_and_is_not_asked_for_one(size: str, seed: int) -> None:
    scene, half, found = drawn(f"{size}patchwork", seed), SIDES[size] // 2, []
    for top, left in ((0, 0), (0, half), (half, 0), (half, half)):
        quarter = scene.pixels[top : top + half, left : left + half].reshape(-1, 3).astype(float)
        middle = np.median(quarter[quarter.max(axis=1) >= 40], axis=0)
        found.append(min(es.COLORS, key=lambda name: float(np.abs(middle - es.COLORS[name]).max())))
    assert len(set(found)) == 4
    assert found[0] == scene.background
    rng, ask = random.Random(seed), el.LAYOUT_KINDS[f"{size}patchwork"][1]
    assert "color" not in {ask(rng, scene).kind.rpartition("-")[2] for _ in range(30)}


@pytest.mark.parametrize("kind", el.LAYOUT_KINDS)
def test_make_scenes_writes_them(kind: str, tmp_path: Path) -> None:
    assert ms.write_scenes(tmp_path / "out", 2, 6, 1, block, kinds=[kind]) == 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text("utf-8").splitlines()]
    assert {row["kind"] for row in rows} <= {f"{kind}-{asked}" for asked in es.KINDS}
