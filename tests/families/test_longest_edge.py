"""Pictures of Pixtral, Mistral 3, LightOnOCR: as they are up to the longest edge of training, then scaled down to it.

The truth is transformers' own rule for the sizes, and Pillow for the pixels. 200 sizes more are in test_counts.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from PIL import Image

import qap_gguf as qap
from conftest import Converted
from dropin.gguf_copy import rewrite

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from transformers.models.pixtral import image_processing_pil_pixtral as pixtral

from families.test_resize import BICUBIC, nmse, smooth

pytestmark = [pytest.mark.parity, pytest.mark.slow]

CELLS = {"pixtral": 8, "mistral-3": 16, "lighton-ocr": 16}  # pixels of a token's side in the small files
EDGE = 128  # of the small files
#: as published: the longest edge, the side of a token
PUBLISHED = {"pixtral": (1024, 16), "mistral-3": (1540, 28), "lighton-ocr": (1540, 28)}
BREAKS = ("pixtral", "mistral-3")  # a row after each line but the last
SIZES = [(3000, 2000), (2000, 3000), (4000, 4000), (900, 900), (1025, 400), (8000, 90), (300, 200), (40, 30), (5, 3)]


def trained(size: tuple[int, int], edge: int, cell: int) -> tuple[int, int]:
    """(width, height) that the processor gives a picture of `size`."""
    sides = pixtral.get_resize_output_image_size(np.zeros((size[1], size[0], 3), np.uint8), edge, cell, "channels_last")
    return int(sides[1]), int(sides[0])


@pytest.fixture(scope="module", params=list(CELLS))
def files(request: pytest.FixtureRequest, converted: Converted) -> Iterator[tuple[str, Path, Any]]:
    made = converted(request.param)[2]
    llama = llama_cpp.Llama(str(made.model), n_ctx=64, verbose=False, n_threads=1)
    yield request.param, made.mmproj, llama
    llama.close()


@pytest.mark.parametrize("size", [(300, 170), (131, 400), (140, 128)], ids=str)
def test_a_large_picture_becomes_what_pillow_makes_of_it(
    files: tuple[str, Path, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mmproj, llama = files
    pixels = smooth(*size)
    width, height = trained(size, EDGE, CELLS[name])
    # columns first: Pillow from 13 on takes the cheaper order, the models were trained with that
    small = np.asarray(Image.fromarray(pixels).resize((width, size[1]), BICUBIC).resize((width, height), BICUBIC))

    def features(picture: Any) -> Any:
        with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
            return vlm.encode(picture).features

    want = features(small)
    assert nmse(features(pixels), want) <= 1e-5
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    assert nmse(features(pixels), want) > 1e-3


def test_tokens_with_the_published_edge(files: tuple[str, Path, Any], tmp_path: Path) -> None:
    """In files of patches of 8 pixels: as many tokens a side as published, so all sizes in proportion."""
    name, source, llama = files
    edge, cell = PUBLISHED[name][0] * CELLS[name] // PUBLISHED[name][1], CELLS[name]
    assert (edge, cell) == ((512, 8) if name == "pixtral" else (880, 16))
    mmproj = rewrite(source, tmp_path / "mmproj.gguf", {"clip.vision.image_size": edge})
    sizes = [(width * cell // PUBLISHED[name][1], height * cell // PUBLISHED[name][1]) for width, height in SIZES]
    sizes = [(max(1, width), max(1, height)) for width, height in sizes]
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        found = [vlm._encoder.count(size) for size in sizes]
    for size, counts in zip(sizes, found, strict=True):
        width, height = trained(size, edge, cell)
        lines = height // cell
        n_special = lines - 1 if name in BREAKS else 0
        assert (counts.n_tokens, counts.n_special) == (lines * (width // cell), n_special), size
    assert max(counts.n_tokens for counts in found) == (4096 if name == "pixtral" else 3025)
    assert min(counts.n_tokens for counts in found) == 1
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1, max_image_tokens=1024) as vlm:
        held = [vlm._encoder.count(size).n_tokens for size in sizes]
    assert max(held) == 1024
    for free, few in zip(found, held, strict=True):
        assert few == free.n_tokens if free.n_tokens <= 1024 else 800 < few <= 1024


def test_a_picture_too_thin_for_the_edge_keeps_a_line(files: tuple[str, Path, Any]) -> None:
    """transformers makes no line of it, and stops."""
    name, mmproj, llama = files
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        for size in ((4000, 3), (3, 4000)):
            assert 0 in trained(size, EDGE, CELLS[name])
            assert vlm._encoder.count(size).n_tokens == EDGE // CELLS[name]


def test_a_file_without_an_edge_keeps_the_limits_of_upstream(files: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, source, llama = files
    mmproj = rewrite(source, tmp_path / "mmproj.gguf", {"clip.vision.image_size": 0})
    if name == "lighton-ocr":  # upstream would end the process
        with pytest.raises(qap.ModelFileError, match="the longest edge of a picture, got 0"):
            qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1)
        return
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        assert vlm._encoder.count((4096, 4096)).n_tokens == 1024
        assert vlm._encoder.count((8, 8)).n_tokens >= 8
        cell = CELLS[name]
        assert vlm._encoder.count((10 * cell - 1, 5 * cell - 1)).n_tokens == 50
