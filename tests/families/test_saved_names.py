"""A checkpoint as the current transformers saves it converts, and so does one with the names of the classes in memory.

Both have the same weights under other names; the files that llama.cpp's converter makes of them must be equal. One
process converts all of them: importing torch takes longer than the work. LLaVA's own converter: tests/convert.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from families.checkpoints import FAMILIES
from qap_gguf.convert.source.checkpoint import Checkpoint
from qap_gguf.convert.upstream.run import run_converter

NAMINGS = ("saved", "in memory")
# MiMo-VL has Qwen2.5-VL's classes. The names of HunyuanVL and Kimi in memory differ in every part; the converter
# takes none of them, which is an error.
NAMES = [name for name in FAMILIES if name not in ("mimo-vl", "hunyuan-vl", "kimi-k2.5", "kimi-vl")]


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """FAMILY/NAMING/checkpoint, mmproj.gguf and model.gguf."""
    pytest.importorskip("sentencepiece")
    root = tmp_path_factory.mktemp("names")
    runs: dict[str, list[str]] = {}
    for name in NAMES:
        family = FAMILIES[name]
        saved, other = (root / name / naming / "checkpoint" for naming in NAMINGS)
        model = family.make(saved)
        shutil.copytree(saved, other)
        for path in other.glob("model*.safetensors*"):
            path.unlink()
        model.save_pretrained(other, save_original_format=False)
        for folder in (saved, other):
            common = [str(folder), "--model-name", name, "--outtype", "f32", "--outfile"]
            runs[f"{folder} mmproj"] = [*common, str(folder.parent / "mmproj.gguf"), "--mmproj"]
            runs[f"{folder} model"] = [*common, str(folder.parent / "model.gguf")]
    run_converter(runs, "gpt-2", lambda *_: None)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("name", NAMES)
def test_both_namings_give_the_same_files(places: Path, name: str) -> None:
    for file in ("mmproj.gguf", "model.gguf"):
        saved, other = (tensors(places / name / naming / file) for naming in NAMINGS)
        assert len(saved) > 10
        assert saved.keys() == other.keys()
        for tensor, values in saved.items():
            assert np.array_equal(values, other[tensor]), tensor


def test_the_namings_differ(places: Path) -> None:
    """Else the test above says nothing."""
    names = {
        family: [set(Checkpoint(places / family / naming / "checkpoint", rename=str).tensors) for naming in NAMINGS]
        for family in NAMES
    }
    differ = [family for family, (saved, other) in names.items() if saved != other]
    assert len(differ) >= 7, differ
    saved, other = names["internvl"]
    assert any(tensor.startswith("vision_tower.encoder.layer.0.") for tensor in saved)
    assert any(tensor.startswith("language_model.model.layers.0.") for tensor in saved)
    assert any(tensor.startswith("model.vision_tower.") for tensor in other)
