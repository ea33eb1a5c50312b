"""Early drop in VisionModel and in the drop-in path, on the packaged model: 144 tokens, CLIP's class token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.gguf_copy import rewrite
from qap_gguf import _core, reference
from qap_gguf.defaults import to_params
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
    rows = vlm._encoder._native.encode(chunk, False)
    report = chunk.report()
    assert report is not None
    n_real = report["n_total"] - len(report["padding"])
    assert chunk.n_tokens == report["n_keep"] == len(rows) == cfg.count(n_real)  # known before the encode
    return rows, report


def report_of(chunk: _core.Chunk) -> dict[str, Any]:
    report = chunk.report()
    assert report is not None
    return report


def same_in_both(vlm: qap.VisionModel, pixels: Any, cfg: qap.PruneConfig) -> tuple[Any, dict[str, Any]]:
    """The drop-in path keeps what VisionModel keeps, to the last bit: embedding and report."""
    image = vlm.encode(pixels, cfg)
    cut = vlm.prune(image, cfg)
    rows, report = drop_in(vlm, pixels, cfg)
    np.testing.assert_array_equal(report["early"], image.kept_early)
    np.testing.assert_array_equal(report["indices"], cut.indices)
    np.testing.assert_array_equal(rows, cut.features)
    for name in ("error", "outlier", "sensitivity", "semantic", "total"):
        found = np.zeros(N, np.float32) if report[name] is None else report[name]  # no signal
        np.testing.assert_allclose(found, getattr(cut.scores, name), rtol=1e-5, atol=1e-6)
        assert not found[image.dropped].any()
    return image, report


def test_one_is_bit_equal_to_no_early_drop(vlm: qap.VisionModel, pixels: Any) -> None:
    dense = vlm.encode(pixels)
    assert vlm.encode(pixels, qap.PruneConfig(encoder_keep=1.0)) is dense
    assert dense.kept_early is None
    assert not dense.dropped.any()
    all_of_them = vlm._encoder.encode(pixels, hidden=False, early=qap.PruneConfig(encoder_keep=1.0, encoder_layer=1))
    assert np.array_equal(all_of_them.features, dense.features)
    nearly_one = vlm._encoder.encode(pixels, hidden=False, early=qap.PruneConfig(encoder_keep=1 - 1e-6))
    assert nearly_one.kept_early is None  # ceil() leaves all
    assert np.array_equal(nearly_one.features, dense.features)
    rows, report = drop_in(vlm, pixels, qap.PruneConfig(n_keep=N, encoder_layer=2))
    assert report["early"] is report["early_total"] is None
    assert np.array_equal(rows, dense.features)


def test_what_is_left_says_which_tokens_it_is(vlm: qap.VisionModel, pixels: Any) -> None:
    image = vlm.encode(pixels, HALF)
    assert (image.n_tokens, image.n_real, image.n_left, image.grid) == (N, N, 72, (12, 12))
    kept = image.kept_early
    assert kept is not None
    assert kept.dtype == np.int32
    assert kept.shape == (72,)
    assert np.all(np.diff(kept) > 0)
    np.testing.assert_array_equal(np.flatnonzero(~image.dropped), kept)
    for values in (image.features, image.attention, image.received):
        assert values is not None
        assert not values[image.dropped].any()
        assert values[kept].all(axis=-1).all()
    cut = vlm.prune(image, HALF)
    assert (len(cut.indices), cut.n_total) == (18, N)
    assert set(cut.indices) <= set(kept)
    np.testing.assert_array_equal(cut.scores.dropped, image.dropped)
    np.testing.assert_array_equal(cut.features, image.features[cut.indices])
    assert not np.array_equal(image.features[kept], vlm.encode(pixels).features[kept])  # the later layers saw fewer


@pytest.mark.parametrize("letterboxed", [False, True])
def test_coverage_counts_what_was_dropped(vlm: qap.VisionModel, pixels: Any, letterboxed: bool) -> None:
    image = vlm.encode(wide_picture() if letterboxed else pixels, HALF)
    left, dropped = np.flatnonzero(~(image.dropped | image.padding)), np.flatnonzero(image.dropped & ~image.padding)
    assert image.dropped_total is not None
    assert image.dropped_near is not None
    assert (len(image.dropped_total), len(image.dropped_near)) == (len(dropped), len(left) * len(dropped))
    assert len(left) + len(dropped) == image.n_real
    others = image.dropped_total, image.dropped_near.reshape(len(left), -1)
    alone = dataclasses.replace(image, dropped_total=None, dropped_near=None)
    for n_keep in (1, 9, 20):
        cfg = HALF.replace(n_keep=n_keep, select="coverage")
        total, x = vlm.score(image, cfg).total[left], image.features[left]
        for shown, given in ((image, others), (alone, None)):
            chosen = reference.select(total, n_keep, "coverage", features=x, dropped=given)
            np.testing.assert_array_equal(vlm.prune(shown, cfg).indices, left[chosen])
        topk = cfg.replace(select="topk")
        np.testing.assert_array_equal(vlm.prune(image, topk).indices, vlm.prune(alone, topk).indices)
    cfg = HALF.replace(n_keep=9)
    assert not np.array_equal(vlm.prune(image, cfg).indices, vlm.prune(alone, cfg).indices)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_layer": 3},
        {"encoder_keep": 0.2, "select": "topk"},
        {"semantic": "attention", "error": "q4_0", "alpha": "dynamic"},
        {"merge": "average"},
        {"n_keep": 72},
        {"keep_ratio": 0.9},
        {"select": "coverage", "semantic": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("letterboxed", [False, True])
def test_the_drop_in_path_keeps_what_the_vision_model_keeps(
    vlm: qap.VisionModel, pixels: Any, changes: dict[str, Any], letterboxed: bool
) -> None:
    cfg = HALF.replace(**changes)
    shown = wide_picture() if letterboxed else pixels
    for _ in range(2):  # the second time the image cache has the picture
        image, report = same_in_both(vlm, shown, cfg)
    assert image.n_left == cfg.count_early(image.n_real)
    assert report["n_total"] == N


def wide_picture() -> Any:
    """One that is letterboxed: 12 x 12 tokens, of which some lines are padding. Noise, so that padding stands out."""
    return np.random.default_rng(3).integers(0, 256, (90, 300, 3), dtype=np.uint8)


@pytest.mark.parametrize("ratio", [0.999, 0.5, 0.1])
def test_padding_is_the_first_to_be_dropped(vlm: qap.VisionModel, ratio: float) -> None:
    wide = wide_picture()
    dense = vlm.encode(wide)
    assert 0 < dense.n_real < N
    cfg = qap.PruneConfig(n_keep=9, encoder_keep=ratio)
    image = vlm.encode(wide, cfg)
    assert image.n_left == cfg.count_early(dense.n_real) <= dense.n_real
    np.testing.assert_array_equal(image.padding, dense.padding)
    assert image.dropped[dense.padding].all()
    assert not image.padding[vlm.prune(image, cfg).indices].any()
    _, report = drop_in(vlm, wide, cfg)
    assert not report["early_total"][dense.padding].any()
    left, total = image.kept_early, report["early_total"]
    others = np.flatnonzero(image.dropped & ~dense.padding)
    assert len(others) == dense.n_real - image.n_left
    assert len(others) == 0 or total[left].min() >= total[others].max()


def opened(folder: Path, side: int) -> qap.VisionModel:
    """The packaged encoder with tiles as stock llama.cpp cuts them, of a square of `side` pixels: each is a chunk."""
    keys: dict[str, Any] = {
        "clip.vision.mm_patch_merge_type": "spatial_unpad",
        "clip.vision.image_grid_pinpoints": [side, side],
    }
    mmproj = rewrite(qap.packaged_model().mmproj, folder / "mmproj.gguf", keys)
    return qap.VisionModel(mmproj, qap.packaged_model().model, n_threads=1, resize="pad")


def test_tiles_of_padding_alone_keep_nothing(tmp_path: Path) -> None:
    """A thin picture on 3 x 3 tiles: those above and below show none of it."""
    thin = np.random.default_rng(0).integers(0, 256, (8, 400, 3), dtype=np.uint8)
    with opened(tmp_path, 3 * 192) as model:
        native = model._encoder._native
        with qap.use(qap.PruneConfig(n_keep=20, encoder_keep=0.5)):
            found = native.tokenize(_core.media_marker(), [thin], False, True)
        with qap.use(None):
            dense = native.tokenize(_core.media_marker(), [thin], False, True)
        kept = 0
        for chunk in (chunk for chunk in found if chunk.is_image):
            rows = native.encode(chunk, False)
            report = report_of(chunk)
            assert len(rows) == chunk.n_tokens == len(report["indices"])
            assert np.isfinite(rows).all()
            assert not np.isin(report["indices"], report["padding"]).any()
            kept += len(rows)
        assert kept == 20
        params, counts = to_params(qap.PruneConfig(encoder_keep=0.5)), []
        for chunk in (chunk for chunk in dense if chunk.is_image):
            assert np.isfinite(native.encode(chunk, True, False, params)).all()
            report = report_of(chunk)
            counts.append((report["n_total"] - len(report["padding"]), len(report["early"])))
    assert sum(n_real == 0 for n_real, _ in counts) == 6
    assert all(n_early == (1 if n_real == 0 else -(-n_real // 2)) for n_real, n_early in counts)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qap.VisionModel]:
    with opened(tmp_path_factory.mktemp("tiled"), 2 * 192) as model:
        yield model


def test_tiles_share_what_is_left(tiled: qap.VisionModel) -> None:
    """Each tile drops by itself, and K is shared by what they have left."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for cfg in (qap.PruneConfig(n_keep=50, encoder_keep=0.3), qap.PruneConfig(keep_ratio=0.9, encoder_keep=0.3)):
        with qap.use(cfg):
            found = tiled._encoder._native.tokenize(_core.media_marker(), [pixels], False, True)
        chunks = [chunk for chunk in found if chunk.is_image]
        kept, left, real = 0, [], 0
        for chunk in chunks:
            rows, report = tiled._encoder._native.encode(chunk, False), report_of(chunk)
            assert len(rows) == chunk.n_tokens == len(report["indices"])
            assert np.isin(report["indices"], report["early"]).all()
            kept, n_real = kept + len(rows), report["n_total"] - len(report["padding"])
            left.append((len(report["early"]), cfg.count_early(n_real)))
            real += n_real
        assert len(chunks) == 5
        assert all(got == want for got, want in left)
        assert kept == cfg.count(real) == min(50 if cfg.n_keep else 10**6, -(-3 * real // 10))


def test_no_more_is_kept_than_is_left(vlm: qap.VisionModel, pixels: Any) -> None:
    quarter = qap.PruneConfig(n_keep=72, encoder_keep=0.25)
    assert quarter.count(N) == 36
    image = vlm.encode(pixels, quarter)
    for cfg in (quarter, qap.PruneConfig(n_keep=72), qap.PruneConfig(keep_ratio=1.0)):
        np.testing.assert_array_equal(vlm.prune(image, cfg).indices, image.kept_early)
    rows, report = drop_in(vlm, pixels, quarter)
    np.testing.assert_array_equal(report["indices"], image.kept_early)
    np.testing.assert_array_equal(rows, image.features[image.kept_early])


def test_an_answer_takes_the_cells_of_what_is_kept(vlm: qap.VisionModel, pixels: Any) -> None:
    cells = []
    for cfg in (HALF, HALF.replace(encoder_keep=1.0)):
        answer = vlm.generate([pixels, "How many objects are there?"], prune=cfg, max_tokens=1, stream=True)
        assert (answer.stats.n_image_tokens, answer.stats.n_image_kept) == (N, 18)
        cells.append(answer.stats.n_kv)
        answer.close()
    assert cells[0] == cells[1]
    image = vlm.encode(pixels, HALF)
    # all that is left
    answer = vlm.generate([image, "How many objects are there?"], prune=None, max_tokens=1, stream=True)
    assert (answer.stats.n_image_kept, answer.stats.n_kv) == (72, cells[0] + 72 - 18)
    logits = vlm.last_logits()
    answer.close()
    answer = vlm.generate(
        [image, "How many objects are there?"], prune=HALF.replace(n_keep=72), max_tokens=1, stream=True
    )
    np.testing.assert_array_equal(vlm.last_logits(), logits)
    answer.close()


def test_the_cache_tells_drops_apart(pixels: Any, tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"encoder_keep": 0.4}, {"encoder_layer": 2}, {"alpha": 0.5}, {"alpha": "dynamic"}, {"error": "int3"},
        {"group_size": 64}, {"outlier": "crest"}, {"outlier_weight": 0.25}, {"semantic": "attention"},
    ]  # fmt: skip
    with qap.VisionModel(n_threads=1, cache=qap.EmbeddingCache(folder=tmp_path)) as vlm:
        found = [vlm.encode(pixels, cfg) for cfg in (None, HALF, *(HALF.replace(**other) for other in others))]
        assert vlm.n_encodes == len(found)
        later: list[dict[str, Any]] = [
            {"select": "topk"},
            {"n_keep": 3},
            {"merge": "average"},
            {"positions": "compact"},
        ]
        for same in later:
            assert vlm.encode(pixels, HALF.replace(**same)) is found[1]  # they matter at the end only
        vlm.cache.clear()
        again = vlm.encode(pixels, HALF)
        assert vlm.n_encodes == len(found)
        assert again is not found[1]
        assert again.pieces == found[1].pieces
        for name in ("kept_early", "dropped_total", "dropped_near"):
            np.testing.assert_array_equal(getattr(again, name), getattr(found[1], name))


def test_what_cannot_be_is_one_line(vlm: qap.VisionModel, pixels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quarter = qap.PruneConfig(n_keep=18, encoder_keep=0.25)
    with pytest.raises(qap.ConfigError, match=r"expected an image that was encoded with it, .* pass the same config"):
        vlm.prune(vlm.encode(pixels), quarter)
    with pytest.raises(qap.ConfigError, match=r"36 of its 144 tokens left, got 72; pass the same config"):
        vlm.prune(vlm.encode(pixels, HALF), quarter)
    with pytest.raises(qap.ConfigError, match=r"encoder_layer: expected a number in 1\.\.\d+ for an encoder that runs"):
        vlm.encode(pixels, quarter.replace(encoder_layer=99))
    with pytest.raises(qap.ConfigError, match="expected a PruneConfig"):
        vlm.encode(pixels, 0.5)  # type: ignore[arg-type]
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
    quarter = cfg.replace(encoder_layer=None)
    assert qap.PruneConfig.from_metadata(quarter.to_metadata()) == quarter
    assert not [key for key in qap.PruneConfig().to_metadata() if "encoder" in key]  # earlier versions read them still
    qap.set_default(cfg)
    try:
        params = _core.get_default()
        assert params is not None
        assert qap.defaults.from_params(params) == cfg
    finally:
        qap.set_default(None)


def test_a_file_and_the_handler_drop_early(pixels: Any, tmp_path: Path) -> None:
    files = qap.packaged_model()
    cfg = HALF.replace(encoder_layer=2)
    keyed = qap.annotate(files.mmproj, tmp_path / "keyed.gguf", cfg)
    with qap.VisionModel(keyed, files.model, n_threads=1) as vlm:
        assert vlm.file_config == cfg
        native = vlm._encoder._native
        (chunk,) = native.tokenize(_core.media_marker(), [pixels], False, True)  # by the file's keys alone
        rows = native.encode(chunk, False)
        image = vlm.encode(pixels, cfg)
        cut = vlm.prune(image, cfg)
        np.testing.assert_array_equal(rows, cut.features)
        want = vlm.generate([image, "How many objects are there?"], prune=cfg, max_tokens=4)
    handler = qap.ChatHandler(files.mmproj, prune=cfg)
    llama = llama_cpp.Llama(str(files.model), chat_handler=handler, n_ctx=512, n_threads=1, verbose=False)
    content: Any = [
        {"type": "image_url", "image_url": files.sample},
        {"type": "text", "text": "How many objects are there?"},
    ]
    found: Any = llama.create_chat_completion([{"role": "user", "content": content}], max_tokens=4, temperature=0)
    assert found["choices"][0]["message"]["content"].strip() == want.strip()
    assert handler.stats is not None
    assert (handler.stats.n_image_tokens, handler.stats.n_image_kept) == (N, 18)
    llama.close()
