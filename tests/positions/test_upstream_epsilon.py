"""libllama's qwen2vl does not read the epsilon of its norms (docs/upstream.md), which is why nothing is relabelled so.

When this fails, upstream has fixed it: docs/upstream.md and convert/relabel/rules.py say so then.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.gguf_files import build, i32_list
from positions.language_files import language_keys, language_tensors, logits, nmse

IDS = [1, *range(3, 60)]


def made(path: Path, arch: str, eps: float) -> Path:
    shape = {"bias": True, "eps": eps}
    sections = (f"{arch}.rope.dimension_sections", i32_list([8, 0, 0, 0]))
    return build(path, [*language_keys(arch, shape), sections], language_tensors(shape))


@pytest.mark.parametrize(("arch", "reads"), [("qwen2vl", False), ("paddleocr", True)])
def test_which_architectures_read_their_epsilon(arch: str, reads: bool, tmp_path: Path) -> None:
    small, large = (logits(made(tmp_path / f"{eps}.gguf", arch, eps), IDS) for eps in (1e-6, 0.5))
    assert (nmse(large, small) > 1e-3) is reads
