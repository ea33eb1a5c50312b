"""The limits of SECURITY.md that are not those of pictures or model files: both sides of each."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf.convert.llava.config_section import Fields
from qap_gguf.convert.source.checkpoint import Checkpoint
from qap_gguf.errors import ArrayError, ConfigError, ConvertError
from qap_gguf.pruning.clip_text import ClipTextTower
from tiny_mmproj import tiny_tower


def test_features() -> None:
    """The largest float32 that is no more than 1e30, and the next one."""
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = np.float32(1e30)
    assert np.isfinite(qap.score(x).total).all()
    x[1, 2] = np.nextafter(np.float32(1e30), np.float32(np.inf))
    with pytest.raises(ArrayError, match="at most 1e\\+30"):
        qap.score(x)


def test_the_prompt_of_clips_text_tower(tmp_path: Path) -> None:
    path = tmp_path / "tower.gguf"
    path.write_bytes(tiny_tower())
    tower = ClipTextTower.open(path, n_threads=1)
    assert tower is not None
    with tower:
        assert len(tower.tokenize("a " * 2**19)) == tower.n_ctx  # 1 MiB
        with pytest.raises(ConfigError, match="prompt"):
            tower.tokenize("a " * 2**19 + "a")


def test_the_prompt_of_a_context(vlm: qap.VisionModel) -> None:
    """As many tokens as fit beside the one that is to come, and one more."""
    n_ctx = vlm._language.n_ctx

    def ask(n: int) -> int:
        pieces = vlm.generate(["a" + " a" * (n - 1)], max_tokens=1, stream=True)
        list(pieces)
        return pieces.stats.n_prompt_tokens

    around = ask(1) - 1  # the chat template's own
    assert ask(n_ctx - around - 1) == n_ctx - 1
    with pytest.raises(ConfigError, match="n_ctx"):
        ask(n_ctx - around)


def test_the_header_of_safetensors(tmp_path: Path) -> None:
    """100 MB are read (and here are no JSON); a byte more is not."""
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    for length, words in ((100 << 20, "cannot read the header"), ((100 << 20) + 1, "broken header")):
        path.write_bytes(length.to_bytes(8, "little"))
        os.truncate(path, 8 + (100 << 20) + 1)
        with pytest.raises(ConvertError, match=words):
            Checkpoint(tmp_path)


def test_layers_and_numbers_of_a_checkpoint() -> None:
    def read(key: str, number: int) -> int:
        return Fields("text_config", {key: number}, {}).integer(key)

    assert read("num_hidden_layers", 512) == 512
    assert read("hidden_size", 2**31 - 1) == 2**31 - 1
    for key, number in (("num_hidden_layers", 513), ("hidden_size", 2**31)):
        with pytest.raises(ConvertError, match=f"expected at most {number - 1} as text_config.{key}"):
            read(key, number)
