"""Early drop in VisionModel and in the drop-in path, on the packaged model: 144 tokens, CLIP's class token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.vision.images import load_image

N = 144
HALF = qap.PruneConfig(n_keep=18, encoder_keep=0.5)


@pytest.fixture(scope="module")
def vlm() -> Iterator[qap.VisionModel]:
    with qap.VisionModel(n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def pixels() -> Any:
    return load_image(qap.packaged_model().sample)


def drop_in(vlm: qap.VisionModel, pixels: Any, cfg: qap.PruneConfig) -> tuple[Any, dict[str, Any]]:
    """Rows and report of a picture that is pruned while the prompt is tokenized."""
    with qap.use(cfg):
        (chunk,) = vlm._encoder._native.tokenize(_core.media_marker(), [pixels], False, True)
    assert chunk.n_tokens == cfg.count(N)  # known before the encode
    rows = vlm._encoder._native.encode(chunk, False)
    report = chunk.report()
    assert report is not None
    return rows, report


def test_one_is_bit_equal_to_no_early_drop(vlm: qap.VisionModel, pixels: Any) -> None:
    dense = vlm.encode(pixels)
    assert vlm.encode(pixels, qap.PruneConfig(encoder_keep=1.0)) is dense
    assert dense.kept_early is None
    all_of_them = vlm._encoder.encode(pixels, hidden=False, early=qap.PruneConfig(encoder_keep=1.0, encoder_layer=1))
    assert np.array_equal(all_of_them.features, dense.features)
    rows, report = drop_in(vlm, pixels, qap.PruneConfig(n_keep=N, encoder_keep=0.5))  # all N are needed at the end
    assert report["early"] is None
    assert np.array_equal(rows, dense.features)


def test_what_is_left_says_which_tokens_it_is(vlm: qap.VisionModel, pixels: Any) -> None:
    image = vlm.encode(pixels, HALF)
    assert (image.n_tokens, image.n_total, image.grid, image.features.shape[0]) == (72, N, (12, 12), 72)
    kept = image.kept_early
    assert kept is not None
    assert kept.dtype == np.int32
    assert np.all(np.diff(kept) > 0)
    assert 0 <= kept[0] < kept[-1] < N
    assert image.attention is not None
    assert image.attention.shape == (72,)
    cut = vlm.prune(image, HALF)
    assert len(cut.indices) == 18
    assert set(cut.indices) <= set(kept)
    assert cut.n_total == N
    np.testing.assert_array_equal(cut.features, image.features[np.isin(kept, cut.indices)])
    assert not np.array_equal(image.features, vlm.encode(pixels).features[kept])  # the later layers saw fewer


def test_with_all_that_is_left_nothing_is_chosen_anymore(vlm: qap.VisionModel, pixels: Any) -> None:
    cfg = HALF.replace(n_keep=72)
    image = vlm.encode(pixels, cfg)
    np.testing.assert_array_equal(vlm.prune(image, cfg).indices, image.kept_early)
    rows, report = drop_in(vlm, pixels, cfg)
    np.testing.assert_array_equal(report["indices"], image.kept_early)
    np.testing.assert_array_equal(rows, image.features)
    assert report["total"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_layer": 3},
        {"encoder_keep": 0.2, "select": "topk"},
        {"semantic": "attention", "error": "q4_0", "alpha": "dynamic"},
        {"merge": "average"},
        {"n_keep": 100},
    ],
    ids=str,
)
def test_the_drop_in_path_keeps_what_the_vision_model_keeps(
    vlm: qap.VisionModel, pixels: Any, changes: dict[str, Any]
) -> None:
    cfg = HALF.replace(**changes)
    image = vlm.encode(pixels, cfg)
    assert image.n_tokens == cfg.count_early(N)
    cut = vlm.prune(image, cfg)
    rows, report = drop_in(vlm, pixels, cfg)
    assert report["n_total"] == N
    np.testing.assert_array_equal(report["early"], image.kept_early)
    np.testing.assert_array_equal(report["indices"], cut.indices)
    np.testing.assert_allclose(rows, cut.features, rtol=1e-4, atol=1e-5)
    if cfg.merge == "none":  # the rows, their signals and scores, and what the drop itself gives out
        cosines = 0 if cfg.select == "topk" else image.n_tokens**2
        values = rows.size + 6 * image.n_tokens + cosines + (cfg.alpha == "dynamic") + image.n_tokens + N
        assert report["bytes_read"] == (
            4 * values if image.n_tokens > len(rows) else 4 * (values - 5 * len(rows) - cosines)
        )


def test_an_answer_takes_the_cells_of_what_is_kept(vlm: qap.VisionModel, pixels: Any) -> None:
    cells = []
    for cfg in (HALF, HALF.replace(encoder_keep=1.0)):
        answer = vlm.generate([pixels, "How many objects are there?"], prune=cfg, max_tokens=1, stream=True)
        assert (answer.stats.n_image_tokens, answer.stats.n_image_kept) == (N, 18)
        cells.append(answer.stats.n_kv)
        answer.close()
    assert cells[0] == cells[1]
    image = vlm.encode(pixels, HALF)
    answer = vlm.generate([image, "How many objects are there?"], max_tokens=1, stream=True)  # all that is left
    assert (answer.stats.n_image_kept, answer.stats.n_kv) == (72, cells[0] + 72 - 18)
    answer.close()


def test_the_cache_tells_drops_apart(pixels: Any, tmp_path: Path) -> None:
    with qap.VisionModel(n_threads=1, cache=qap.EmbeddingCache(folder=tmp_path)) as vlm:
        found = [
            vlm.encode(pixels, cfg) for cfg in (None, HALF, HALF.replace(encoder_layer=2), HALF.replace(alpha=0.5))
        ]
        assert vlm.encode(pixels, HALF.replace(select="topk")) is found[1]  # it matters at the end only
        assert vlm.n_encodes == len(found)
        vlm.cache.clear()
        again = vlm.encode(pixels, HALF)
        assert vlm.n_encodes == len(found)
        assert again is not found[1]
        assert again.pieces == found[1].pieces
        np.testing.assert_array_equal(again.kept_early, found[1].kept_early)


def test_what_cannot_be_is_one_line(vlm: qap.VisionModel, pixels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quarter = qap.PruneConfig(n_keep=18, encoder_keep=0.25)
    with pytest.raises(qap.ConfigError, match=r"at most the 36 tokens that the encoder left, got 72; encode"):
        vlm.prune(vlm.encode(pixels, quarter), qap.PruneConfig(n_keep=72))
    with pytest.raises(qap.ConfigError, match=r"expected an image that was encoded with it, .* pass the same config"):
        vlm.prune(vlm.encode(pixels), quarter)
    with pytest.raises(qap.ConfigError, match=r"encoder_layer: expected a number in 1\.\.\d+ for an encoder that runs"):
        vlm.encode(pixels, quarter.replace(encoder_layer=99))
    with pytest.raises(qap.ConfigError, match="at most the 144 tokens of this image, got 145"):
        vlm.encode(pixels, quarter.replace(n_keep=N + 1))
    with (
        qap.use(quarter.replace(encoder_layer=99)),
        pytest.raises(ValueError, match="encoder_layer: expected a number"),
    ):
        vlm._encoder._native.tokenize(_core.media_marker(), [pixels], False, True)
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    with pytest.raises(qap.UnsupportedError, match="encoder_keep: QAP_STOCK_ENCODER=1 asks for upstream's encoder"):
        vlm._encoder.encode(pixels, hidden=False, early=quarter)


@pytest.mark.parametrize("bad", [{"encoder_keep": 0}, {"encoder_keep": 1.5}, {"encoder_layer": 0}])
def test_values_outside_their_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(qap.ConfigError, match=next(iter(bad))):
        qap.PruneConfig(**bad)


def test_the_config_travels_through_native_parameters_and_metadata() -> None:
    cfg = qap.PruneConfig(encoder_keep=0.3, encoder_layer=4)
    assert qap.PruneConfig.from_metadata(cfg.to_metadata()) == cfg
    auto = cfg.replace(encoder_layer=None)
    assert qap.PruneConfig.from_metadata(auto.to_metadata()) == auto
    assert not [key for key in qap.PruneConfig().to_metadata() if "encoder" in key]  # earlier versions read them still
    qap.set_default(cfg)
    try:
        params = _core.get_default()
        assert params is not None
        assert qap.defaults.from_params(params) == cfg
    finally:
        qap.set_default(None)
