"""The scene generator: true answers, the same scenes for the same seed, nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import emoji_scenes as es
import make_scenes as ms

ORIGINAL = Path(__file__).resolve().parents[3] / "shared" / "models" / "tiny-llava" / "scenes.py"


def block(emoji: str, pixels: int) -> Image.Image:
    """A sprite that needs no font: a square in a colour of its own."""
    return Image.new("RGBA", (pixels, pixels), (es.EMOJI.index(emoji) * 3, 0, 255, 255))


def font_or_skip() -> Path:
    try:
        return es.find_font()
    except es.SceneError as err:
        pytest.skip(str(err))


def load_original() -> ModuleType:
    if not ORIGINAL.is_file():
        pytest.skip("the generator beside the training checkpoint is not on this machine")
    spec = importlib.util.spec_from_file_location("original_scenes", ORIGINAL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_are_as_training_had_them() -> None:
    assert len(es.EMOJI) == len(set(es.NAMES.values())) == 64
    assert (es.NAMES["🐶"], es.NAMES["🍌"], es.NAMES["⚽"], es.NAMES["🐻"]) == ("dog", "banana", "soccer ball", "bear")


@given(st.integers(0, 2**63))
def test_every_scene_is_as_described_and_every_answer_is_true(seed: int) -> None:
    rng = random.Random(seed)
    scene = es.make_scene(rng, block)
    assert scene.pixels.shape == (192, 192, 3)
    assert scene.pixels.dtype == np.uint8
    cells = {(placed.row, placed.column): es.NAMES[placed.emoji] for placed in scene.objects}
    assert 2 <= len(scene.objects) == len(cells) <= 6
    assert all(0 <= row < 4 and 0 <= column < 4 for row, column in cells)
    for _ in range(6):
        text, answer, kind = es.make_question(rng, scene)
        words = text.rstrip("?").split()
        if kind == "at":
            assert cells[int(words[4].rstrip(",")) - 1, int(words[6]) - 1] == answer
        elif kind == "where":
            where = [f"row {r + 1}, column {c + 1}" for (r, c), name in cells.items() if name == " ".join(words[3:])]
            assert where == [answer]
        elif kind == "count":
            assert es.NUMBERS.index(answer) == len(cells)
        elif kind == "color":
            corner = np.median(scene.pixels.reshape(-1, 3), axis=0)  # most of a picture is background
            nearest = min(es.COLORS, key=lambda name: float(np.abs(corner - np.array(es.COLORS[name])).sum()))
            assert nearest == answer == scene.background
        else:
            assert (" ".join(words[3:]) in cells.values()) == (answer == "yes")


def test_every_object_shows_in_its_cell() -> None:
    scene = es.make_scene(random.Random(3), block)
    plain = np.array(es.COLORS[scene.background])
    changed = np.abs(scene.pixels.astype(int) - plain).max(axis=2) > 6  # more than the noise
    filled = changed.reshape(4, 48, 4, 48).sum(axis=(1, 3)) > 0
    assert {(int(r), int(c)) for r, c in np.argwhere(filled)} == {(p.row, p.column) for p in scene.objects}


def test_caption_is_in_reading_order() -> None:
    text, answer, _ = es.caption([es.Placed("🐱", 2, 0), es.Placed("🐶", 0, 3)])
    assert (text, answer) == ("What is in the picture?", "dog in row 1, column 4; cat in row 3, column 1")


def test_the_same_seed_gives_the_same_files_and_another_one_others(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert ms.write_scenes(tmp_path / name, 3, 4, seed, block) == 12
    names = ["00000.png", "00001.png", "00002.png", "questions.jsonl"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a" / "questions.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"0000{i}.png" for i in range(3) for _ in range(4)]
    assert all(set(row) == {"image", "question", "answer", "kind"} and row["kind"] in es.KINDS for row in rows)


def test_nothing_is_overwritten_or_left_half_done(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    ms.write_scenes(out, 1, 1, 1, block)
    before = (out / "questions.jsonl").read_bytes()
    with pytest.raises(es.SceneError, match="say --force"):
        ms.write_scenes(out, 1, 1, 2, block)

    def interrupted(emoji: str, pixels: int) -> Image.Image:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ms.write_scenes(out, 1, 1, 2, interrupted, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]
    assert (out / "questions.jsonl").read_bytes() == before
    ms.write_scenes(out, 1, 1, 2, block, force=True)
    assert (out / "questions.jsonl").read_bytes() != before


def test_a_missing_or_useless_font_is_one_line_with_the_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    useless = tmp_path / "font.ttf"
    useless.write_text("not a font")
    for font in (tmp_path / "none.ttf", useless):
        assert ms.main(["--out", str(tmp_path / "out"), "--font", str(font)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert "--font" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--n", "0"], ["--seed", "-1"], ["--questions", "x"], []])
def test_wrong_usage_ends_with_2(tmp_path: Path, wrong: list[str]) -> None:
    args = [*wrong, "--out", str(tmp_path / "out")] if wrong else []
    with pytest.raises(SystemExit) as stop:
        ms.main(args)
    assert stop.value.code == 2


@pytest.mark.parametrize("seed", [0, 7, es.HELD_OUT_SEED])
def test_scenes_and_questions_are_those_that_training_drew_from(seed: int) -> None:
    original, sprite = load_original(), es.font_sprites(font_or_skip())
    ours, theirs = random.Random(seed), random.Random(seed)
    for _ in range(5):
        scene = es.make_scene(ours, sprite)
        pixels, objects, background = original.scene(theirs)
        assert np.array_equal(scene.pixels, pixels)
        assert [tuple(placed) for placed in scene.objects] == objects
        assert scene.background == background
        assert es.caption(scene.objects)[:2] == original.caption(objects)
        for _ in range(6):
            assert tuple(es.make_question(ours, scene)) == original.question(theirs, objects, background)


def test_the_command_writes_files_that_hold_the_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sprite = es.font_sprites(font_or_skip())
    out = tmp_path / "new" / "scenes"
    assert ms.main(["--n", "1", "--questions", "2", "--seed", "11", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "questions.jsonl")
    with Image.open(out / "00000.png") as picture:
        assert np.array_equal(np.asarray(picture), es.make_scene(random.Random(11), sprite).pixels)
