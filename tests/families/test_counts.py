"""How many tokens a picture becomes, for 200 sizes: libmtmd's count beside the rule of each family's processor.

The rules are transformers' own functions. Nothing is encoded. Without ours, upstream rounds halves up and computes in
float, so that some sizes get a line of tokens more or less than in training (docs/upstream.md).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from conftest import Converted

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from transformers.models.glm4v import image_processing_pil_glm4v as glm  # noqa: E402
from transformers.models.hunyuan_vl import image_processing_pil_hunyuan_vl as hunyuan  # noqa: E402
from transformers.models.paddleocr_vl import image_processing_pil_paddleocr_vl as paddleocr  # noqa: E402
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen  # noqa: E402

from families import checkpoints  # noqa: E402, F401  (before the module that it takes in)
from families.checkpoints_grid import LIMITS  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LOW, HIGH = LIMITS["shortest_edge"], LIMITS["longest_edge"]


def by_glm(height: int, width: int) -> tuple[int, int]:
    return glm.smart_resize(2, height, width, 2, 16, 2 * 8 * 256, 2 * 4096 * 256)


def by_qwen(factor: int, low: int, high: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda height, width: qwen.smart_resize(height, width, factor, low, high)


def kimi_rule(most: int) -> Callable[[int, int], tuple[int, int]]:
    """The sides of the canvas by navit_resize(), out of the source: its module needs torchvision."""
    folder = Path(transformers.__file__).parent / "models" / "kimi_k25"
    tree = ast.parse((folder / "image_processing_kimi_k25.py").read_text(encoding="utf-8"))
    (rule,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "navit_resize"]
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([rule], []), "navit_resize", "exec"), names)  # noqa: S102
    return lambda height, width: names["navit_resize"](height, width, 8, 2, most, 512)[1]


#: family -> (height, width) of a picture -> those that it is resized to, and pixels of a token's side
RULES: dict[str, tuple[Any, int]] = {
    "qwen2-vl": (by_qwen(16, 8 * 256, 4096 * 256), 16),  # the limits that libmtmd has for every Qwen-VL
    "glm-4.1v": (by_glm, 16),
    "paddleocr-vl": (lambda height, width: paddleocr.smart_resize(height, width, 16, LOW, HIGH), 16),
    "exaone-4.5": (by_qwen(28, LOW, HIGH), 28),
    "mimo-vl": (by_qwen(28, 8 * 784, 4096 * 784), 28),
    "kimi-vl": (kimi_rule(4096), 16),
    "kimi-k2.5": (kimi_rule(1024), 16),
    "gemma-4": (by_qwen(24, 70 * 576, 1120 * 576), 24),
    "hunyuan-vl": (lambda height, width: hunyuan.smart_resize(height, width, 16, LOW, HIGH), 16),
}


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
                trained_height, trained_width = rule(height, width)
                lines, columns = trained_height // side, trained_width // side
                special = lines + 2 if name == "hunyuan-vl" else 0
                counts = vlm._encoder.count((width, height))
                assert (counts.n_tokens, counts.n_special) == (lines * columns, special), (width, height)
                monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
                others += vlm._encoder.count((width, height)).n_tokens != lines * columns
                monkeypatch.undo()
    finally:
        llama.close()
    print(f"\n{name}: {len(sizes(side))} sizes; stock counts {others} of them otherwise")
    assert len(sizes(side)) == 200
    assert others > 0
