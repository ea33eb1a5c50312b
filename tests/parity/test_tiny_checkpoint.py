"""The packaged model's checkpoint, built from what the repository holds, is whole and can be trained further."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import dino_checkpoint
import tiny_checkpoint
from parity.built import check_export, check_tokens, check_whole

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
demo_run: Any = pytest.importorskip("demo_run")
tdm: Any = pytest.importorskip("train_demo_model")

pytestmark = pytest.mark.parity


def test_the_checkpoint_is_whole(tiny_llava: Path) -> None:
    check_whole(transformers.LlavaForConditionalGeneration, tiny_llava, tdm.N)


def test_its_tokens_are_those_of_the_packaged_model(tiny_llava: Path, texts: list[str]) -> None:
    check_tokens(tiny_llava, [text for text in texts if text] + ["<|im_start|>user\n<image>\nx<|im_end|>"])


def test_what_is_exported_builds_the_same_again(tiny_llava: Path, tmp_path: Path) -> None:
    check_export(tdm, tiny_llava, tiny_checkpoint.TRAINED, tmp_path)


def test_what_cannot_be_built_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert tiny_checkpoint.main([str(tmp_path / "there")]) == 1
    assert tiny_checkpoint.main([str(tmp_path / "o"), "--trained", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "choose another folder" in said[0]
    assert "--trained" in said[1]
    assert not (tmp_path / "o").exists()


def test_a_library_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for main in (tiny_checkpoint.main, lambda words: dino_checkpoint.main(["none.whl", *words])):
        assert main([str(tmp_path / "o")]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert "pip install safetensors" in said[0]
