"""Every family against transformers on the same weights, in f32: features and logits, dense and pruned.

transformers is the truth. Stock libmtmd's figures (QAP_STOCK_ENCODER=1) are computed beside ours; docs/upstream.md
tells where they differ, and why. The figures of docs/models.md come from `pytest -s tests/families/test_parity.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

import qap_gguf as qap
from conftest import Converted
from qap_gguf import _core

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families import truth  # noqa: E402
from families.checkpoints import FAMILIES, Family  # noqa: E402
from families.checkpoints_grid import (  # noqa: E402
    EXAONE_SPECIAL,
    GLM_SPECIAL,
    HUNYUAN_SPECIAL,
    KIMI_SPECIAL,
    KIMI_VL_SPECIAL,
    PADDLE_SPECIAL,
)
from families.checkpoints_newer import JANUS_SPECIAL  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

Array = npt.NDArray[Any]
FEATURES, LOGITS = 1e-5, 1e-4
BETWEEN_KERNELS, QUANTIZED = 1e-3, 0.5  # of q4_0: activations are rounded to 8 bits
BEFORE, BETWEEN, AFTER = [1, 300, 45, 301], [302, 46], [303, 47, 304]
# families whose tokens are made of places, not of patches, or without layers: no attention can be given to them
NO_ATTENTION = {"granite-4", "gemma-4-unified"}
# families whose stock encoder is wrong by so much at least
STOCK_IS_WRONG = {"internvl": 1e-2, "llama-4": 1e-2, "paddleocr-vl": 1e-4, "kimi-vl": 1e-3, "gemma-4": 3e-5}


def nmse(got: Array, want: Array) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


@dataclass
class Case:
    """One family, converted to f32, with transformers' model and a picture that needs no resize."""

    name: str
    family: Family
    hf: Any
    vlm: qap.VisionModel
    pixels: Array
    want: Array  # transformers' features, (n_tok, n_embd)

    def chunks(self) -> list[_core.Chunk]:
        """The image's chunks, fresh."""
        size = (self.pixels.shape[1], self.pixels.shape[0])
        found = self.vlm._encoder.tokenize(_core.media_marker(), [size], add_special=False)
        return [chunk for chunk in found if chunk.is_image]

    def tokens(self, image: qap.ImageEmbedding) -> Array:
        """Full rows of the first piece's tokens."""
        piece = image.pieces[0]
        rows = image.features[: piece.n_rows]
        return np.asarray(rows[piece.token_rows(range(piece.n_tokens))])


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, converted: Converted) -> Iterator[Case]:
    family = FAMILIES[request.param]
    hf, _, files = converted(request.param)
    width, height = family.image
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    normal = ((pixels.astype("f4") / 255 - family.mean) / family.std).astype("f4")
    want = truth.features(request.param, hf, torch.tensor(normal.transpose(2, 0, 1).copy()))
    llama = llama_cpp.Llama(
        str(files.model), n_ctx=1024, type_k=0, type_v=0, flash_attn=False, verbose=False, n_threads=2
    )
    with qap.VisionModel(files.mmproj, llama, flash_attn=False) as vlm:
        yield Case(request.param, family, hf, vlm, pixels, want)
    llama.close()


def test_features_equal_transformers_row_for_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    got = case.tokens(case.vlm.encode(case.pixels))
    assert got.shape == case.want.shape
    rows = [nmse(a, b) for a, b in zip(got, case.want, strict=True)]
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    stock = case.tokens(case.vlm._encoder.encode(case.pixels, hidden=False))  # not from the cache
    monkeypatch.undo()
    print(
        f"\n{case.name}: encoder NMSE {nmse(got, case.want):.1e}, worst row {max(rows):.1e}, "
        f"stock {nmse(stock, case.want):.1e}, {len(got)} tokens"
    )
    assert nmse(got, case.want) <= FEATURES
    assert max(rows) <= FEATURES
    if case.name in STOCK_IS_WRONG:
        assert nmse(stock, case.want) > STOCK_IS_WRONG[case.name]


def test_every_piece_of_a_picture_that_is_no_larger_than_a_tile_is_the_picture(case: Case) -> None:
    image = case.vlm.encode(case.pixels)
    first = image.pieces[0].n_rows
    for i in range(1, len(image.pieces)):
        assert nmse(image.features[i * first : (i + 1) * first], image.features[:first]) <= FEATURES


def test_faster_kernels_give_the_same(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repacked q4_0 against q4_0, and both beside f32: no weight lies there that is read in another way."""
    made = qap.requantize(case.vlm._encoder.path, tmp_path / "mmproj-q4_0.gguf", "q4_0")
    rows, n_bytes = [], []
    for value in ("0", "1"):
        monkeypatch.setenv("QAP_ENCODER_REPACK", value)
        with qap.VisionModel(made.path, case.vlm._language.llama, flash_attn=False, n_threads=1) as vlm:
            rows.append(vlm._encoder.encode(case.pixels, hidden=False).features)
            n_bytes.append(vlm._encoder.repacked_bytes)
    whole = case.vlm.encode(case.pixels).features
    print(
        f"\n{case.name}: {made.changed} matrices q4_0, {n_bytes[1]} bytes repacked, NMSE {nmse(rows[1], rows[0]):.1e}, "
        f"to f32 {nmse(rows[1], whole):.1e}"
    )
    assert n_bytes[0] == 0
    layers = 0 if case.name == "gemma-4-unified" else 4
    assert made.changed >= max(1, 4 * layers)  # of each layer, where query, key and value are one
    assert nmse(rows[1], rows[0]) <= BETWEEN_KERNELS
    assert nmse(rows[1], whole) < QUANTIZED


def prefill(case: Case, parts: list[list[int] | tuple[Array, Any]], positions: str) -> Array:
    """Logits after a prompt of token ids and (rows, indices or None) of the image's first piece."""
    language = case.vlm._language
    language.reset()
    for part in parts:
        if isinstance(part, list):
            language.prefill(part)
        else:
            rows, indices = part
            case.vlm._encoder.prefill(case.chunks()[0], np.ascontiguousarray(rows), indices, positions, 512)
    return np.asarray(case.vlm.last_logits())


def policies(case: Case) -> list[str]:
    return ["compact"] if case.vlm._encoder.places == "none" else ["compact", "keep"]


def kept_places(case: Case, indices: Array, piece: Any, policy: str) -> tuple[Array, int] | None:
    """(time, row, column) of kept tokens, and where the text goes on: what truth.logits() takes."""
    if policy == "compact" or case.vlm._encoder.places == "none":
        return None
    if case.name == "hunyuan-vl":
        rows = piece.rows_of(indices)
        return truth.hunyuan_places(rows, piece.n_columns, piece.n_tokens // piece.n_columns)
    if case.vlm._encoder.places == "index":  # they count like text, and leave gaps
        return np.repeat(np.asarray(indices)[:, None], 3, axis=1), piece.n_tokens
    line, column = np.divmod(indices, piece.n_columns)
    after = max(piece.n_tokens // piece.n_columns, piece.n_columns)
    return np.stack([np.zeros_like(line), line, column], 1), after


def test_attention_is_that_of_the_last_layer_over_the_patches_of_a_token(case: Case) -> None:
    if case.name in NO_ATTENTION:
        image = case.vlm.encode(case.pixels)
        assert image.received is None
        assert image.attention is None
        (report,) = qap.check_files(case.vlm._encoder.path).files
        assert report.semantics == ("text",)
        return
    normal = ((case.pixels.astype("f4") / 255 - case.family.mean) / case.family.std).astype("f4")
    of_class, received = truth.attention(case.name, case.hf, torch.tensor(normal.transpose(2, 0, 1).copy()))
    image = case.vlm.encode(case.pixels)
    n = image.pieces[0].n_tokens
    assert image.received is not None
    assert (image.attention is None) == (of_class is None)
    assert nmse(image.received[:n], received) <= FEATURES
    if of_class is not None and image.attention is not None:
        assert nmse(image.attention[:n], of_class) <= FEATURES


@pytest.mark.parametrize("part", [1, 2, 8], ids=["dense", "half", "eighth"])
def test_first_answer_token_equals_transformers(case: Case, part: int) -> None:
    image = case.vlm.encode(case.pixels)
    piece = image.pieces[0]
    n_keep = max(1, piece.n_tokens // part)
    shares = qap.PruneConfig(n_keep=n_keep * len(image.pieces), select="dpp")
    cut = case.vlm.prune(image, shares).pieces[0]
    assert len(cut.indices) == n_keep
    rows = image.features[: piece.n_rows][piece.rows_of(cut.indices)]
    np.testing.assert_array_equal(rows, cut.features)
    for policy in policies(case):
        place = kept_places(case, cut.indices, piece, policy)
        want = truth.logits(case.name, case.hf, [BEFORE, rows, AFTER], [None, place, None])
        got = prefill(case, [BEFORE, (cut.features, cut.indices), AFTER], policy)[: len(want)]
        error = nmse(got - got.mean(), want - want.mean())
        print(f"\n{case.name}: logits NMSE {error:.1e} with {n_keep} of {piece.n_tokens} tokens, {policy}")
        assert error <= LOGITS


def test_two_images_with_text_between(case: Case) -> None:
    """The second is cut to a half; positions and masks of one image must not leak into the other."""
    image = case.vlm.encode(case.pixels)
    piece = image.pieces[0]
    whole = np.ascontiguousarray(image.features[: piece.n_rows])
    half = np.arange(0, piece.n_tokens, 2, dtype=np.int32)
    rows = np.ascontiguousarray(whole[piece.rows_of(half)])
    every = np.arange(piece.n_tokens, dtype=np.int32)
    places: list[Any] = [None, kept_places(case, every, piece, "keep"), None]
    places += [kept_places(case, half, piece, "keep"), None]
    want = truth.logits(case.name, case.hf, [BEFORE, whole, BETWEEN, rows, AFTER], places)
    got = prefill(case, [BEFORE, (whole, None), BETWEEN, (rows, half), AFTER], "auto")[: len(want)]
    assert nmse(got - got.mean(), want - want.mean()) <= LOGITS


def test_keep_is_refused_where_positions_have_one_dimension(case: Case) -> None:
    image = case.vlm.encode(case.pixels)
    cfg = qap.PruneConfig(n_keep=image.n_tokens // 2, positions="keep")
    places = case.vlm._encoder.places
    if places != "none":
        shape = (image.n_tokens // 2, 3) if places == "grid" else (image.n_tokens // 2,)
        assert case.vlm.prune(image, cfg).positions.shape == shape
    else:
        with pytest.raises(qap.UnsupportedError, match="relabel its file with qap-gguf convert --keep-positions"):
            case.vlm.prune(image, cfg)


# --- what goes into a prompt, counted by hand ---

#: pixels that make a token, by the checkpoint's patch size and merging
PER_TOKEN = {
    "qwen2-vl": 16, "qwen2.5-vl": 28, "qwen3-vl": 16, "qwen3.5": 16, "pixtral": 8, "mistral-3": 16, "lfm2-vl": 32,
    "exaone-4.5": 28, "mimo-vl": 28, "gemma-4": 24, "gemma-4-unified": 24, "minicpm-v-4.6": 32, "janus-pro": 8,
}  # fmt: skip
#: texts that stand around an image
AROUND = {
    "qwen2-vl": ["<|vision_start|>", "<|vision_end|>"],
    "qwen2.5-vl": ["<|vision_start|>", "<|vision_end|>"],
    "qwen3-vl": ["<|vision_start|>", "<|vision_end|>"],
    "qwen3.5": ["<|vision_start|>", "<|vision_end|>"],
    "smolvlm": [
        *("<fake_token_around_image>", "<row_1_col_1>", "\n\n"),  # its one tile, as where there are more
        *("<fake_token_around_image>", "<global-img>", "<fake_token_around_image>"),
    ],
    "gemma-3": ["<start_of_image>", "<end_of_image>"],
    "internvl": ["<img>", "</img>"],
    "pixtral": ["[IMG_END]"],
    "mistral-3": ["[IMG_END]"],
    "llama-4": ["<|image_start|>", "<|image|>", "<|image_end|>"],
    "lfm2-vl": ["<|image_start|>", "<|image_end|>"],
    "glm-4.1v": GLM_SPECIAL[1:],
    "glm-ocr": GLM_SPECIAL[1:],
    "paddleocr-vl": PADDLE_SPECIAL[1:],
    "exaone-4.5": EXAONE_SPECIAL,
    "mimo-vl": ["<|vision_start|>", "<|vision_end|>"],
    "hunyuan-vl": HUNYUAN_SPECIAL[:2],
    "kimi-vl": KIMI_VL_SPECIAL,
    "kimi-k2.5": KIMI_SPECIAL,
    "minicpm-v-4.6": ["<image>", "</image>"],
    "gemma-4": ["<|image>", "<image|>"],
    "gemma-4-unified": ["<|image>", "<image|>"],
    "granite-4": ["\n"],
    "lighton-ocr": [],
    "janus-pro": JANUS_SPECIAL[:2],
}


@dataclass
class Count:
    """What a prompt takes: text tokens, image tokens, cells of the KV cache, positions."""

    text: int = 0
    image: int = 0
    cells: int = 0
    positions: int = 0


def with_blank_lines(parts: list[str | None]) -> list[str | None]:
    """A blank line before and after each image, in one text with what stands there."""
    whole = "".join("\n\n\0\n\n" if part is None else part for part in parts)
    pieces = [piece for text in whole.split("\0") for piece in (text, None)]
    return [piece for piece in pieces[:-1] if piece != ""]


def counted(case: Case, parts: list[str | None], part: int, policy: str) -> Count:
    """None is the image; one token of `part` of it is kept."""
    width, height = case.family.image
    side = PER_TOKEN.get(case.name, 16)
    lines, columns = height // side, width // side
    breaks = lines - 1 if case.name in ("pixtral", "mistral-3") else lines + 2 if case.name == "hunyuan-vl" else 0
    if case.name == "granite-4":  # an overview above a tile of the same size, whose lines end with a row each
        breaks, lines = lines, 2 * lines
    pieces = 2 if case.name == "smolvlm" else 1
    kept = pieces * max(1, lines * columns // part)
    found = Count(text=len(case.vlm.language_model.tokenize(b"", add_bos=True)))
    if case.name == "gemma-3":  # blank lines around an image, one token with the line breaks beside them
        parts = with_blank_lines(parts)
    for what in parts:
        if what is None:
            found.text += len(AROUND[case.name])
            found.image += kept
            found.cells += kept + breaks
            flat = case.name == "hunyuan-vl" or case.vlm._encoder.places == "index"
            own = lines * columns + breaks if flat else max(lines, columns)
            found.positions += own if policy == "keep" else kept + breaks
        else:
            found.text += len(case.vlm.language_model.tokenize(what.encode(), add_bos=False, special=True))
    found.cells += found.text
    found.positions += found.text
    return found


PROMPTS: dict[str, list[str | None]] = {
    "image first": [None, "What is this?"],
    "image last": ["What is this?", None, "\n"],
    "two, text between": ["one: ", None, " two: ", None, " which?"],
    "the same twice": [None, None, "which?"],
    "no image": ["no picture at all"],
}


@pytest.mark.parametrize("part", [1, 2, 8], ids=["dense", "half", "eighth"])
@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS.keys())
def test_tokens_and_positions_of_a_prompt(case: Case, parts: list[str | None], part: int) -> None:
    for policy in policies(case):
        image = case.vlm.encode(case.pixels)
        cut = None
        if part > 1:
            cfg = qap.PruneConfig(n_keep=max(1, image.n_tokens // part), positions=policy)
            cut = case.vlm.prune(image, cfg)
        want = counted(case, parts, part, policy if cut is not None or case.vlm._encoder.places != "grid" else "keep")
        stats = qap.GenerationStats()
        prompt = "".join(_core.media_marker() if what is None else what for what in parts)
        case.vlm.answers.place(prompt, [(image, cut)] * parts.count(None), stats, add_special=True)
        got = Count(stats.n_prompt_tokens, stats.n_image_kept, stats.n_kv, case.vlm._language.n_past)
        assert got == want


#: what the processors of transformers write around the tiles of a picture of two tiles side by side; @ is a tile
TILES = {
    "llama-4": "<|image_start|>@<|tile_x_separator|>@<|tile_y_separator|><|image|>@<|image_end|>",
    "internvl": "<img>@@@</img>",
    "minicpm-v-4.6": "<image>@</image><slice>@</slice><slice>@</slice>",
}


def test_the_words_between_tiles(case: Case) -> None:
    if case.name not in TILES:
        pytest.skip("its picture has one tile, see the test above")
    width, height = case.family.image
    chunks = case.vlm._encoder.tokenize(_core.media_marker(), [(2 * width, height)], add_special=False)
    llama = case.vlm.language_model
    words = ["@" if chunk.is_image else llama.detokenize(chunk.tokens, special=True).decode() for chunk in chunks]
    assert "".join(words) == TILES[case.name]
