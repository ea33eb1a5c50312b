"""Padding is none of a tile's pixels: a letterboxed tile is flat where what it shows of the picture is.

On the packaged encoder with stock llama.cpp's tiles of 192 x 192 pixels; a picture of 384 x 96 lies in lines 144 to
240 of 2 x 2 tiles, pixel for pixel, between padding of another colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from early.test_model import N, opened
from early.test_pixels import SIDE, drop_in
from qap_gguf import _core
from qap_gguf.defaults import to_params

FLAT = qap.PruneConfig(keep_ratio=1.0, skip_flat_tiles=0)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qap.VisionModel]:
    with opened(tmp_path_factory.mktemp("tiled"), 2 * SIDE) as model:
        yield model


def banner() -> npt.NDArray[np.uint8]:
    """Noise on the left, white on the right."""
    pixels = np.random.default_rng(7).integers(0, 256, (96, 2 * SIDE, 3), dtype=np.uint8)
    pixels[:, SIDE:] = 255
    return pixels


def empty_tiles(vlm: qap.VisionModel, pixels: Any, cfg: qap.PruneConfig) -> list[int]:
    """Numbers of the chunks of a picture that were not encoded."""
    found = drop_in(vlm, pixels, cfg)
    for rows, report, n_tokens in found:
        assert len(rows) == n_tokens == len(report["indices"])
        assert not np.isin(report["indices"], report["padding"]).any()
    empty = [i for i, (_, report, _) in enumerate(found) if report["bytes_read"] == 0]
    assert all(found[i][2] == 0 for i in empty)
    return empty


def test_padding_does_not_make_a_tile_show_something(tiled: qap.VisionModel) -> None:
    assert empty_tiles(tiled, banner(), FLAT) == [1, 3]
    assert empty_tiles(tiled, banner(), FLAT.replace(encoder_keep=0.5)) == [1, 3]
    assert empty_tiles(tiled, banner(), FLAT.replace(duplicates=0)) == [1, 3]
    assert empty_tiles(tiled, banner(), FLAT.replace(skip_flat_tiles=None)) == []
    assert empty_tiles(tiled, np.full((96, 2 * SIDE, 3), 9, np.uint8), FLAT) == [0, 1, 2, 3]  # never the overview


@pytest.mark.parametrize(
    ("line", "column", "tile"), [(0, SIDE, 1), (0, -1, 1), (47, SIDE, 1), (48, -1, 3), (95, SIDE, 3), (95, -1, 3)]
)
def test_every_pixel_of_the_picture_counts(tiled: qap.VisionModel, line: int, column: int, tile: int) -> None:
    pixels = banner()
    pixels[line, column, 1] = 254
    assert empty_tiles(tiled, pixels, FLAT) == [4 - tile]
    assert empty_tiles(tiled, pixels, FLAT.replace(skip_flat_tiles=1)) == [1, 3]


def test_a_tile_of_padding_alone_is_flat(tiled: qap.VisionModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On 3 x 3 tiles the upper and the lower three show nothing of a thin picture of noise."""
    thin = np.random.default_rng(0).integers(0, 256, (8, 400, 3), dtype=np.uint8)
    with opened(tmp_path_factory.mktemp("thin"), 3 * SIDE) as model:
        assert empty_tiles(model, thin, FLAT) == [0, 1, 2, 6, 7, 8]
        with qap.use(None):
            chunks = model._encoder._native.tokenize(_core.media_marker(), [thin], False, True)
        tiles = [chunk for chunk in chunks if chunk.is_image]
        features, reports = model._encoder._encode_tiles(tiles, False, to_params(FLAT))
        assert [bool(rows.any()) for rows in features] == [False] * 3 + [True] * 3 + [False] * 3 + [True]
        assert [len(report["padding"]) == N for report in reports] == [not rows.any() for rows in features]


@pytest.mark.parametrize("merge", ["none", "average"])
def test_both_paths_merge_alike(tiled: qap.VisionModel, merge: str) -> None:
    """Tile by tile, since VisionModel takes no tiles of this model: what is left out is merged into nothing."""
    cfg = FLAT.replace(keep_ratio=0.125, duplicates=3, merge=merge)
    with qap.use(None):
        chunks = tiled._encoder._native.tokenize(_core.media_marker(), [banner()], False, True)
    tiles = [chunk for chunk in chunks if chunk.is_image]
    features, reports = tiled._encoder._encode_tiles(tiles, False, to_params(cfg))
    for (kept, report, n_tokens), rows, noted in zip(drop_in(tiled, banner(), cfg), features, reports, strict=True):
        early = np.arange(N) if noted["early"] is None else noted["early"]
        out = np.setdiff1d(np.arange(N), np.setdiff1d(early, noted["padding"]))
        found = _core.prune(
            rows=rows, n_planes=1, special=[], padding=out.tolist(), attention=noted["attention"],
            received=noted["received"], prompt=None, prompt_semantic="none", params=to_params(cfg), n_keep=n_tokens,
            device=None, n_threads=1, channel_weights=None,
        )  # fmt: skip
        np.testing.assert_array_equal(found["indices"], report["indices"])
        np.testing.assert_allclose(found["rows"], kept, rtol=1e-5, atol=1e-6)
