"""Pictures many times as long as wide: their short side is one token, and then no limit on pixels holds the long one.

Before they were refused, Gemma 4 with a limit on tokens looked up positions that its table did not have, which ends the
process; MiniCPM-V 4.6 made a mask of patches x patches numbers, of up to 1.4 GB at its own size; and limits on tokens
did not hold. Upstream refuses sides above 65,536 pixels after the resize. Each model is tried in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.children import python, run_probe
from tiny_mmproj import tiny_mmproj

#: Encodes pictures of these sizes; a refusal is a text, else the number of tokens.
TRY = """
import json, sys
import numpy as np
import qap_gguf as qap
mmproj, most, sizes = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = []
with qap.VisionModel(mmproj, qap.packaged_model().model, n_ctx=256, n_threads=1, max_image_tokens=most) as vlm:
    for width, height in sizes:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        try:
            found.append(vlm.encode(pixels).n_tokens)
        except qap.ImageError as err:
            found.append(str(err))
print(json.dumps(found))
"""


def tried(folder: Path, projector: str, sizes: list[tuple[int, int]], most: int | None = None) -> list[Any]:
    folder.mkdir(exist_ok=True)
    path = folder / "mmproj.gguf"
    path.write_bytes(tiny_mmproj(projector))
    done = python(TRY, path, json.dumps(most), json.dumps(sizes))
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout)
    return found


def refusal(most: int, size: tuple[int, int], n_tokens: int) -> str:
    return (
        f"picture: expected one that becomes at most {most} tokens, got {size[0]} x {size[1]} pixels, which is so thin "
        f"that it becomes {n_tokens}; cut it into shorter parts"
    )


#: projector -> the last size that runs, the first that does not, with the tokens of the largest piece, and the limit
LIMITS: dict[str, tuple[tuple[int, int], tuple[int, int], int, int]] = {
    "gemma4v": ((1, 1120 * 16 + 8), (1, 1120 * 16 + 9), 1120, 4481),
    "gemma4uv": ((1120 * 16 + 8, 1), (1120 * 16 + 9, 1), 1120, 4481),
    "minicpmv4_6": ((1, 10_000), (1, 10_200), 4, 202),
}


@pytest.mark.parametrize("projector", LIMITS)
def test_at_the_limit_and_beyond(projector: str, tmp_path: Path) -> None:
    last, first, most, n_tokens = LIMITS[projector]
    longest = (1, 46_000) if last[0] == 1 else (46_000, 1)
    fits, over, far = tried(tmp_path, projector, [last, first, longest])
    assert isinstance(fits, int), fits
    if projector != "minicpmv4_6":  # whose picture has slices, too
        assert fits == most
    assert refusal(most, first, n_tokens) in over
    assert f"got {longest[0]} x {longest[1]} pixels" in far


def test_a_limit_that_was_asked_for(tmp_path: Path) -> None:
    """At most 64 tokens: 1 x 46,000 would be 1,715, at which Gemma 4 aborted. Without a limit Qwen2-VL takes it."""
    found = tried(tmp_path, "qwen2vl_merger", [(1, 46_000), (10, 2000), (1, 1024)], most=64)
    assert refusal(64, (1, 46_000), 1715) in found[0]
    (over,) = tried(tmp_path / "4", "gemma4v", [(1, 46_000)], most=64)
    assert refusal(64, (1, 46_000), 1715) in over
    assert found[1:] == [113, 64]  # 200 times as long as wide, as the models' own processors allow
    with qap.VisionModel(tmp_path / "mmproj.gguf", qap.packaged_model().model, n_ctx=256, n_threads=1) as vlm:
        assert vlm._encoder.count((1, 46_000)).n_tokens == 2875


def test_positions_that_the_model_does_not_have(tmp_path: Path) -> None:
    """A limit above the model's own lets a picture have more lines than its table of positions."""
    (over,) = tried(tmp_path, "gemma4v", [(1, 17_936)], most=4000)  # LIMITS has the last that fits
    assert "expected at most 2240 patches a side, for which the model has positions, got 2 x 2242; lower" in over


def test_the_stock_handler(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    """The library refuses the picture; upstream's handler makes a ValueError of that."""
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(tiny_mmproj("gemma4v"))
    Image.new("RGB", (1, 46_000)).save(tmp_path / "thin.png")
    (result,) = run_probe("chat", mmproj=path, image=tmp_path / "thin.png", settings=[{}])
    assert result.get("error") == "ValueError", result
