"""LLaVA-NeXT against transformers: the tiles of a picture, the order of their rows, logits dense and pruned.

transformers is the truth, its image processor (the one on Pillow) included. Figures for docs: pytest -s.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import qap_gguf as qap
from dropin.gguf_copy import rewrite
from dropin.probe import Mtmd
from qap_gguf import _core
from qap_gguf.config import PruneConfig
from qap_gguf.convert import ConvertResult

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families import truth  # noqa: E402
from families.checkpoints import llavanext  # noqa: E402
from families.test_parity import AFTER, BEFORE, BETWEEN, FEATURES, LOGITS, nmse  # noqa: E402
from families.test_wild_files import under_other_names  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

Array = npt.NDArray[Any]
SIDE, TOKENS = 64, 64  # of a tile: pixels of a side, tokens
SIZES = {"wide": (200, 90), "tall": (70, 190), "square": (150, 150), "small": (20, 15)}
KINDS: dict[str, dict[str, Any]] = {"vicuna-clip": {}, "mistral-siglip": {"text": "Mistral", "siglip": True}}


def picture(name: str) -> Array:
    """Noise without the finest detail, of the size in SIZES."""
    width, height = SIZES[name]
    noise = np.random.default_rng(9).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


PIL_PROCESSOR: Any = transformers.LlavaNextImageProcessorPil


class Processor(PIL_PROCESSOR):  # type: ignore[misc]
    """Its pictures are resized line by line first, as Pillow did before 13, which takes the cheaper order."""

    def resize(self, image: Array, size: Any, **options: Any) -> Any:
        if size.width is not None:
            across = dataclasses.replace(size, height=image.shape[-2])
            image = super().resize(image, across, **options)
        return super().resize(image, size, **options)


def processor(hf: Any) -> Any:
    size = hf.config.vision_config.image_size
    return Processor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=[0.5] * 3,
        image_std=[0.5] * 3, image_grid_pinpoints=hf.config.image_grid_pinpoints,
    )  # fmt: skip


def features(hf: Any, pixels: Array) -> Array:
    """What transformers gives its language model for a picture, (n_rows, n_embd)."""
    values = processor(hf)(pixels, return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        out = hf.model.get_image_features(values["pixel_values"], values["image_sizes"])
    return np.asarray(torch.cat(list(out.pooler_output)).numpy())


@dataclass
class Case:
    """A checkpoint in f32 files, and transformers' model."""

    name: str
    hf: Any
    files: ConvertResult
    llama: llama_cpp.Llama
    vlm: qap.VisionModel

    def prefill(self, parts: list[Any]) -> Array:
        """Logits after a prompt of token ids and (name of the picture, rows, indices or None)."""
        language, encoder = self.vlm._language, self.vlm._encoder
        language.reset()
        for part in parts:
            if isinstance(part, list):
                language.prefill(part)
            else:
                name, rows, indices = part
                (chunk,) = encoder.tokenize(_core.media_marker(), [SIZES[name]], add_special=False)
                encoder.prefill(chunk, np.ascontiguousarray(rows), indices, "auto", 512)
        return np.asarray(self.vlm.last_logits())


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    hf = llavanext(folder / "ckpt", **KINDS[request.param])
    files = qap.convert(
        folder / "ckpt", folder / "gguf", quantize="F32", keep_positions=False, mmproj_type="f32", name="model"
    )
    llama = llama_cpp.Llama(
        str(files.model), n_ctx=1024, type_k=0, type_v=0, flash_attn=False, verbose=False, n_threads=2
    )
    with qap.VisionModel(files.mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        yield Case(request.param, hf, files, llama, vlm)
    llama.close()


@pytest.mark.parametrize("name", list(SIZES))
def test_packed_rows_equal_transformers(case: Case, name: str) -> None:
    want = features(case.hf, picture(name))
    image = case.vlm.encode(picture(name))
    assert image.features.shape == want.shape
    rows = [nmse(a, b) for a, b in zip(image.features, want, strict=True)]
    print(f"\n{case.name} {name}: NMSE {nmse(image.features, want):.1e}, worst row {max(rows):.1e}, {len(rows)} rows")
    assert max(rows) <= FEATURES
    (piece,) = image.pieces
    newline = case.hf.model.image_newline.detach().numpy()
    assert set(piece.special) == set(np.flatnonzero((want == newline).all(1)))
    assert (image.features[list(piece.special)] == newline).all()
    assert (image.n_tokens, image.grid) == (len(want) - piece.n_special, (1, image.n_tokens))


def test_signals_stand_where_their_tokens_do(case: Case) -> None:
    """Attention is that within a tile, and a tile alone is the overview of a picture that is no more than it."""
    pixels = np.random.default_rng(3).integers(
        0, 256, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8
    )  # 2 x 2 tiles, no padding
    image = case.vlm._encoder.encode(pixels, hidden=True)
    assert image.hidden is not None
    projected = case.hf.model.multi_modal_projector(torch.tensor(image.hidden)).detach().numpy()
    assert nmse(image.tokens, projected) <= FEATURES
    tiles = [np.ascontiguousarray(pixels[y : y + SIDE, x : x + SIDE]) for y in (0, SIDE) for x in (0, SIDE)]
    for signal in ("attention", "received"):
        values = getattr(image, signal)
        assert (values is None) == (signal == "attention" and "siglip" in case.name)
        if values is not None:
            alone = np.stack([getattr(case.vlm.encode(tile), signal)[:TOKENS] for tile in tiles])
            lines = alone.reshape(2, 2, 8, 8).transpose(0, 2, 1, 3)  # tiles of 8 x 8 tokens to one grid of 16 x 16
            np.testing.assert_array_equal(values[TOKENS:], lines.reshape(-1))


def test_a_stretched_picture_has_no_padding(case: Case) -> None:
    grid = (3 * SIDE, SIDE)  # what fits the wide picture best
    across = Image.fromarray(picture("wide")).resize((grid[0], SIZES["wide"][1]), Image.Resampling.BICUBIC)
    pixels = np.asarray(across.resize(grid, Image.Resampling.BICUBIC))
    want = case.vlm.encode(pixels).features
    with qap.VisionModel(case.files.mmproj, case.llama, flash_attn=False, n_threads=1, resize="stretch") as vlm:
        got = vlm.encode(picture("wide")).features
    assert len(got) == TOKENS + 8 * (24 + 1)
    np.testing.assert_array_equal(got[TOKENS:], want[TOKENS:])  # the overviews are not made from the same picture


@pytest.mark.parametrize("part", [1, 2, 8], ids=["dense", "half", "eighth"])
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_first_answer_token_equals_transformers(case: Case, name: str, part: int) -> None:
    image = case.vlm.encode(picture(name))
    (piece,) = image.pieces
    n_keep = image.n_tokens // part
    cut = case.vlm.prune(image, PruneConfig(n_keep=n_keep, select="dpp"))
    rows = piece.rows_of(cut.indices)
    assert len(cut.indices) == n_keep
    assert len(rows) == n_keep + piece.n_special  # the ends of lines stay
    np.testing.assert_array_equal(cut.features, image.features[rows])
    np.testing.assert_array_equal(cut.positions, np.searchsorted(rows, piece.token_rows(cut.indices)))
    want = truth.logits("llava-next", case.hf, [BEFORE, features(case.hf, picture(name))[rows], AFTER])
    got = case.prefill([BEFORE, (name, cut.features, cut.indices), AFTER])[: len(want)]
    error = nmse(got - got.mean(), want - want.mean())
    print(f"\n{case.name} {name}: logits NMSE {error:.1e} with {n_keep} of {image.n_tokens} tokens")
    assert error <= LOGITS


def test_two_images_with_text_between(case: Case) -> None:
    images = [case.vlm.encode(picture(name)) for name in ("square", "small")]
    (piece,) = images[1].pieces
    half = np.arange(0, images[1].n_tokens, 2, dtype=np.int32)
    rows = piece.rows_of(half)
    wanted = [features(case.hf, picture("square")), features(case.hf, picture("small"))[rows]]
    want = truth.logits("llava-next", case.hf, [BEFORE, wanted[0], BETWEEN, wanted[1], AFTER])
    first, second = ("square", images[0].features, None), ("small", images[1].features[rows], half)
    got = case.prefill([BEFORE, first, BETWEEN, second, AFTER])[: len(want)]
    assert nmse(got - got.mean(), want - want.mean()) <= LOGITS


CONFIGS = [
    PruneConfig(n_keep=30),
    PruneConfig(n_keep=1, alpha="dynamic", semantic="attention"),
    PruneConfig(keep_ratio=0.25, select="dpp"),
    PruneConfig(keep_ratio=0.5, select="divprune", merge="average", semantic="none"),
]


def chunks(vlm: qap.VisionModel, name: str, cfg: PruneConfig | None) -> list[_core.Chunk]:
    with qap.use(cfg):
        found = vlm._encoder._native.tokenize(_core.media_marker(), [picture(name)], False, True)
    return [chunk for chunk in found if chunk.is_image]


@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_a_planned_chunk_keeps_what_prune_keeps(case: Case, cfg: PruneConfig) -> None:
    """What stock handlers run, beside VisionModel: the same scores over the whole picture, the same rows."""
    (chunk,) = chunks(case.vlm, "tall", cfg)
    rows = case.vlm._encoder._native.encode(chunk, False)
    cut = case.vlm.prune(case.vlm.encode(picture("tall")), cfg)
    report = chunk.report()
    assert report is not None
    np.testing.assert_array_equal(report["indices"], cut.indices)
    for name in ("error", "outlier", "semantic", "total"):
        np.testing.assert_array_equal(report[name], getattr(cut.scores, name), err_msg=name)
    np.testing.assert_array_equal(rows, cut.features)
    assert chunk.n_tokens == len(rows) == len(cut.indices) + len(report["special"])
    (dense,) = chunks(case.vlm, "tall", None)
    np.testing.assert_array_equal(
        case.vlm._encoder._native.encode(dense, False), case.vlm.encode(picture("tall")).features
    )


def test_flat_tiles_are_left_out(case: Case) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    pixels[:SIDE, SIDE:] = 200
    cfg = PruneConfig(keep_ratio=0.5, skip_flat_tiles=0)
    grid = np.zeros((16, 16), bool)  # 2 x 2 tiles of 8 x 8 tokens, no padding
    grid[:8, 8:] = True
    dense, image = case.vlm.encode(pixels), case.vlm.encode(pixels, cfg)
    np.testing.assert_array_equal(image.dropped, np.concatenate([np.zeros(TOKENS, bool), grid.ravel()]))
    (piece,) = image.pieces
    left = piece.rows_of(np.flatnonzero(~image.dropped).astype(np.int32))
    np.testing.assert_array_equal(image.features[left], dense.features[left])
    assert image.received is not None
    assert not image.received[image.dropped].any()
    cut = case.vlm.prune(image, cfg)
    assert len(cut.indices) == cfg.count(image.n_real) == 160
    with qap.use(cfg):
        (chunk,) = case.vlm._encoder._native.tokenize(_core.media_marker(), [pixels], False, True)
    np.testing.assert_array_equal(case.vlm._encoder._native.encode(chunk, False), cut.features)
    report = chunk.report()
    assert report is not None
    np.testing.assert_array_equal(report["indices"], cut.indices)
    np.testing.assert_array_equal(report["early"], image.kept_early)
    with pytest.raises(qap.UnsupportedError, match="duplicates: LLaVA-NeXT's tiles are put together from whole ones"):
        case.vlm.encode(pixels, PruneConfig(duplicates=0))


def test_flat_tiles_between_padding_are_left_out(case: Case) -> None:
    """Of a picture on a grid that is higher, or wider, than it is: the tile with nothing but white and padding goes."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 2 * SIDE, 3), dtype=np.uint8)
    pixels[:, SIDE - 8 :] = 255
    for shown in (pixels, pixels.swapaxes(0, 1).copy()):
        dense, image = case.vlm.encode(shown), case.vlm.encode(shown, PruneConfig(skip_flat_tiles=0))
        n_grid = image.n_tokens - TOKENS
        assert 0 < n_grid < 2 * TOKENS  # padding was cut off
        assert image.n_left == image.n_real - n_grid // 2
        assert not image.dropped[:TOKENS].any()
        (piece,) = image.pieces
        left = piece.rows_of(np.flatnonzero(~image.dropped).astype(np.int32))
        np.testing.assert_array_equal(image.features[left], dense.features[left])
        shown[20, -1] = shown[-1, 20] = 254  # the last pixel's line, and column
        assert case.vlm.encode(shown, PruneConfig(skip_flat_tiles=0)).kept_early is None


def test_the_stock_encoder_gives_upstreams_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    native = case.vlm._encoder._native
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    found = chunks(case.vlm, "square", None)
    assert [chunk.n_tokens for chunk in found] == [TOKENS] * 5
    base = np.asarray(Image.fromarray(picture("square")).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    (overview,) = native.tokenize(_core.media_marker(), [base], False, True)  # a picture of a tile's size is not cut
    np.testing.assert_array_equal(native.encode(found[-1], False), native.encode(overview, False))
    assert len(case.vlm._encoder.encode(picture("square"), hidden=False).pieces) == 5


def test_stock_handler_gets_packed_rows(case: Case) -> None:
    """llama-cpp-python's own handler for LLaVA 1.6, through our libmtmd; its cells are counted."""
    from llama_cpp.llama_chat_format import Llava16ChatHandler

    handler = Llava16ChatHandler(clip_model_path=str(case.files.mmproj), verbose=False)
    llama = llama_cpp.Llama(str(case.files.model), chat_handler=handler, n_ctx=1024, n_threads=1, verbose=False)
    rows = {name: case.vlm.encode(picture(name)).pieces[0] for name in ("wide", "small")}

    def cells(name: str) -> int:
        file = io.BytesIO()
        Image.fromarray(picture(name)).save(file, "png")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        llama.create_chat_completion(messages=[{"role": "user", "content": content}], temperature=0.0, max_tokens=1)
        return int(llama.n_tokens)

    try:
        text = cells("wide") - rows["wide"].n_rows
        assert 0 < text < 300
        assert cells("small") - rows["small"].n_rows == text
        with qap.use(PruneConfig(n_keep=20)):
            assert cells("wide") == text + 20 + rows["wide"].n_special
    finally:
        llama.close()


def test_saved_chunks_and_batches(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray(picture("wide")).save(file)
    mtmd = Mtmd(str(case.files.mmproj), str(case.files.model), flash=False)
    (piece,) = case.vlm.encode(picture("wide")).pieces
    for cfg, n_rows in ((None, piece.n_rows), (PruneConfig(n_keep=18), 18 + piece.n_special)):
        with qap.use(cfg):
            (chunk,) = mtmd.tokenize(str(file))
        data = mtmd.save(chunk)
        loaded = mtmd.lib.mtmd_input_chunk_load(data, len(data))
        positions = list(range(7, 7 + n_rows))
        for one in (chunk, loaded):
            assert mtmd.describe(one) == {"n_tokens": [n_rows] * 2, "n_pos": [n_rows] * 2, "positions": positions}
        assert mtmd.save(loaded) == data
        alone = mtmd.embeddings(chunk)
        batch = mtmd.lib.mtmd_batch_init(mtmd.ctx)  # what upstream's server uses
        assert mtmd.lib.mtmd_batch_add_chunk(batch, chunk) == mtmd.lib.mtmd_batch_encode(batch) == 0
        np.testing.assert_array_equal(mtmd.read(mtmd.lib.mtmd_batch_get_output_embd(batch, chunk), chunk), alone)
        mtmd.lib.mtmd_batch_free(batch)
        # upstream saves no pixels and not how many tiles there were: such a chunk cannot be planned anew
        own = ctypes.CDLL(mtmd.lib._libmtmd._name)
        own.qap_last_error.restype = ctypes.c_char_p
        context, picture_chunk = ctypes.c_void_p(mtmd.ctx), ctypes.c_void_p(loaded)
        assert own.qap_chunk_plan_capture(context, picture_chunk, False) == -1
        assert own.qap_last_error().endswith(b"one that was saved and loaded; tokenize the prompt anew")
    mtmd.lib.mtmd_free(mtmd.ctx)
    mtmd.llama.close()


def test_embeddings_are_kept_and_the_prefix_is_reused(case: Case, tmp_path: Path) -> None:
    cfg, answers = PruneConfig(n_keep=40, semantic="attention"), []  # attention does not look at the question
    for _ in range(2):
        cache = qap.EmbeddingCache(folder=tmp_path / "cache")
        with qap.VisionModel(case.files.mmproj, case.llama, cache=cache, flash_attn=False, n_threads=1) as vlm:
            image = vlm.encode(picture("square"))
            vlm.generate([image, "How many?"], prune=cfg, max_tokens=4)
            again = vlm.generate([image, "What is it?"], prune=cfg, max_tokens=4, stream=True)
            text = "".join(again)
            assert again.stats.n_reused >= 40 + image.pieces[0].n_special
            vlm.forget()
            assert vlm.generate([image, "What is it?"], prune=cfg, max_tokens=4) == text
            answers.append((text, image.pieces, image.features.tobytes()))
    assert cache.stats.store_hits >= 1
    assert answers[0] == answers[1]


def test_files_of_the_legacy_converter(case: Case, tmp_path: Path) -> None:
    """They call the row by another name; without any there is one line, and no picture that was packed wrongly."""
    under_other_names(case.files.mmproj, tmp_path / "legacy.gguf", "v.image_newline", "model.image_newline")
    rewrite(case.files.mmproj, tmp_path / "none.gguf", tensors={"v.image_newline": None})
    want = case.vlm.encode(picture("wide")).features
    with qap.VisionModel(tmp_path / "legacy.gguf", case.llama, flash_attn=False, n_threads=1) as vlm:
        np.testing.assert_array_equal(vlm.encode(picture("wide")).features, want)
    with qap.VisionModel(tmp_path / "none.gguf", case.llama, flash_attn=False, n_threads=1) as vlm:
        with pytest.raises(qap.UnsupportedError, match=r"its 4 tiles .*no image_newline.*convert the checkpoint anew$"):
            vlm.encode(picture("wide"))
        assert vlm.encode(picture("small")).n_tokens == TOKENS


def test_number_of_rows_over_200_sizes(tmp_path: Path) -> None:
    """Tiles of 336 pixels, as published models have them: the processor's own count, which nothing is encoded for."""
    tower = {"image_size": 336, "patch_size": 14, "hidden_size": 16, "intermediate_size": 16}
    hf = llavanext(tmp_path / "ckpt", tower=tower)
    files = qap.convert(
        tmp_path / "ckpt", tmp_path / "gguf", quantize="F32", keep_positions=False, mmproj_type="f32", name="model"
    )
    count = object.__new__(transformers.LlavaNextProcessor)
    count.image_processor, count.patch_size, count.num_additional_image_tokens = processor(hf), 14, 0
    rng = np.random.default_rng(4)
    sizes = [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, np.log(4000), (192, 2))).astype(int) + 1]
    sizes += [(336, 336), (672, 672), (336, 672), (1008, 336), (1, 1), (1, 4000), (4000, 1), (337, 335)]
    with qap.VisionModel(files.mmproj, files.model, n_ctx=64, n_threads=1) as vlm:
        for width, height in sizes:
            (chunk,) = vlm._encoder.tokenize(_core.media_marker(), [(width, height)], add_special=False)
            assert chunk.n_tokens == count._get_number_of_features(height, width, 336, 336), (width, height)
