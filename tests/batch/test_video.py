"""Videos: a row for each frame, and the tokens go to the frames that show something new."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf import ConfigError, ImageError, PruneConfig, UnsupportedError
from qap_gguf.batch.inputs import find_input
from qap_gguf.batch.rows import Defaults, read_row
from qap_gguf.batch.video import FLOOR, shares
from qap_gguf.cli import main
from qap_gguf.vision.video import frames, novelty

with_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds, five frames a second: the sample for two seconds, its mirror image for three."""
    folder = tmp_path_factory.mktemp("clip")
    image = Image.open(qap.packaged_model().sample).convert("RGB")
    for n in range(25):
        (image if n < 10 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).save(folder / f"{n:02}.png")
    path = folder / "clip.mkv"
    words = ["ffmpeg", "-v", "error", "-framerate", "5", "-i", str(folder / "%02d.png"), "-c:v", "ffv1", str(path)]
    subprocess.run(words, check=True)
    return path


@with_ffmpeg
def test_frames(clip: Path) -> None:
    """Lossless, so the pixels are those of the pictures."""
    found = list(frames(clip, 1.0))
    assert [seconds for seconds, _ in found] == [0.0, 1.0, 2.0, 3.0, 4.0]
    sample = np.asarray(Image.open(qap.packaged_model().sample).convert("RGB"))
    for seconds, frame in found:
        expected = sample if seconds < 2 else sample[:, ::-1]
        assert np.abs(frame.astype(int) - expected.astype(int)).max() <= 3  # RGB to YUV and back, if ffmpeg does it


@with_ffmpeg
def test_rows_share_the_tokens_by_what_is_new(clip: Path) -> None:
    found = find_input([clip], 1.0)
    rows = list(found.read())
    assert found.total == len(rows) == 5
    assert [row.values["id"] for row in rows] == [f"{clip}@{n}.00" for n in range(5)]
    kept = [
        read_row(row, n, Defaults("What?", config=PruneConfig(n_keep=40))).body["prune"]["n_keep"]
        for n, row in enumerate(rows)
    ]
    assert kept[0] > 40
    assert kept[1] == kept[3] == kept[4] < kept[2]
    assert abs(sum(kept) - 5 * 40) <= 5


@with_ffmpeg
def test_the_command(clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each frame is answered with its own number of tokens; a second run asks nothing."""
    out = tmp_path / "out.jsonl"
    words = ["batch", str(clip), "-o", str(out), "-p", "How many objects are there?", "--every", "1", "--ctx", "512"]
    words += ["--n-keep", "60", "--threads", "1", "--parallel", "2"]
    for _ in range(2):
        assert main(words) == 0
    rows = sorted((json.loads(line) for line in out.read_text().splitlines()), key=lambda row: str(row["id"]))
    assert [row["id"] for row in rows] == [f"{clip}@{n}.00" for n in range(5)]
    assert {row["image"] for row in rows} == {str(clip)}
    assert not any(row.get("error") for row in rows)
    assert rows[1]["kept"] == rows[3]["kept"] < rows[2]["kept"]
    assert "5 of 5 rows are known" in capfd.readouterr().err


def test_a_video_without_every_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match="--every"):
        find_input([tmp_path / "a.mp4"])
    for seconds in (0, -1, float("nan"), "1", True):
        with pytest.raises(ConfigError, match="every: expected seconds"):
            find_input([tmp_path / "a.mp4"], seconds)  # type: ignore[arg-type]


def test_a_folder_has_videos_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.mp4").write_bytes(b"")
    assert find_input([tmp_path]).total == 1
    monkeypatch.setattr(sys.modules[find_input.__module__], "novelties", lambda _path, _every: [1.0, 0.0])
    assert find_input([tmp_path], 1.0).total == 3


@with_ffmpeg
@pytest.mark.parametrize("data", [b"", b"no video", b"\x1aE\xdf\xa3" + bytes(200)])
def test_what_is_no_video(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="expected a video") as caught:
        find_input([path], 1.0)
    assert "\n" not in str(caught.value)


@with_ffmpeg
def test_frames_that_are_too_large(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="at most 1000 pixels, got 192 x 192"):
        next(frames(clip, 1.0))


def test_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="install ffmpeg"):
        next(frames(path, 1.0))
    with pytest.raises(ImageError, match="found none"):
        next(frames(tmp_path / "b.mp4", 1.0))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_shares(new: Sequence[float]) -> None:
    found = shares(new)
    assert np.mean(found) == pytest.approx(1.0)
    assert min(found) > 0
    assert max(found) / min(found) <= 1 / FLOOR * (1 + 1e-9)
    for (one, a), (other, b) in itertools.pairwise(sorted(zip(new, found, strict=True))):
        assert a <= b or one == other


def test_novelty_looks_at_cells() -> None:
    """Noise below a threshold is nothing new; a moved object is, in its cells; another size is another picture."""
    rng = np.random.default_rng(0)
    frame = rng.integers(40, 200, (96, 96, 3)).astype(np.uint8)
    noisy = (frame.astype(int) + rng.integers(-3, 4, frame.shape)).astype(np.uint8)
    moved = frame.copy()
    moved[:8, :8] = 255
    assert novelty(frame, noisy) == 0.0
    assert novelty(frame, moved) == 4 / 24**2
    assert novelty(frame, frame[:48]) == 1.0
