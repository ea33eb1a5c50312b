"""Padding is no token: what lies wholly in the padding of a letterboxed picture is neither scored nor kept.

Which tokens those are is found here from the pixels of a canvas that Pillow makes; the native library has it from the
resize itself (native/src/families/letterbox.cpp).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

import qap_gguf as qap
from conftest import Converted
from dropin.gguf_copy import rewrite
from qap_gguf import _core, reference
from qap_gguf.config import SELECTORS, PruneConfig
from qap_gguf.eval.made_tokens import replacement
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.overlay import PAD_COLOUR

SIZES = [(1024, 768), (1920, 1080), (300, 900)]
SIDE, CELLS = 192, 12  # of what the packaged encoder sees: pixels, tokens

Pixels = npt.NDArray[np.uint8]


def picture(size: tuple[int, int]) -> Pixels:
    """Noise without the padding's colour."""
    return np.random.default_rng(5).integers(130, 256, (size[1], size[0], 3), dtype=np.uint8)


def padding_of(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Which tokens see nothing but the padding's colour."""
    canvas = np.asarray(ImageOps.pad(Image.fromarray(pixels), (SIDE, SIDE), color=PAD_COLOUR)) == PAD_COLOUR
    cell = SIDE // CELLS
    found = canvas.all(axis=-1).reshape(CELLS, cell, CELLS, cell).all(axis=(1, 3))
    return np.asarray(found.ravel())


def chunks_of(vlm: qap.VisionModel, pixels: Pixels, cfg: PruneConfig | None) -> list[_core.Chunk]:
    """The image's chunks as a stock handler gets them."""
    with qap.use(cfg):
        found = vlm._encoder._native.tokenize(_core.media_marker(), [pixels], False, True)
    return [chunk for chunk in found if chunk.is_image]


def hooked(vlm: qap.VisionModel, pixels: Pixels, cfg: PruneConfig) -> list[tuple[Any, dict[str, Any]]]:
    """Rows and report of each chunk of the drop-in path."""
    rows = []
    for chunk in chunks_of(vlm, pixels, cfg):
        features = vlm._encoder._native.encode(chunk, False)
        report = chunk.report()
        assert report is not None
        rows.append((features, report))
    return rows


def check_both_paths(vlm: qap.VisionModel, image: ImageEmbedding, pixels: Pixels, cfg: PruneConfig) -> None:
    """No padding is kept, exactly K tokens are, and both paths agree to the last bit of every row."""
    cut = vlm.prune(image, cfg)
    assert not image.padding[cut.indices].any()
    assert len(cut.indices) == cfg.count(image.n_real)
    found = hooked(vlm, pixels, cfg)
    starts = np.cumsum([0, *(piece.n_tokens for piece in image.pieces)])[:-1]
    indices = np.concatenate([report["indices"] + start for (_, report), start in zip(found, starts, strict=True)])
    np.testing.assert_array_equal(indices, cut.indices)
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in found]), cut.features)
    for name in ("error", "outlier", "sensitivity", "semantic", "total"):
        expected, reported = getattr(cut.scores, name), [report[name] for _, report in found]
        if name == "semantic" and reported[0] is None:  # an encoder without attention to its tokens
            assert expected is None or not expected.any()
            continue
        scores = np.concatenate(reported)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
        assert not scores[image.padding].any()


@pytest.fixture(scope="module")
def vlm() -> Iterator[qap.VisionModel]:
    with qap.VisionModel(n_threads=1) as model:
        yield model


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_no_padding_is_kept(vlm: qap.VisionModel, size: tuple[int, int]) -> None:
    pixels = picture(size)
    image, want = vlm.encode(pixels), padding_of(pixels)
    np.testing.assert_array_equal(image.padding, want)
    assert image.n_tokens == CELLS**2
    assert image.n_real == CELLS**2 - want.sum() < image.n_tokens
    for n_keep in (36, 18):
        for select in SELECTORS:
            check_both_paths(vlm, image, pixels, PruneConfig(n_keep=n_keep, select=select))
    check_both_paths(vlm, image, pixels, PruneConfig(n_keep=18, merge="average"))
    check_both_paths(vlm, image, pixels, PruneConfig(keep_ratio=0.125, alpha="dynamic", semantic="attention"))


def test_scores_are_those_of_a_picture_without_the_padding(vlm: qap.VisionModel) -> None:
    image = vlm.encode(picture(SIZES[0]))
    assert image.attention is not None
    real = ~image.padding
    want = reference.score(image.tokens[real], semantic=image.attention[real])
    found = vlm.score(image)
    np.testing.assert_array_equal(found.padding, image.padding)
    np.testing.assert_allclose(found.total[real], want.total, rtol=1e-4, atol=1e-5)
    assert found.semantic[real].min() == found.sensitivity[real].min() * 0 == 0
    assert found.semantic[real].max() == 1


@pytest.mark.parametrize("cfg", [PruneConfig(n_keep=1000), PruneConfig(keep_ratio=1.0)], ids=["n_keep", "keep_ratio"])
def test_all_that_is_no_padding_can_be_kept(vlm: qap.VisionModel, cfg: PruneConfig) -> None:
    pixels = picture(SIZES[1])
    image = vlm.encode(pixels)
    check_both_paths(vlm, image, pixels, cfg)
    np.testing.assert_array_equal(vlm.prune(image, cfg).features, image.features[~image.padding])


def test_without_pruning_nothing_is_dropped(vlm: qap.VisionModel) -> None:
    pixels = picture(SIZES[0])
    (chunk,) = chunks_of(vlm, pixels, None)
    dense = vlm._encoder._native.encode(chunk, False)
    np.testing.assert_array_equal(dense, vlm.encode(pixels).features)
    answer = vlm.generate([pixels, "What is this?"], max_tokens=1, prune=None, stream=True)
    assert answer.stats.n_image_kept == CELLS**2
    answer = vlm.generate([pixels, "What is this?"], max_tokens=1, prune=PruneConfig(n_keep=18), stream=True)
    assert answer.stats.n_image_kept == 18
    counts, image = vlm._encoder.count(SIZES[0]), vlm.encode(pixels)
    assert (counts.n_tokens, counts.n_real) == (image.n_tokens, image.n_real)


def test_a_square_picture_and_a_stretched_one_have_no_padding(vlm: qap.VisionModel) -> None:
    assert not vlm.encode(picture((300, 300))).padding.any()
    with qap.VisionModel(n_threads=1, resize="stretch") as stretched:
        assert not stretched.encode(picture(SIZES[2])).padding.any()


def test_the_cache_in_a_folder_keeps_it(tmp_path: Path) -> None:
    pixels = picture(SIZES[1])
    for _ in range(2):
        with qap.VisionModel(n_threads=1, cache=qap.EmbeddingCache(folder=tmp_path)) as model:
            np.testing.assert_array_equal(model.encode(pixels).padding, padding_of(pixels))
    assert model.n_encodes == 0


def test_made_tokens_leave_it_out(vlm: qap.VisionModel) -> None:
    image = vlm.encode(picture(SIZES[1]))
    lines = image.features[~image.padding].reshape(-1, CELLS, image.features.shape[1])
    whole = replacement("pool", image, image.n_real)
    np.testing.assert_allclose(whole, lines.reshape(whole.shape), rtol=1e-5, atol=1e-6)
    assert len(replacement("dpp-flat", image, 9)) == 9


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qap.VisionModel]:
    """The packaged encoder with LLaVA-NeXT's tiles, as stock llama.cpp cuts them: each is a chunk."""
    keys: dict[str, Any] = {
        "clip.vision.mm_patch_merge_type": "spatial_unpad",
        "clip.vision.image_grid_pinpoints": [384, 384],
    }
    mmproj = rewrite(qap.packaged_model().mmproj, tmp_path_factory.mktemp("tiled") / "mmproj.gguf", keys)
    with qap.VisionModel(mmproj, qap.packaged_model().model, n_threads=1, resize="pad") as model:
        yield model


def test_tiles_know_their_part_of_the_padding(tiled: qap.VisionModel) -> None:
    """1200 x 300 pixels on four tiles and an overview: lines 144 to 240 of 384 and 72 to 120 of 192 are picture."""
    pixels = picture((1200, 300))
    counts = [len(report["padding"]) for _, report in hooked(tiled, pixels, PruneConfig(n_keep=50))]
    assert counts == [CELLS * (CELLS - 3)] * 4 + [CELLS * (CELLS - 4)]  # lines of tokens that show some of it
    for _, report in hooked(tiled, pixels, PruneConfig(n_keep=50, select="random")):
        assert not np.isin(report["indices"], report["padding"]).any()
    assert sum(chunk.n_tokens for chunk in chunks_of(tiled, pixels, PruneConfig(n_keep=10**6))) == CELLS * (4 * 3 + 4)


# --- other families, letterboxed on request ---------------------------------------------------------------------------

#: they keep the shape, stretch (SmolVLM), or cut the padding off (Granite 4): no whole token of padding in these sizes
WITHOUT_PADDING = ["qwen2-vl", "pixtral", "lfm2-vl", "smolvlm"]
WITHOUT_PADDING += ["gemma-4", "minicpm-v-4.6", "granite-4", "gemma-4-unified"]
FAMILY_NAMES = ["gemma-3", "internvl", "llama-4", *WITHOUT_PADDING]


@contextlib.contextmanager
def letterboxed(
    converted: Converted, name: str, resize: str = "pad", change: Callable[[Path], Path] = lambda mmproj: mmproj
) -> Iterator[qap.VisionModel]:
    """A random model of a family, which pads its pictures unless asked otherwise.

    `change` makes another mmproj file of the family's.
    """
    for library in ("torch", "transformers", "sentencepiece"):
        pytest.importorskip(library)
    files = converted(name)[2]
    llama = llama_cpp.Llama(str(files.model), n_ctx=1024, verbose=False, n_threads=1)
    try:
        with qap.VisionModel(change(files.mmproj), llama, flash_attn=False, resize=resize, n_threads=1) as model:
            yield model
    finally:
        llama.close()


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("size", "n_padding"), [((100, 70), 16), ((40, 128), 32)], ids=["wide", "tall"])
def test_janus_is_letterboxed_as_it_was_trained(size: tuple[int, int], n_padding: int, converted: Converted) -> None:
    """On gray, and in the middle. Of the 64 tokens those in whole lines or columns of gray are padding."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    from families import truth
    from families.test_resize import nmse, smooth

    hf, _, made = converted("janus-pro")
    half = [0.5, 0.5, 0.5]
    processor = JanusImageProcessorPil(size={"height": 64, "width": 64}, image_mean=half, image_std=half)
    pixels = smooth(*size)
    (shown,) = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    with qap.VisionModel(made.mmproj, made.model, n_ctx=64, flash_attn=False, n_threads=1) as model:
        image = model.encode(pixels)
    assert nmse(image.features, truth.features("janus-pro", hf, torch.tensor(shown))) <= 1e-5
    assert image.padding.sum() == n_padding


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_other_families(name: str, converted: Converted) -> None:
    with letterboxed(converted, name) as model:
        padded = 0
        for size in ((400, 60), (60, 400)):
            pixels = picture(size)
            image = model.encode(pixels)
            padded += int(image.padding.sum())
            for select in ("dpp", "topk", "random"):
                check_both_paths(model, image, pixels, PruneConfig(keep_ratio=0.5, select=select))
            one = PruneConfig(n_keep=1)  # of several tiles, all but one get none
            check_both_paths(model, image, pixels, one)
            stats = qap.GenerationStats()
            prompt = f"a{_core.media_marker()}b"  # these checkpoints have no chat template that takes pictures
            model.answers.place(prompt, [(image, model.prune(image, one))], stats, add_special=True)
            assert stats.n_image_kept == 1
            assert np.isfinite(model.last_logits()).all()
        print(f"{name}: {padded} tokens of padding")
        assert padded > 0 or name in WITHOUT_PADDING
