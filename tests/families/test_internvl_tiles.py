"""InternVL's tiles against transformers: how many for pictures of any size, and which, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import qap_gguf as qap
from conftest import Converted
from qap_gguf import _core

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families.test_parity import FEATURES, nmse  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

SIDE, TOKENS = 64, 16  # of a tile: pixels of a side, tokens
SIZES = {"small": (60, 20), "one tile": (70, 66), "wide": (200, 90), "tall": (60, 200)}
Loaded = tuple[Any, qap.VisionModel]


@pytest.fixture(scope="module")
def loaded(converted: Converted) -> Iterator[Loaded]:
    hf, _, files = converted("internvl")
    llama = llama_cpp.Llama(str(files.model), n_ctx=64, verbose=False, n_threads=1)
    with qap.VisionModel(files.mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        yield hf, vlm
    llama.close()


def tiles(width: int, height: int, pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """What the model is trained to get for a picture, by transformers' choice of a grid and Pillow's resize.

    Lines first, then columns: Pillow from 13 on takes the cheaper order, the models were trained with that.
    """
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    def resized(x: int, y: int) -> npt.NDArray[np.uint8]:
        across = Image.fromarray(pixels).resize((x, height), Image.Resampling.BICUBIC)
        return np.asarray(across.resize((x, y), Image.Resampling.BICUBIC))

    columns, rows = get_optimal_tiled_canvas((height, width), (SIDE, SIDE), 1, 12)
    whole = resized(columns * SIDE, rows * SIDE)
    places = [(y * SIDE, x * SIDE) for y in range(rows) for x in range(columns)]
    found = [whole[y : y + SIDE, x : x + SIDE] for y, x in places]
    return [*found, resized(SIDE, SIDE)] if len(found) > 1 else found


@pytest.mark.parametrize("name", list(SIZES))
def test_features_equal_transformers(loaded: Loaded, name: str) -> None:
    hf, vlm = loaded
    width, height = SIZES[name]
    noise = np.random.default_rng(9).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    values = np.stack([tile.astype("f4").transpose(2, 0, 1) / 255 for tile in tiles(width, height, pixels)])
    with torch.no_grad():
        out = hf.model.get_image_features(torch.tensor((values - 0.5) / 0.5))
    want = getattr(out, "pooler_output", out).numpy().reshape(-1, vlm._encoder.n_embd)
    image = vlm.encode(pixels)
    assert image.features.shape == want.shape
    rows = [nmse(a, b) for a, b in zip(image.features, want, strict=True)]
    print(f"\ninternvl {name}: {len(values)} tiles, worst row {max(rows):.1e}")
    assert max(rows) <= FEATURES


def test_number_of_tiles_over_200_sizes(loaded: Loaded) -> None:
    """transformers' processor counts, and nothing is encoded."""
    processor = transformers.GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True)
    rng = np.random.default_rng(4)
    sizes = np.exp(rng.uniform(np.log(8), np.log(1500), (190, 2))).astype(int).tolist()
    sizes += [[n, n] for n in (1, 63, 64, 65, 91, 128, 300)] + [[3, 900], [900, 3], [160, 128]]
    for width, height in sizes:
        found = loaded[1]._encoder.tokenize(_core.media_marker(), [(width, height)], add_special=False)
        want = processor.get_number_of_image_patches(height, width)
        assert [chunk.n_tokens for chunk in found if chunk.is_image] == [TOKENS] * want, (width, height)


def test_the_stock_encoder_does_not_tile_small_pictures(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = loaded[1]._encoder
    counts = []
    for stock in ("0", "1"):
        monkeypatch.setenv("QAP_STOCK_ENCODER", stock)
        found = encoder.tokenize(_core.media_marker(), [(60, 20)], add_special=False)
        counts.append(sum(chunk.is_image for chunk in found))
    assert counts == [4, 1]
