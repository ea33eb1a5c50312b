"""What a console and a notebook show: one short line, and the picture with its kept patches where it is known."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf.vision.images import load_image
from qap_gguf.vision.store import pack, unpack
from qap_gguf.vision.thumbnail import MAX_BYTES, SIDE, read_thumbnail, thumbnail

SAMPLE = qap.packaged_model().sample
KEY = "0" * 64


@pytest.fixture(scope="module")
def shown() -> tuple[qap.ImageEmbedding, qap.PrunedImage, qap.Scores, str]:
    with qap.VisionModel(n_threads=1) as vlm:
        image = vlm.encode(SAMPLE)
        cfg = qap.PruneConfig(n_keep=36)
        return image, vlm.prune(image, cfg), vlm.score(image, cfg), repr(vlm)


def test_short_lines(shown: tuple[qap.ImageEmbedding, qap.PrunedImage, qap.Scores, str]) -> None:
    image, cut, scores, model = shown
    assert repr(image) == "ImageEmbedding(144 tokens (12 x 12) of 256 numbers, picture of 192 x 192 pixels)"
    assert repr(cut) == "PrunedImage(36 of 144 tokens kept, alpha 0.7)"
    assert repr(scores) == repr(cut.scores) == "Scores(144 tokens, alpha 0.7)"
    assert model == "VisionModel(mmproj-f16.gguf, tiny-llava-Q4_0.gguf, n_ctx=2048)"
    assert repr(qap.PruneConfig()) == "PruneConfig(keep_ratio=0.25)"
    cfg = qap.PruneConfig(n_keep=64, alpha="dynamic", merge="average")
    assert repr(cfg) == "PruneConfig(n_keep=64, alpha='dynamic', merge='average')"
    for one in (cfg, qap.PruneConfig(), qap.PruneConfig(keep_ratio=0.5, seed=3)):
        assert eval(repr(one), {"PruneConfig": qap.PruneConfig}) == one  # noqa: S307 (our own text)
    assert repr(qap.EmbeddingCache()) == "EmbeddingCache(0 images, 0.0 MiB, folder None)"


def opened(png: bytes | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_kept_patches_are_clear_and_the_others_dimmed(
    shown: tuple[qap.ImageEmbedding, qap.PrunedImage, qap.Scores, str],
) -> None:
    image, cut, _, _ = shown
    whole, part = opened(image._repr_png_()), opened(cut._repr_png_())
    assert whole.shape == part.shape == (360, 360, 3)
    patches = [array.reshape(12, 30, 12, 30, 3).swapaxes(1, 2).reshape(144, -1) for array in (whole, part)]
    same = (patches[0] == patches[1]).all(axis=1)
    assert np.flatnonzero(same).tolist() == cut.indices.tolist()
    assert patches[1][~same].max() < 130  # dark, and grey
    plain = load_image(SAMPLE).astype(float)
    small = read_thumbnail(image.thumbnail).astype(float) if image.thumbnail is not None else np.zeros(1)
    assert np.abs(plain - small).mean() < 5


def test_scores_as_a_map(shown: tuple[qap.ImageEmbedding, qap.PrunedImage, qap.Scores, str]) -> None:
    scores = shown[2]
    found = opened(scores._repr_png_()).reshape(12, 30, 12, 30, 3)[:, 0, :, 0].reshape(144, 3).astype(float)
    order = np.argsort(scores.total)
    light = found @ [0.299, 0.587, 0.114]
    assert np.corrcoef(light[order], np.sort(scores.total))[0, 1] > 0.98
    flat = dataclasses.replace(scores, total=np.full(144, 0.25, np.float32))
    assert len(np.unique(opened(flat._repr_png_()).reshape(-1, 3), axis=0)) == 1


def test_html(shown: tuple[qap.ImageEmbedding, qap.PrunedImage, qap.Scores, str]) -> None:
    for thing in shown[:3]:
        text = thing._repr_html_()
        assert text is not None
        assert text.startswith("<figure><img ")
        assert 'src="data:image/png;base64,' in text
        assert "tokens" in text.rpartition("<figcaption>")[2]


def test_where_nothing_is_known() -> None:
    """Made by hand, or of tiles: no picture, and no error."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((12, 8)).astype(np.float32)
    bare = qap.ImageEmbedding(features, (3, 4), None, (40, 30), 0.0)
    assert bare._repr_png_() is None
    assert bare._repr_html_() is None
    assert qap.score(features)._repr_png_() is None
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    tiles = dataclasses.replace(bare, grid=(1, 12), pieces=(), thumbnail=thumbnail(pixels))
    assert opened(tiles._repr_png_()).shape == (30, 40, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (319, 320), (321, 7), (3000, 2000)])
def test_thumbnails(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    small = thumbnail(pixels)
    assert small.dtype == np.uint8
    assert small.nbytes <= MAX_BYTES
    found = read_thumbnail(small)
    assert max(found.shape[:2]) == min(SIDE, max(size))
    assert min(found.shape[:2]) >= 1


def test_they_outlive_the_process(shown: tuple[qap.ImageEmbedding, qap.PrunedImage, qap.Scores, str]) -> None:
    found = unpack(KEY, pack(KEY, shown[0]))
    assert found._repr_png_() == shown[0]._repr_png_()


WITHOUT = """
import sys
sys.modules["matplotlib"] = None
import qap_gguf as qap
with qap.VisionModel(n_threads=1) as vlm:
    cut = vlm.prune(vlm.encode(qap.packaged_model().sample), qap.PruneConfig(n_keep=18))
print(len(cut._repr_png_()), len(cut.scores._repr_png_()))
"""


def test_without_matplotlib(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert all(int(word) > 1000 for word in done.stdout.split())
