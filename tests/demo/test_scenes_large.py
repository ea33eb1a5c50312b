"""Large scenes: their size, what is in them, their light, and that make_scenes.py writes them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import emoji_scenes as es
import emoji_scenes_large as el
import make_scenes as ms


def block(emoji: str, pixels: int) -> Image.Image:
    """A sprite that needs no font: a square that no background resembles."""
    return Image.new("RGBA", (pixels, pixels), (0, 0, 0, 255))


@given(st.integers(0, 2**63))
def test_objects_lie_in_cells_of_their_own_before_the_background_they_name(seed: int) -> None:
    scene = el.make_large(random.Random(seed), block)
    assert scene.pixels.shape == (224, 224, 3)
    assert scene.pixels.dtype == np.uint8
    filled = {(placed.row, placed.column) for placed in scene.objects}
    assert 1 <= len(scene.objects) == len(filled) <= 6
    for row in range(es.GRID):
        for column in range(es.GRID):
            cell = scene.pixels[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56].reshape(-1, 3)
            dark = float((cell.max(axis=1) < 40).mean())
            assert (dark > 0.3) == ((row, column) in filled)
            if (row, column) not in filled:
                far = np.abs(cell.mean(axis=0) - np.array(es.COLORS[scene.background])).max()
                assert far <= 20  # the light changes by 18 at most, the noise by nothing on average


def test_every_other_picture_has_a_slow_change_of_light() -> None:
    changed = 0
    for seed in range(60):
        pixels = el.make_large(random.Random(seed), lambda e, n: Image.new("RGBA", (n, n), (0, 0, 0, 0))).pixels
        rows, columns = (np.median(pixels, axis=(axis, 2)).astype(float) for axis in (1, 0))
        changed += bool(max(abs(rows[0] - rows[-1]), abs(columns[0] - columns[-1])) > 12)
    assert 18 <= changed <= 42


def test_make_scenes_writes_them(tmp_path: Path) -> None:
    n = ms.write_scenes(tmp_path / "large", 2, 3, 1, block, kinds=["large"])
    rows = [json.loads(line) for line in (tmp_path / "large" / "questions.jsonl").read_text("utf-8").splitlines()]
    assert n == len(rows) == 6
    assert {row["kind"] for row in rows} <= set(es.KINDS)
    with Image.open(tmp_path / "large" / rows[0]["image"]) as image:
        assert image.size == (224, 224)
