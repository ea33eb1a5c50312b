"""Damaged, swapped and foreign model files: one line and exit 1 from the command, ModelFileError from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qap_gguf as qap
from dropin.children import run_probe
from dropin.gguf_copy import data_start, patch_bytes, rewrite, tensor_bytes

Refuse = Callable[..., str]
RNG = np.random.default_rng(0)


def floats(*shape: int) -> Any:
    return (RNG.standard_normal(shape) * 0.05).astype(np.float32)


def cut(source: Path, target: Path, length: int) -> Path:
    target.write_bytes(source.read_bytes()[:length])
    return target


def words_of(mmproj: Path, model: Path) -> list[str | Path]:
    return ["--mmproj", mmproj, "-m", model]


def assert_refused(result: Mapping[str, Any], kind: str = "ModelFileError") -> None:
    assert result.get("error") == kind, result
    assert "QapError" in result["bases"]
    assert "\n" not in result["text"]
    assert result["text"].strip()


def test_files_cut_short_anywhere(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    """Inside the magic, the counts, the keys, the tensor table, the padding, the data, and one byte before the end."""
    cases: list[dict[str, Any]] = []
    for name, source in (("mmproj", packaged.mmproj), ("model", packaged.model)):
        size = source.stat().st_size
        first = data_start(source)
        for length in (0, 3, 4, 7, 16, 23, 24, 100, 900, first // 2, first - 40, first, first + 1, size // 2, size - 1):
            cases.append({name: cut(source, tmp_path / f"{name}-{length}.gguf", length)})
    for case, result in zip(cases, run_probe("vision", cases=cases), strict=True):
        assert_refused(result)
        assert Path(next(iter(case.values()))).name in result["text"]


def test_the_command_refuses_cut_files(tmp_path: Path, packaged: qap.PackagedModel, refused: Refuse) -> None:
    header = cut(packaged.mmproj, tmp_path / "header.gguf", 3000)
    assert "damaged or cut short" in refused(*words_of(header, packaged.model))
    data = cut(packaged.mmproj, tmp_path / "data.gguf", 4_000_000)
    line = refused(*words_of(data, packaged.model))
    assert "cut short" in line
    assert "4000000" in line
    model = cut(packaged.model, tmp_path / "model.gguf", 10_000_000)
    assert "cut short" in refused(*words_of(packaged.mmproj, model))


def test_files_of_another_kind(tmp_path: Path, packaged: qap.PackagedModel, refused: Refuse) -> None:
    empty, text = tmp_path / "empty.gguf", tmp_path / "text.gguf"
    empty.write_bytes(b"")
    text.write_text("GGUF is a file format.\n" * 50)
    for wrong in (empty, text):
        assert refused(*words_of(wrong, packaged.model)).startswith("expected a")
        assert refused(*words_of(packaged.mmproj, wrong)).startswith("expected a")
    assert "expected an mmproj file" in refused(*words_of(packaged.model, packaged.mmproj))
    assert "expected an mmproj file" in refused(*words_of(packaged.model, packaged.model))
    assert "expected a language model" in refused(*words_of(packaged.mmproj, packaged.mmproj))
    results = run_probe(
        "vision",
        cases=[
            {"mmproj": empty}, {"mmproj": text}, {"model": empty}, {"model": text}, {"mmproj": packaged.sample},
            {"mmproj": packaged.model, "model": packaged.mmproj}, {"model": packaged.mmproj},
            {"mmproj": tmp_path}, {"mmproj": ""}, {"model": "nul\0character"}, {"model": "x" * 5000},
        ],
    )  # fmt: skip
    for result in results:
        assert_refused(result)


def test_missing_files(tmp_path: Path, packaged: qap.PackagedModel, refused: Refuse) -> None:
    missing = tmp_path / "missing.gguf"
    for words in (words_of(missing, packaged.model), words_of(packaged.mmproj, missing)):
        line = refused(*words)
        assert str(missing) in line
        assert "check the path" in line


def test_an_mmproj_of_another_model(tmp_path: Path, packaged: qap.PackagedModel, refused: Refuse) -> None:
    """128 numbers a token where the language model reads 256."""
    other = rewrite(
        packaged.mmproj,
        tmp_path / "other.gguf",
        {"clip.vision.projection_dim": 128},
        {"mm.2.weight": floats(128, 256), "mm.2.bias": floats(128)},
    )
    line = refused(*words_of(other, packaged.model))
    assert "256" in line
    assert "128" in line
    (result,) = run_probe("vision", cases=[{"mmproj": other}])
    assert_refused(result)
    (handler,) = run_probe("chat", mmproj=other, settings=[{}])
    assert handler["error"] == "ValueError"


def test_headers_that_say_nonsense(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    changes: list[dict[str, Any]] = [
        {"clip.has_vision_encoder": False},
        {"clip.has_vision_encoder": None},
        {"clip.has_vision_encoder": "yes"},
        {"clip.projector_type": "nonsense"},
        {"clip.projector_type": None},
        {"clip.vision.image_mean": None},
        {"clip.vision.patch_size": 0},
        {"clip.vision.block_count": 99},
    ]
    cases = [{"mmproj": rewrite(packaged.mmproj, tmp_path / f"{i}.gguf", keys)} for i, keys in enumerate(changes)]
    for case, result in zip(changes, run_probe("vision", cases=cases), strict=True):
        assert "error" in result, case
        assert_refused(result)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["mm.2.bias", "v.position_embd.weight"])
def test_weights_that_are_not_finite(tmp_path: Path, packaged: qap.PackagedModel, name: str, value: float) -> None:
    offset, _ = tensor_bytes(packaged.mmproj, name)
    bad = patch_bytes(packaged.mmproj, tmp_path / "bad.gguf", offset + 40, np.float32(value).tobytes())
    dense, pruned = run_probe("vision", cases=[{"mmproj": bad}, {"mmproj": bad, "prune": {"n_keep": 18}}])
    for result in (dense, pruned):
        assert_refused(result, "NativeError")
        assert "finite" in result["text"]
        assert "mmproj" in result["text"]
    # the stock handler: pruning refuses such features, it does not rank them
    (result,) = run_probe("chat", mmproj=bad, settings=[{"default": {"n_keep": 18}}])
    assert result["error"] == "ValueError"


def test_the_command_names_weights_that_are_not_finite(
    tmp_path: Path, packaged: qap.PackagedModel, refused: Refuse
) -> None:
    offset, _ = tensor_bytes(packaged.mmproj, "mm.2.bias")
    bad = patch_bytes(packaged.mmproj, tmp_path / "bad.gguf", offset, np.float32(np.nan).tobytes())
    assert "expected finite features" in refused(*words_of(bad, packaged.model))
