"""Early drop against the same drop in torch (masked.py), on random weights in f32: scores, tokens, features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qap_gguf as qap
from conftest import Converted
from qap_gguf import _core
from qap_gguf.defaults import to_params
from qap_gguf.vision.tiles import piece_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from early.masked import Drop, Tower, dropping  # noqa: E402
from families import truth  # noqa: E402
from families.checkpoints import FAMILIES  # noqa: E402

pytestmark = pytest.mark.parity

Array = npt.NDArray[Any]
LIMIT = 1e-5
LLAVA = {"llava-clip": False, "llava-siglip": True}
#: patches of a token per side, the class token's position, whether a token's patches stand one after another
SHAPES: dict[str, tuple[int, int | None, bool]] = {
    "smolvlm": (2, None, False), "internvl": (2, 0, False), "gemma-3": (2, None, False), "lfm2-vl": (2, None, False),
    "pixtral": (1, None, False), "mistral-3": (2, None, False), "llama-4": (2, -1, False),
    "qwen2-vl": (2, None, True), "qwen3-vl": (2, None, True), "glm-4.1v": (2, None, True),
    "paddleocr-vl": (2, None, False), "hunyuan-vl": (2, None, False), "kimi-k2.5": (2, None, False),
    "kimi-vl": (2, None, False), "gemma-4": (3, None, False), "qwen2.5-vl": (2, None, True),
    "mimo-vl": (2, None, True), "exaone-4.5": (2, None, True), "lighton-ocr": (2, None, False),
    "janus-pro": (1, None, False),
}  # fmt: skip


def nmse(got: Array, want: Array) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


@dataclass
class Case:
    """A family in both worlds."""

    name: str
    vlm: qap.VisionModel
    tower: Tower
    pixels: Array
    features: Callable[[Array], Array]  # transformers' of pixels, (n_tok, n_embd)

    def dropped(self, config: qap.PruneConfig, after: int, n_early: int) -> tuple[Drop, Array]:
        """The drop in torch, and the features of what it left."""
        drop = Drop(after, n_early)
        with torch.no_grad(), dropping(self.tower, drop, config):
            features = self.features(self.pixels)
        return drop, features[drop.kept]

    def with_copies(self) -> tuple[Array, Array]:
        """The picture with tokens that repeat others, and those that do not, (n_left,)."""
        rows, columns = (side // self.tower.merge for side in self.tower.grid)
        size = self.pixels.shape[0] // rows
        pixels, repeats = (
            self.pixels.copy(),
            np.random.default_rng(1).permutation(rows * columns)[: rows * columns // 3],
        )
        first = int(np.setdiff1d(np.arange(rows * columns), repeats)[0])
        cells = pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2)  # a view
        later = np.sort(repeats[repeats > first])
        for token in later:
            cells[token // columns, token % columns] = cells[first // columns, first % columns]
        return pixels, np.setdiff1d(np.arange(rows * columns, dtype=np.int32), later)


def llava(name: str, make_llava: Callable[..., Path]) -> tuple[Any, Path, Array, Array, Array]:
    """transformers' model, its folder, a picture, and the mean and deviation that its processor takes out of one."""
    folder = make_llava(siglip=LLAVA[name], vision={"image_size": 56}, top={"vision_feature_layer": -2})
    hf: Any = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = np.random.default_rng(5).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    mean, std = np.array([0.1, 0.2, 0.3], "f4"), np.array([0.4, 0.5, 0.6], "f4")  # of make_llava's processor
    return hf, folder, pixels, mean, std


def tower_of(name: str, hf: Any, pixels: Array) -> Tower:
    module = truth.tower_of(name, hf)
    size = module.config.patch_size
    size = size[0] if isinstance(size, (list, tuple)) else size
    grid = (pixels.shape[0] // size, pixels.shape[1] // size)
    merge, cls, consecutive = SHAPES.get(name, (1, 0 if name == "llava-clip" else None, False))
    cls = grid[0] * grid[1] if cls == -1 else cls
    order = window_order(module.config, grid) if name in truth.WINDOWS else None
    return Tower(module, grid, merge, cls, consecutive, order)


def window_order(config: Any, grid: tuple[int, int]) -> Array:
    """The tokens window by window, from the left above, as the towers of Qwen2.5-VL have them."""
    rows, columns = (side // config.spatial_merge_size for side in grid)
    side = config.window_size // config.patch_size // config.spatial_merge_size
    numbers = np.arange(rows * columns).reshape(rows, columns)
    windows = [
        numbers[y : y + side, x : x + side].reshape(-1) for y in range(0, rows, side) for x in range(0, columns, side)
    ]
    return np.concatenate(windows)


@pytest.fixture(scope="module", params=[*LLAVA, *SHAPES])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, converted: Converted
) -> Iterator[Case]:
    name = request.param
    if name in LLAVA:
        hf, folder, pixels, mean, std = llava(name, request.getfixturevalue("make_llava"))
        files = qap.convert(
            folder, tmp_path_factory.mktemp(name), quantize="F32", keep_positions=False, mmproj_type="f32", name="model"
        )
    else:
        (hf, _, files), family = converted(name), FAMILIES[name]
        width, height = family.image
        pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
        mean, std = np.array(family.mean, "f4"), np.array(family.std, "f4")

    def features(shown: Array) -> Array:
        values = torch.tensor(((shown.astype("f4") / 255 - mean) / std).astype("f4").transpose(2, 0, 1).copy())
        if name not in LLAVA:
            return truth.features(name, hf, values)
        out = hf.get_image_features(pixel_values=values[None])
        return np.asarray(getattr(out, "pooler_output", out)[0].numpy())

    with qap.VisionModel(files.mmproj, files.model, n_ctx=256, n_threads=1, flash_attn=False) as vlm:
        yield Case(name, vlm, tower_of(name, hf, pixels), pixels, features)


def first_piece(case: Case, pixels: Array, config: qap.PruneConfig) -> tuple[Array, dict[str, Any]]:
    """Rows of the tokens that are left, and report, of the first tile."""
    native = case.vlm._encoder._native
    chunks = case.vlm._encoder.tokenize(_core.media_marker(), [pixels], add_special=False)
    chunk = next(chunk for chunk in chunks if chunk.is_image)
    rows = native.encode(chunk, True, False, to_params(config))
    report = chunk.report()
    assert report is not None
    return rows[piece_of(len(rows), report).token_rows(report["early"])], report


def near_of(tower: Tower, drop: Drop) -> Array:
    """Cosines of what was left with what was dropped, of what the layer gave minus its mean, (n_left, n_dropped)."""
    x = tower.tokens(drop.hidden)
    x = x.reshape(len(x), -1).astype(np.float64)
    unit = (x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True)
    return np.asarray(unit[drop.kept] @ np.delete(unit, drop.kept, axis=0).T)


@pytest.mark.parametrize("after", [1, 2])
def test_scores_tokens_and_features_are_those_of_torch(case: Case, after: int) -> None:
    config = qap.PruneConfig(n_keep=1, encoder_keep=0.5, encoder_layer=after)
    if after == 1 and case.name in truth.WINDOWS:  # each second layer sees the whole picture
        with pytest.raises(qap.QapError, match=r"expected a multiple of 2, after whose layers .* got 1; leave it out"):
            case.vlm.encode(case.pixels, config)
        return
    got, report = first_piece(case, case.pixels, config)
    n_early = config.count_early(report["n_total"])
    drop, want = case.dropped(config, after, n_early)
    print(
        f"\n{case.name} after {after}: {n_early} of {report['n_total']}, scores "
        f"{nmse(report['early_total'], drop.total):.1e}, features {nmse(got, want):.1e}"
    )
    assert 0 < n_early < report["n_total"]
    assert nmse(report["early_total"], drop.total) <= LIMIT
    np.testing.assert_array_equal(report["early"], drop.kept)
    assert nmse(report["early_near"], near_of(case.tower, drop)) <= LIMIT
    assert nmse(got, want) <= LIMIT


def test_duplicates_are_out_of_sight_from_the_first_layer_on(case: Case) -> None:
    config = qap.PruneConfig(n_keep=1, duplicates=0)
    pixels, distinct = case.with_copies()
    got, report = first_piece(case, pixels, config)
    np.testing.assert_array_equal(report["early"], distinct)
    assert report["early_total"] is report["early_near"] is None
    assert 0 < len(distinct) < report["n_total"]
    drop = Drop(0, len(distinct), kept=distinct)
    with torch.no_grad(), dropping(case.tower, drop, config):
        want = case.features(pixels)[distinct]
    with torch.no_grad():
        dense = case.features(pixels)[distinct]
    print(
        f"\n{case.name}: {len(distinct)} of {report['n_total']}, features {nmse(got, want):.1e}, "
        f"were all seen {nmse(dense, want):.1e}"
    )
    assert nmse(got, want) <= LIMIT
    assert nmse(dense, want) > 10 * LIMIT  # it does matter which ones are seen


@pytest.mark.parametrize("name", truth.WINDOWS)
def test_flash_attention_of_windows(name: str, converted: Converted) -> None:
    _, _, files = converted(name)
    width, height = FAMILIES[name].image
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    config, found = qap.PruneConfig(n_keep=4, encoder_keep=0.5), {}
    for flash in (False, True):  # with it the mask is f16
        with qap.VisionModel(files.mmproj, files.model, n_ctx=256, n_threads=1, flash_attn=flash) as vlm:
            found[flash] = vlm.encode(pixels, config)
    np.testing.assert_array_equal(found[True].kept_early, found[False].kept_early)
    kept = ~found[True].dropped
    assert nmse(found[True].features[kept], found[False].features[kept]) <= 1e-4
