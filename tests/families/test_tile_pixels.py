"""The pixels of MiniCPM-V 4.6's slices and Granite 4's tiles, against transformers and Pillow.

Counts of both are in test_counts.py, pictures of one piece in test_resize.py.
"""

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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (  # noqa: E402
    MiniCPMV4_6ImageProcessorPil as MiniCPM,
)

from families import checkpoints, truth  # noqa: E402, F401  (before the module that it takes in)
from families.checkpoints_newer import GRANITE_GRID, MINICPM_SLICE  # noqa: E402
from families.test_next import Processor  # noqa: E402
from families.test_parity import FEATURES, nmse  # noqa: E402
from families.test_resize import LIMITS, smooth  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

Pixels = npt.NDArray[np.uint8]
SIZES = {"wide": (300, 130), "tall": (90, 260), "square": (260, 250)}


@pytest.fixture(scope="module")
def opened(converted: Converted, request: pytest.FixtureRequest) -> Iterator[tuple[Any, qap.VisionModel]]:
    hf, _, made = converted(request.param)
    llama = llama_cpp.Llama(str(made.model), n_ctx=64, verbose=False, n_threads=1)
    with qap.VisionModel(made.mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        yield hf, vlm
    llama.close()


def pieces_of(width: int, height: int, pixels: Pixels) -> list[Pixels]:
    """Overview and slices as MiniCPM-V is trained to get them: its own sizes, Pillow's pixels, lines first."""
    processor, own = MiniCPM(patch_size=8, scale_resolution=MINICPM_SLICE), (MINICPM_SLICE, 8, "16x")
    grid = processor.get_sliced_grid((height, width), 9, MINICPM_SLICE)
    assert grid is not None

    def resized(size: tuple[int, int]) -> Pixels:
        across = Image.fromarray(pixels).resize((size[1], height), Image.Resampling.BICUBIC)
        return np.asarray(across.resize((size[1], size[0]), Image.Resampling.BICUBIC))

    overview = resized(processor.find_best_resize((height, width), *own, allow_upscale=False))
    whole = resized(processor.get_refine_size((height, width), grid, *own, allow_upscale=True))
    lines, columns = whole.shape[0] // grid[0], whole.shape[1] // grid[1]
    places = [(y * lines, x * columns) for y in range(grid[0]) for x in range(grid[1])]
    return [overview, *(np.ascontiguousarray(whole[y : y + lines, x : x + columns]) for y, x in places)]


@pytest.mark.parametrize("opened", ["minicpm-v-4.6"], indirect=True)
@pytest.mark.parametrize("name", list(SIZES))
def test_minicpm_slices(opened: tuple[Any, qap.VisionModel], name: str) -> None:
    """transformers' rows of each piece."""
    hf, vlm = opened
    pixels = smooth(*SIZES[name])
    pieces = pieces_of(*SIZES[name], pixels)
    assert len(pieces) > 2
    want = [
        truth.features("minicpm-v-4.6", hf, torch.tensor((piece.astype("f4").transpose(2, 0, 1) / 255 - 0.5) / 0.5))
        for piece in pieces
    ]
    image = vlm.encode(pixels)
    assert [piece.n_tokens for piece in image.pieces] == [len(rows) for rows in want]
    got = np.split(image.features, np.cumsum([len(rows) for rows in want])[:-1])
    off = [nmse(a, b) for a, b in zip(got, want, strict=True)]
    print(f"\nminicpm-v-4.6 {name}: {len(pieces)} pieces, worst {max(off):.1e}")
    assert max(off) <= LIMITS["minicpm-v-4.6"]


@pytest.mark.parametrize("opened", ["granite-4"], indirect=True)
@pytest.mark.parametrize("name", list(SIZES))
def test_granite_tiles(opened: tuple[Any, qap.VisionModel], name: str) -> None:
    """transformers' rows, of the overview, then the grid with its ends of lines, less the padding."""
    hf, vlm = opened
    pixels = smooth(*SIZES[name])
    processor = Processor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        image_grid_pinpoints=GRANITE_GRID,
    )  # fmt: skip
    values = processor(pixels, return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        out = hf.model.get_image_features(values["pixel_values"], values["image_sizes"])
    planes = [rows[0] for _, rows in sorted(out.deepstack_features, key=lambda stream: stream[0])]
    want = np.asarray(torch.cat(planes, dim=-1).numpy())
    image = vlm.encode(pixels)
    assert image.features.shape == want.shape
    rows = [nmse(a, b) for a, b in zip(image.features, want, strict=True)]
    print(f"\ngranite-4 {name}: {len(rows)} rows, worst {max(rows):.1e}")
    assert max(rows) <= FEATURES
