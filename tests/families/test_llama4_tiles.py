"""Llama 4's tiles against transformers: which canvas, which pixels, in which order, with which words around them.

The truth is the published processor's own code out of its source, for its module needs torchvision; Pillow resizes.
Its last step, which rounds pixels to bfloat16, is left out.
"""

from __future__ import annotations
import __future__

import ast
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import qap_gguf as qap
from conftest import Converted
from dropin.gguf_copy import rewrite
from qap_gguf import _core

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from transformers.image_transforms import group_images_by_shape, reorder_images, split_to_tiles  # noqa: E402
from transformers.image_utils import SizeDict  # noqa: E402
from transformers.models.llama4.processing_llama4 import Llama4Processor  # noqa: E402

from families import truth  # noqa: E402
from families.test_parity import FEATURES, nmse  # noqa: E402
from families.test_resize import smooth  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

SIDE, TOKENS = 64, 16  # of a tile: pixels of a side, tokens
SIZES = {
    "small": (40, 20),
    "one": (64, 64),
    "wide": (150, 60),
    "tall": (50, 400),
    "large": (700, 640),
    "thin": (900, 9),
}
TILES = "clip.vision.preproc_max_tiles"
Tiles = tuple[npt.NDArray[np.uint8], tuple[int, int]]  # (n, height, width, 3); lines and columns of the canvas


class Processor:
    """Functions of image_processing_llama4.py, and its _preprocess() with Pillow's resize."""

    def __init__(self) -> None:
        path = Path(transformers.__file__).parent / "models" / "llama4" / "image_processing_llama4.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        (own,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Llama4ImageProcessor"]
        functions += [node for node in own.body if isinstance(node, ast.FunctionDef) and node.name == "_preprocess"]
        self.names: dict[str, Any] = {
            "math": math, "torch": torch, "defaultdict": defaultdict, "lru_cache": lru_cache, "SizeDict": SizeDict,
            "group_images_by_shape": group_images_by_shape, "reorder_images": reorder_images,
            "split_to_tiles": split_to_tiles, "BatchFeature": lambda data, tensor_type: data,
            "tvF": SimpleNamespace(pad=self._pad),
        }  # fmt: skip
        flags = __future__.annotations.compiler_flag
        exec(compile(ast.Module(functions, []), str(path), "exec", flags, True), self.names)  # noqa: S102

    @staticmethod
    def _pad(images: Any, padding: list[int], fill: list[int]) -> Any:
        left, top, right, bottom = padding
        assert fill == [0, 0, 0]
        return torch.nn.functional.pad(images, (left, right, top, bottom))

    @staticmethod
    def resize(images: Any, size: Any, resample: Any) -> Any:
        """Lines first, then columns: Pillow from 13 on takes the cheaper order, the models were trained with that."""
        pixels = Image.fromarray(images[0].permute(1, 2, 0).numpy())
        across = pixels.resize((size.width, pixels.height), resample)
        found = np.asarray(across.resize((size.width, size.height), resample))
        return torch.tensor(found).permute(2, 0, 1)[None]

    @staticmethod
    def rescale_and_normalize(images: Any, *_words: Any) -> Any:
        return images

    def tiles(self, pixels: npt.NDArray[np.uint8], most: int) -> Tiles:
        found = self.names["_preprocess"](
            self, [torch.tensor(pixels.transpose(2, 0, 1).copy())], do_resize=True,
            size=SizeDict(height=SIDE, width=SIDE),
            resample=Image.Resampling.BILINEAR, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
            image_mean=None, image_std=None, max_patches=most, resize_to_max_canvas=False, disable_grouping=True,
            return_tensors=None,
        )  # fmt: skip
        lines, columns = (int(n) for n in found["aspect_ratios"][0])
        return found["pixel_values"][0].numpy().transpose(0, 2, 3, 1), (lines, columns)

    def grid(self, size: tuple[int, int], most: int) -> tuple[int, int]:
        """Lines and columns of the canvas for a picture of (width, height)."""
        known = torch.tensor(self.names["find_supported_resolutions"](most, SizeDict(height=SIDE, width=SIDE)))
        height, width = self.names["get_best_fit"]((size[1], size[0]), known)
        return int(height) // SIDE, int(width) // SIDE


def words(vlm: qap.VisionModel, size: tuple[int, int]) -> str:
    """What stands in a prompt for a picture, a tile as @."""
    found = vlm._encoder.tokenize(_core.media_marker(), [size], add_special=False)
    llama = vlm.language_model
    return "".join("@" if part.is_image else llama.detokenize(part.tokens, special=True).decode() for part in found)


def sizes() -> list[tuple[int, int]]:
    rng = np.random.default_rng(4)
    found = np.exp(rng.uniform(np.log(8), np.log(1500), (150, 2))).astype(int).tolist()
    found += [[64 * x, 64 * y] for x in range(1, 6) for y in range(1, 6)]
    found += [[64 * x - 1, 64 * y + 1] for x in range(1, 6) for y in range(1, 4)]
    found += [[n, n] for n in (1, 63, 65, 255, 256, 257)] + [[1200, 1], [1, 1200], [100, 4], [160, 128]]
    return [(width, height) for width, height in found]


@pytest.fixture(scope="module")
def files(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, Path, Any]]:
    """transformers' model, an mmproj of at most 4 tiles (the checkpoint's), one that does not say, the Llama."""
    hf, _, made = converted("llama-4")
    silent = rewrite(made.mmproj, tmp_path_factory.mktemp("llama4") / "mmproj.gguf", {TILES: None})
    llama = llama_cpp.Llama(str(made.model), n_ctx=64, verbose=False, n_threads=1)
    yield hf, made.mmproj, silent, llama
    llama.close()


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor()


@pytest.mark.parametrize("name", list(SIZES))
def test_features_equal_transformers(files: Any, processor: Processor, name: str) -> None:
    hf, _, mmproj, llama = files
    pixels = smooth(*SIZES[name]) if min(SIZES[name]) >= 20 else np.full((*SIZES[name][::-1], 3), 200, np.uint8)
    tiles, _ = processor.tiles(pixels, 16)
    normal = (tiles.astype("f4") / 255 - 0.5) / 0.5
    want = np.concatenate([truth.features("llama-4", hf, torch.tensor(tile.transpose(2, 0, 1))) for tile in normal])
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        image = vlm.encode(pixels)
    assert image.features.shape == want.shape == (len(tiles) * TOKENS, image.features.shape[1])
    rows = [nmse(a, b) for a, b in zip(image.features, want, strict=True)]
    print(f"\nllama-4 {name}: {len(tiles)} tiles, worst row {max(rows):.1e}")
    assert max(rows) <= FEATURES


@pytest.mark.parametrize("most", [4, 16])
def test_tiles_and_words_over_200_sizes(files: Any, processor: Processor, most: int) -> None:
    """Nothing is encoded. 4 is what the checkpoint says, 16 is for files that do not say."""
    mmproj, llama = files[1 if most == 4 else 2], files[3]
    assert len(sizes()) == 200
    grids = set()
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        for size in sizes():
            grid = processor.grid(size, most)
            want = Llama4Processor._prompt_split_image(None, grid, 1).replace("<|patch|>", "@")
            assert words(vlm, size) == want, size
            grids.add(grid)
    assert max(lines * columns for lines, columns in grids) == most
    print(f"\n{len(grids)} grids of at most {most} tiles")


def test_a_picture_has_the_size_that_it_has_in_training(files: Any, processor: Processor) -> None:
    """What is padding tells of the sides, to a token; the corners of the black are compared above."""
    mmproj, llama = files[2:]
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        for size in [(40, 20), (150, 60), (300, 100), (500, 130), (700, 100)]:
            pixels = np.full((size[1], size[0], 3), 200, np.uint8)
            tiles, _ = processor.tiles(pixels, 16)
            cells = (tiles == 0).all(-1).reshape(len(tiles), 4, SIDE // 4, 4, SIDE // 4).all((2, 4))
            np.testing.assert_array_equal(vlm.encode(pixels).padding, cells.ravel())
            assert cells.any()


def test_the_limit_on_tokens_takes_tiles_away(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mmproj, llama = files[2:]
    counts = {}
    for stock in ("0", "1"):
        monkeypatch.setenv("QAP_STOCK_ENCODER", stock)
        for limit in (None, 200, 100, 16 if stock == "0" else 48):
            with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1, max_image_tokens=limit) as vlm:
                counts[stock, limit] = max(vlm._encoder.count(size).n_tokens for size in sizes())
    assert counts == {
        ("0", None): 17 * TOKENS, ("0", 200): 12 * TOKENS, ("0", 100): 6 * TOKENS, ("0", 16): TOKENS,
        ("1", None): 10 * TOKENS, ("1", 200): 10 * TOKENS, ("1", 100): 5 * TOKENS, ("1", 48): 3 * TOKENS,
    }  # fmt: skip


def test_the_stock_encoder_cuts_by_its_own_rule(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mmproj, llama = files[2:]
    with qap.VisionModel(mmproj, llama, flash_attn=False, n_threads=1) as vlm:
        assert words(vlm, (500, 60)).count("@") == 9
        monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
        assert words(vlm, (500, 60)).count("@") == 4
