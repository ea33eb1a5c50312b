"""What the pixels say before an encode: duplicates are left out of the tower, flat tiles are not encoded at all.

On the packaged model, whose encoder takes 192 x 192 pixels as 12 x 12 tokens; which tokens repeat others is found here
in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from early.test_model import N, opened, report_of
from qap_gguf import _core
from qap_gguf.defaults import from_params, to_params
from qap_gguf.vision.encoder import ImageEncoder

SIDE, CELL = 192, 16
LEVELS = [0, 2, 4, 255]

Pixels = npt.NDArray[np.uint8]


def page() -> Pixels:
    """Paper, of one colour above, nearly so in the middle, less so below, and noise in two places."""
    rng = np.random.default_rng(1)
    pixels = np.full((SIDE, SIDE, 3), 250, np.uint8)
    pixels[96:144] = rng.integers(249, 251, (48, SIDE, 3), dtype=np.uint8)
    pixels[144:] = rng.integers(247, 251, (48, SIDE, 3), dtype=np.uint8)
    pixels[32:80, 32:112] = rng.integers(0, 256, (48, 80, 3), dtype=np.uint8)
    pixels[112:128, 112:144] = rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)
    pixels[160:176, :32] = pixels[112:128, 112:144]  # two that are repeated
    return pixels


def distinct(pixels: Pixels, level: int) -> list[int]:
    """Tokens that repeat no earlier one of the result."""
    cells = pixels.reshape(12, CELL, 12, CELL, 3).swapaxes(1, 2).reshape(N, -1).astype(int)
    kept: list[int] = []
    for token in range(N):
        if all(abs(cells[token] - cells[other]).max() > level for other in kept):
            kept.append(token)
    return kept


@pytest.fixture(scope="module")
def vlm() -> Iterator[qap.VisionModel]:
    with qap.VisionModel(n_threads=1) as model:
        yield model


def drop_in(vlm: qap.VisionModel, pixels: Any, cfg: qap.PruneConfig) -> list[tuple[Any, dict[str, Any], int]]:
    """Rows, report and the number of tokens before the encode of each chunk of a picture."""
    with qap.use(cfg):
        found = vlm._encoder._native.tokenize(_core.media_marker(), [pixels], False, True)
    rows = []
    for chunk in (chunk for chunk in found if chunk.is_image):
        n_tokens = chunk.n_tokens
        rows.append((vlm._encoder._native.encode(chunk, False), report_of(chunk), n_tokens))
    return rows


def test_levels_make_a_difference() -> None:
    counts = [len(distinct(page(), level)) for level in LEVELS]
    assert counts[0] > counts[1] > counts[2] > counts[3] == 1
    assert counts[2] == 15 + 2 + 1  # the noise, and paper


@pytest.mark.parametrize("level", LEVELS)
def test_duplicates_are_left_out_in_both_paths(vlm: qap.VisionModel, level: int) -> None:
    pixels, expected = page(), distinct(page(), level)
    cfg = qap.PruneConfig(keep_ratio=0.25, duplicates=level)
    image = vlm.encode(pixels, cfg)
    assert image.kept_early is not None
    assert image.kept_early.tolist() == expected
    assert (image.n_real, image.n_left, image.duplicates) == (N, len(expected), level)
    for values in (image.features, image.attention, image.received):
        assert values is not None
        assert not values[image.dropped].any()
        assert values[image.kept_early].all(axis=-1).all()
    cut = vlm.prune(image, cfg)
    assert len(cut.indices) == min(36, len(expected))
    for _ in range(2):  # the second time the image cache has the picture
        ((rows, report, n_tokens),) = drop_in(vlm, pixels, cfg)
        assert n_tokens == len(rows) == report["n_keep"] == len(cut.indices)  # known before the encode
        np.testing.assert_array_equal(report["early"], expected)
        np.testing.assert_array_equal(report["indices"], cut.indices)
        np.testing.assert_array_equal(rows, cut.features)
        for name in ("error", "outlier", "sensitivity", "semantic", "total"):
            np.testing.assert_allclose(report[name], getattr(cut.scores, name), rtol=1e-5, atol=1e-6)


def test_a_picture_without_duplicates_is_encoded_as_ever(vlm: qap.VisionModel) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = vlm.encode(noise, qap.PruneConfig(duplicates=8))
    assert image.kept_early is None
    np.testing.assert_array_equal(image.features, vlm.encode(noise).features)


def test_padding_goes_with_the_duplicates(vlm: qap.VisionModel) -> None:
    wide = np.random.default_rng(3).integers(0, 256, (90, 300, 3), dtype=np.uint8)
    wide[:, 100:] = 255
    cfg = qap.PruneConfig(keep_ratio=1.0, duplicates=0)
    dense, image = vlm.encode(wide), vlm.encode(wide, cfg)
    np.testing.assert_array_equal(image.padding, dense.padding)
    assert dense.padding.any()
    assert image.dropped[dense.padding].all()
    assert 1 < image.n_left < dense.n_real
    ((rows, report, n_tokens),) = drop_in(vlm, wide, cfg)
    assert n_tokens == image.n_left
    np.testing.assert_array_equal(report["indices"], image.kept_early)
    np.testing.assert_array_equal(rows, image.features[image.kept_early])


def test_an_answer_reads_what_is_left(vlm: qap.VisionModel) -> None:
    cfg = qap.PruneConfig(n_keep=N, duplicates=4)
    n_left = len(distinct(page(), 4))
    answer = vlm.generate([page(), "How many objects are there?"], prune=cfg, max_tokens=1, stream=True)
    assert (answer.stats.n_image_tokens, answer.stats.n_image_kept) == (N, n_left)
    logits = vlm.last_logits()
    answer.close()
    image = vlm.encode(page(), cfg)
    answer = vlm.generate([image, "How many objects are there?"], prune=None, max_tokens=1, stream=True)
    assert answer.stats.n_image_kept == n_left
    np.testing.assert_array_equal(vlm.last_logits(), logits)
    answer.close()


def test_what_fits_is_known_before_the_encode() -> None:
    cfg = qap.PruneConfig(n_keep=N, duplicates=4)
    with qap.VisionModel(n_threads=1, n_ctx=96) as model:
        for prune in (None, cfg.replace(duplicates=None), cfg.replace(duplicates=0)):
            with pytest.raises(qap.ConfigError, match=r"expected at most 96 tokens \(n_ctx\), got 1\d\d"):
                model.generate([page(), "How many?"], prune=prune)
        assert model.n_encodes == 0
        for picture in (page(), model.encode(page(), cfg)):
            answer = model.generate([picture, "How many?"], prune=cfg, max_tokens=1, stream=True)
            assert answer.stats.n_image_kept == len(distinct(page(), 4))
            answer.close()
        answer = model.generate([picture, "How many?"], prune=None, max_tokens=1, stream=True)
        assert answer.stats.n_image_kept == len(distinct(page(), 4))
        answer.close()
        assert model.n_encodes == 1


def test_a_picture_that_fits_in_any_case_is_not_prepared_twice(
    vlm: qap.VisionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*_: Any) -> int:
        raise AssertionError("pixels were looked at before the encode, though all tokens would fit")

    monkeypatch.setattr(ImageEncoder, "count_left", counted)
    cfg = qap.PruneConfig(n_keep=9, duplicates=4)
    assert vlm.generate([page(), "How many?"], prune=cfg, max_tokens=1)
    (pixels,) = vlm.load_fitting([page()], cfg, "How many?")
    np.testing.assert_array_equal(pixels, page())


def test_caches_tell_levels_apart(tmp_path: Path) -> None:
    cfg = qap.PruneConfig(n_keep=9, duplicates=2)
    others = [cfg.replace(duplicates=4), cfg.replace(duplicates=None), cfg.replace(skip_flat_tiles=3)]
    with qap.VisionModel(n_threads=1, cache=qap.EmbeddingCache(folder=tmp_path)) as model:
        first = model.encode(page(), cfg)
        for other in others:
            model.encode(page(), other)
        assert model.n_encodes == 1 + len(others)
        assert model.encode(page(), cfg.replace(alpha=0.1, select="topk", encoder_layer=3)) is first
        model.cache.clear()
        again = model.encode(page(), cfg)
        assert model.n_encodes == 1 + len(others)
        assert (again.pieces, again.duplicates, again.skip_flat_tiles) == (first.pieces, 2, None)
        for found in (model.encode(page()), model.encode(page(), others[0])):
            with pytest.raises(qap.ConfigError, match="duplicates: expected an image that was encoded with 2, got one"):
                model.prune(found, cfg)
        # the cache of stock handlers, in any order
        order = [cfg, *others, None, cfg, others[0]]
        qap.set_image_cache(0)
        try:
            expected = [drop_in(model, page(), other)[0][0] for other in order if other]
            qap.set_image_cache(None)
            for _ in range(2):
                for other, rows in zip([o for o in order if o], expected, strict=True):
                    np.testing.assert_array_equal(drop_in(model, page(), other)[0][0], rows)
        finally:
            qap.set_image_cache(None)


# --- flat tiles -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qap.VisionModel]:
    with opened(tmp_path_factory.mktemp("tiled"), 2 * SIDE) as model:
        yield model


def tiles_page(shade: int = 0) -> Pixels:
    """Four tiles: noise, paper, paper of another grey with `shade` levels of structure, noise."""
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    pixels[:SIDE, SIDE:] = 255
    pixels[SIDE:, :SIDE] = rng.integers(100, 101 + shade, (SIDE, SIDE, 3), dtype=np.uint8)
    return pixels


@pytest.mark.parametrize(("shade", "level", "flat"), [(0, 0, 2), (6, 2, 1), (6, 3, 2), (6, None, 0)])
def test_flat_tiles_keep_nothing_and_share_their_budget(
    tiled: qap.VisionModel, shade: int, level: int | None, flat: int
) -> None:
    pixels = tiles_page(shade)
    budgets: list[dict[str, Any]] = [
        {"n_keep": 50},
        {"keep_ratio": 1.0},
        {"n_keep": 60, "encoder_keep": 0.5},
        {"keep_ratio": 0.25},
    ]
    for more in budgets:
        cfg = qap.PruneConfig(skip_flat_tiles=level, **more)
        found = drop_in(tiled, pixels, cfg)
        assert len(found) == 5
        lefts = [N if report["early"] is None else len(report["early"]) for _, report, _ in found]
        empty = [i for i, left in enumerate(lefts) if left == 0]
        assert len(empty) == flat
        assert empty == [i for i, (rows, _, _) in enumerate(found) if len(rows) == 0]
        assert set(empty) <= {1, 2}  # the overview is the last
        assert sum(n_tokens for _, _, n_tokens in found) == min(cfg.count(5 * N), sum(lefts))
        assert sum(lefts) == (5 - flat) * cfg.count_early(N)
        for i, (rows, report, n_tokens) in enumerate(found):
            assert len(rows) == n_tokens == len(report["indices"])
            assert np.isfinite(rows).all()
            assert (report["bytes_read"] == 0) == (i in empty)  # it was not encoded
            assert report["total"].any() == (i not in empty)
        if "encoder_keep" not in more:  # the other tiles' rows are those of the picture without the option
            whole = drop_in(tiled, pixels, qap.PruneConfig(keep_ratio=1.0))
            for (rows, report, _), (all_rows, _, _) in zip(found, whole, strict=True):
                np.testing.assert_array_equal(rows, all_rows[report["indices"]])


def test_a_blank_picture_still_has_its_overview(tiled: qap.VisionModel) -> None:
    white = np.full((2 * SIDE, 2 * SIDE, 3), 255, np.uint8)
    cfg = qap.PruneConfig(keep_ratio=1.0, skip_flat_tiles=0)
    assert [n_tokens for _, _, n_tokens in drop_in(tiled, white, cfg)] == [0, 0, 0, 0, N]
    assert [n_tokens for _, _, n_tokens in drop_in(tiled, white, cfg.replace(duplicates=0))] == [0, 0, 0, 0, 1]
    # a picture of one piece is no tile
    with qap.VisionModel(n_threads=1) as plain:
        assert [n_tokens for _, _, n_tokens in drop_in(plain, white, cfg)] == [N]


def test_captured_flat_tiles_are_zeros_and_the_overview_is_not(tiled: qap.VisionModel) -> None:
    """What VisionModel does; stock LLaVA tiles it refuses itself."""
    white = np.full((2 * SIDE, 2 * SIDE, 3), 255, np.uint8)
    with qap.use(None):
        found = tiled._encoder._native.tokenize(_core.media_marker(), [white], False, True)
    tiles = [chunk for chunk in found if chunk.is_image]
    assert [tile.is_tile for tile in tiles] == [True] * 4 + [False]
    params = to_params(qap.PruneConfig(skip_flat_tiles=0))
    for order in (tiles, tiles[::-1]):
        features, reports = tiled._encoder._encode_tiles(order, False, params)
        for tile, rows, report in zip(order, features, reports, strict=True):
            assert rows.shape[0] == N
            assert rows.any() == (not tile.is_tile)
            assert (report["early"] is None) == (not tile.is_tile)
    features, _ = tiled._encoder._encode_tiles(tiles, False, None)
    assert all(rows is features[0] for rows in features[:4])  # encoded once


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["skip_flat_tiles", "duplicates"])
def test_settings_travel_and_have_a_range(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in (0, 255):
        cfg = qap.PruneConfig(**{name: level})  # type: ignore[arg-type]
        assert from_params(to_params(cfg)) == cfg
        assert qap.PruneConfig.from_metadata(cfg.to_metadata()) == cfg
        monkeypatch.setenv(f"QAP_{name.upper()}", str(level))
        assert qap.get_default() == cfg
    assert f"qap.{name}" not in qap.PruneConfig().to_metadata()  # earlier versions read such files still
    for bad in (-1, 256, 1.5, True, "3"):
        with pytest.raises(qap.ConfigError, match=f"{name} must be an integer in 0..255"):
            qap.PruneConfig(**{name: bad})  # type: ignore[arg-type]
    for text in ("256", "-1", "few", "1.5"):
        monkeypatch.setenv(f"QAP_{name.upper()}", text)
        with pytest.raises(qap.ConfigError, match=rf"expected a whole number in 0\.\.255, or off, got '{text}'"):
            qap.get_default()
    monkeypatch.setenv(f"QAP_{name.upper()}", "off")
    assert qap.get_default() == qap.PruneConfig()
    monkeypatch.delenv(f"QAP_{name.upper()}")
    files, cfg = qap.packaged_model(), qap.PruneConfig(**{name: 7})  # type: ignore[arg-type]
    keyed = qap.annotate(files.mmproj, tmp_path / "keyed.gguf", cfg)
    with qap.VisionModel(keyed, files.model, n_threads=1) as model:
        assert model.file_config == cfg


def test_duplicates_and_an_early_drop_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(qap.ConfigError, match=r"duplicates: expected encoder_keep 1 beside it, got 0\.5; use one of"):
        qap.PruneConfig(duplicates=0, encoder_keep=0.5)
    monkeypatch.setenv("QAP_DUPLICATES", "0")
    monkeypatch.setenv("QAP_ENCODER_KEEP", "0.5")
    with pytest.raises(qap.ConfigError, match=r"duplicates: expected encoder_keep 1 beside it, got 0\.5"):
        qap.get_default()


def test_an_encoder_that_needs_all_patches_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    with (
        qap.VisionModel(n_threads=1) as stock,
        pytest.raises(qap.UnsupportedError, match=r"duplicates: QAP_STOCK_ENCODER=1 asks for .* or leave it out"),
    ):
        stock.encode(page(), qap.PruneConfig(duplicates=0))
