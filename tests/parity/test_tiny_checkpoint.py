"""The packaged model's checkpoint, built from what the repository holds, is whole and can be trained further."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dino_checkpoint
import tiny_checkpoint

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
demo_run: Any = pytest.importorskip("demo_run")
tdm: Any = pytest.importorskip("train_demo_model")

pytestmark = pytest.mark.parity


def test_the_checkpoint_is_whole(tiny_llava: Path) -> None:
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    model, said = load(tiny_llava, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    assert model.config.image_seq_length == tdm.N


def test_its_tokens_are_those_of_the_packaged_model(tiny_llava: Path, texts: list[str]) -> None:
    import llama_cpp

    import qap_gguf as qap

    theirs = llama_cpp.Llama(str(qap.packaged_model().model), vocab_only=True, verbose=False)
    ours = transformers.AutoTokenizer.from_pretrained(tiny_llava)
    for text in [text for text in texts if text] + ["<|im_start|>user\n<image>\nx<|im_end|>"]:
        want = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours(text, add_special_tokens=False).input_ids == want, text


def test_what_is_exported_builds_the_same_again(tiny_llava: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    learner = tdm.Learner(tiny_llava)
    run = demo_run.Run(learner.model, learner.lessons, tiny_llava, tmp_path / "out", 1e-3)
    run.export(tmp_path / "again.safetensors", tdm.TAKEN)
    first, again = load_file(tiny_checkpoint.TRAINED), load_file(tmp_path / "again.safetensors")
    assert set(again) == set(first)
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


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
