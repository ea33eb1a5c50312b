"""Keys and tensors of every kind of output, compared line by line with tests/convert/golden/.

Weights and vocabularies are left out (other tests compare these); types, names, order, shapes and other values count.
To write the listings anew after a change that was meant, and look at what changed:

    QAP_WRITE_GOLDEN=1 python -m pytest tests/convert/test_golden.py && git diff tests/convert/golden
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

import qap_gguf as qap
from clip_text.clip_checkpoint import CASES as CLIPS
from clip_text.clip_checkpoint import make_clip
from qap_gguf.convert import convert
from qap_gguf.convert.relabel.api import DIGEST

GOLDEN = Path(__file__).with_name("golden")
_SHORT = 8  # members of a list that are shown


def listing(path: Path) -> str:
    """One line for each key and each tensor, in the file's order."""
    reader = gguf.GGUFReader(path)
    lines = []
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        kind = ", ".join(t.name for t in field.types)
        value = field.contents()
        if name == DIGEST:  # of the weights too
            value = f"{len(value)} digits"
        lines.append(f"{name} [{kind}] = {_shown(value)}")
    for tensor in reader.tensors:
        shape = ", ".join(str(int(n)) for n in reversed(tensor.shape))
        lines.append(f"{tensor.name} ({shape}) {tensor.tensor_type.name}")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        if len(value) > _SHORT:
            return f"{len(value)} members"
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:.7g}" if isinstance(value, float) else repr(value)


Make = Callable[[Path], Path]


@pytest.fixture
def outputs(make_llava: Any, plain_llava: Path, texts: list[str]) -> dict[str, Make]:
    """Name of a listing -> what makes the file in a folder."""

    def both(which: str, folder: Path | None = None, checkpoint: dict[str, Any] | None = None, **options: Any) -> Make:
        def make(out: Path) -> Path:
            source = folder or (make_llava(**checkpoint) if checkpoint else plain_llava)
            settings: dict[str, Any] = {"quantize": "F16", "keep_positions": False} | options
            made = convert(source, out, name="tiny", **settings)
            return Path(getattr(made, which))

        return make

    def with_text_tower(out: Path) -> Path:
        clip = out / "clip"
        make_clip(clip, texts, CLIPS["gelu"])
        return convert(plain_llava, out, name="tiny", quantize="F16", mmproj_type="q8_0", clip_text=clip).mmproj

    def annotated(out: Path) -> Path:
        plain = convert(plain_llava, out, name="tiny", quantize="F16").mmproj
        return qap.annotate(plain, out / "annotated.gguf", qap.PruneConfig(keep_ratio=0.25, alpha="dynamic"))

    siglip = {"siglip": True, "dtype": "bfloat16"}
    return {
        **{f"mmproj-clip-{kind}": both("mmproj", mmproj_type=kind) for kind in ("f32", "f16", "bf16", "q8_0")},
        "mmproj-siglip": both("mmproj", checkpoint=siglip),
        "mmproj-last-layer": both("mmproj", checkpoint={"top": {"vision_feature_layer": -1}}),
        "mmproj-defaults": both("mmproj", prune=qap.PruneConfig(n_keep=5, select="dpp")),
        "mmproj-text-tower": with_text_tower,
        "mmproj-annotated": annotated,
        "model-llama-F16": both("model"),
        "model-llama-Q8_0": both("model", quantize="Q8_0"),
        "model-llama-Q4_K_M": both("model", quantize="Q4_K_M"),
        "model-tied-BF16": both("model", checkpoint={"top": {"tie_word_embeddings": True}}, quantize="BF16"),
        "model-mistral": both("model", checkpoint={"language": "Mistral", "text": {"sliding_window": None}}),
        "model-qwen2": both("model", checkpoint={"language": "Qwen2", "text": {"head_dim": 16}}),
        "model-relabelled": both("model", keep_positions=None),
    }


NAMES = [
    "mmproj-clip-f32", "mmproj-clip-f16", "mmproj-clip-bf16", "mmproj-clip-q8_0", "mmproj-siglip", "mmproj-last-layer",
    "mmproj-defaults", "mmproj-text-tower", "mmproj-annotated", "model-llama-F16", "model-llama-Q8_0",
    "model-llama-Q4_K_M", "model-tied-BF16", "model-mistral", "model-qwen2", "model-relabelled",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_listing(name: str, outputs: dict[str, Make], tmp_path: Path) -> None:
    got = listing(outputs[name](tmp_path))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("QAP_WRITE_GOLDEN"):
        path.write_text(got, encoding="utf-8")
        pytest.skip(f"wrote {path.name}")
    assert got.splitlines() == path.read_text(encoding="utf-8").splitlines()


def test_every_output_has_one_listing(outputs: dict[str, Make]) -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(NAMES) == sorted(outputs)
