"""How many tokens a picture becomes, for 200 sizes: libmtmd's count beside the rule of each family's processor.

The rules are transformers' own functions. Nothing is encoded. Without ours, upstream rounds halves up and computes in
float, so that some sizes get a line of tokens more or less than in training (docs/upstream.md).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from conftest import Converted

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from transformers.image_processing_utils import select_best_resolution  # noqa: E402
from transformers.models.gemma4 import image_processing_pil_gemma4 as gemma4  # noqa: E402
from transformers.models.glm4v import image_processing_pil_glm4v as glm  # noqa: E402
from transformers.models.hunyuan_vl import image_processing_pil_hunyuan_vl as hunyuan  # noqa: E402
from transformers.models.minicpmv4_6 import image_processing_pil_minicpmv4_6 as minicpm  # noqa: E402
from transformers.models.paddleocr_vl import image_processing_pil_paddleocr_vl as paddleocr  # noqa: E402
from transformers.models.pixtral import image_processing_pil_pixtral as pixtral  # noqa: E402
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen  # noqa: E402

from families import checkpoints  # noqa: E402, F401  (before the module that it takes in)
from families.checkpoints_grid import LIMITS  # noqa: E402
from families.checkpoints_newer import GRANITE_GRID, MINICPM_SLICE  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LOW, HIGH = LIMITS["shortest_edge"], LIMITS["longest_edge"]
Sides = Callable[[int, int], tuple[int, int]]  # (height, width) of a picture -> those that it is resized to
Count = Callable[[int, int], tuple[int, int]]  # width, height -> its tokens, its special rows


def by_glm(height: int, width: int) -> tuple[int, int]:
    found: tuple[int, int] = glm.smart_resize(2, height, width, 2, 16, 2 * 8 * 256, 2 * 4096 * 256)
    return found


def by_qwen(factor: int, low: int, high: int) -> Sides:
    return lambda height, width: qwen.smart_resize(height, width, factor, low, high)


def by_pixtral(cell: int) -> Sides:
    def sides(height: int, width: int) -> tuple[int, int]:
        found = pixtral.get_resize_output_image_size(np.zeros((height, width, 3), np.uint8), 128, cell, "channels_last")
        return max(cell, found[0]), max(cell, found[1])  # it makes no line at all of the thinnest, and stops

    return sides


def kimi_rule(most: int) -> Sides:
    """The sides of the canvas by navit_resize(), out of the source: its module needs torchvision."""
    folder = Path(transformers.__file__).parent / "models" / "kimi_k25"
    tree = ast.parse((folder / "image_processing_kimi_k25.py").read_text(encoding="utf-8"))
    (rule,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "navit_resize"]
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([rule], []), "navit_resize", "exec"), names)  # noqa: S102
    return lambda height, width: names["navit_resize"](height, width, 8, 2, most, 512)[1]


def minicpm_rule(width: int, height: int) -> tuple[int, int]:
    """Overview and slices."""
    processor = minicpm.MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=MINICPM_SLICE)
    size, own = (height, width), (MINICPM_SLICE, 8, "16x")
    grid = processor.get_sliced_grid(size, 9, MINICPM_SLICE)
    parts = [processor.find_best_resize(size, *own, allow_upscale=grid is None)]
    if grid is not None:
        parts.append(processor.get_refine_size(size, grid, *own, allow_upscale=True))
    return sum(lines // 32 * (columns // 32) for lines, columns in parts), 0


def granite_rule(width: int, height: int) -> tuple[int, int]:
    """Overview and tiles, 4 x 4 tokens each, less the padding of the grid."""
    kind = transformers.Granite4VisionProcessor
    own = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=GRANITE_GRID), patch_size=8,
                          downsample_rate="2/4", num_additional_image_tokens=0)  # fmt: skip
    own._get_unpadded_features = lambda *words: kind._get_unpadded_features(own, *words)
    rows = kind._get_number_of_features(own, height, width, 64, 64)
    best = select_best_resolution((height, width), GRANITE_GRID)
    special = own._get_unpadded_features(height, width, 4, 4, best[0] // 64, best[1] // 64)[1]
    return rows - special, special


def grid(rule: Sides, side: int, special: Callable[[int], int] = lambda lines: 0) -> tuple[Count, int]:
    """Pictures of one grid of tokens."""

    def count(width: int, height: int) -> tuple[int, int]:
        trained_height, trained_width = rule(height, width)
        lines = trained_height // side
        return lines * (trained_width // side), special(lines)

    return count, side


#: family -> its rule, and pixels of a token's side
RULES: dict[str, tuple[Count, int]] = {
    "qwen2-vl": grid(by_qwen(16, 8 * 256, 4096 * 256), 16),  # the limits that libmtmd has for every Qwen-VL
    "glm-4.1v": grid(by_glm, 16),
    "paddleocr-vl": grid(lambda height, width: paddleocr.smart_resize(height, width, 16, LOW, HIGH), 16),
    "exaone-4.5": grid(by_qwen(28, LOW, HIGH), 28),
    "mimo-vl": grid(by_qwen(28, 8 * 784, 4096 * 784), 28),
    "kimi-vl": grid(kimi_rule(4096), 16),
    "kimi-k2.5": grid(kimi_rule(1024), 16),
    "hunyuan-vl": grid(
        lambda height, width: hunyuan.smart_resize(height, width, 16, LOW, HIGH), 16, lambda lines: lines + 2
    ),
    "pixtral": grid(by_pixtral(8), 8, lambda lines: lines - 1),
    "mistral-3": grid(by_pixtral(16), 16, lambda lines: lines - 1),
    "lighton-ocr": grid(by_pixtral(16), 16),
    "gemma-4": grid(by_qwen(24, 70 * 576, 1120 * 576), 24),  # libmtmd's rule, see the last test
    "gemma-4-unified": grid(by_qwen(24, 70 * 576, 1120 * 576), 24),
    "minicpm-v-4.6": (minicpm_rule, 32),
    "granite-4": (granite_rule, 16),
}
STOCK_AGREES = {"granite-4"}


def sizes(side: int) -> list[tuple[int, int]]:
    """(width, height): random ones, halves of tokens, and squares; none has a side below a token's."""
    found = [(int(w), int(h)) for w, h in np.random.default_rng(3).integers(side, 2500, (160, 2))]
    halves = [(side * n + side // 2, side * (n + 3)) for n in range(1, 21)]
    return [*found, *halves, *((n, n) for n in range(1800, 2200, 20))]


@pytest.mark.parametrize("name", RULES)
def test_as_many_tokens_as_the_processor_counts(
    name: str, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, side = RULES[name]
    _, _, made = converted(name)
    llama = llama_cpp.Llama(str(made.model), n_ctx=64, verbose=False, n_threads=1)
    try:
        with qap.VisionModel(made.mmproj, llama, flash_attn=False, n_threads=1) as vlm:
            others = 0
            for width, height in sizes(side):
                counts = vlm._encoder.count((width, height))
                assert (counts.n_tokens, counts.n_special) == rule(width, height), (width, height)
                monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
                others += vlm._encoder.count((width, height)).n_tokens != counts.n_tokens
                monkeypatch.undo()
    finally:
        llama.close()
    print(f"\n{name}: {len(sizes(side))} sizes; stock counts {others} of them otherwise")
    assert len(sizes(side)) == 200
    assert (others == 0) == (name in STOCK_AGREES)


def test_gemma_4s_pictures_keep_their_size_where_transformers_scales_them(converted: Converted) -> None:
    """A known difference (docs/upstream.md): transformers gives every picture 280 tokens or a few less."""
    _, _, made = converted("gemma-4")
    with qap.VisionModel(made.mmproj, made.model, n_ctx=64, flash_attn=False, n_threads=1) as vlm:
        for side, ours, theirs in ((240, 100, 256), (480, 400, 256)):
            assert vlm._encoder.count((side, side)).n_tokens == ours
            sides = gemma4.get_aspect_ratio_preserving_size(side, side, 8, 280 * 9, 3)
            assert sides[0] // 24 * (sides[1] // 24) == theirs
