"""The benchmark that measures a conversion's time and memory runs, and its large shape is LLaVA-1.5-7B's."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return BENCHMARKS / "convert_7b.py"


def test_the_small_form_converts_and_nothing_is_left(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, script, "--small", "--folder", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Q4_0: ")
    assert "GB resident" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_large_form_has_the_weights_of_the_real_model(script: Path) -> None:
    import convert_7b

    shapes = convert_7b.tensors(convert_7b.Shape())
    parts = dict.fromkeys(("language_model", "vision_tower", "multi_modal_projector"), 0)
    for name, shape in shapes.items():
        parts[name.split(".")[0]] += math.prod(shape)
    # Llama 2 7B with 64 more tokens (twice, untied); CLIP ViT-L/14-336 without its own projection
    assert parts["language_model"] == 6_738_415_616 + 2 * 64 * 4096
    assert parts["vision_tower"] == 303_507_456
    assert parts["multi_modal_projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
