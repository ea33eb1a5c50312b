"""Two tiny CLIPs, each converted into the mmproj of a tiny LLaVA, with transformers' model and tokenizer beside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)
pytest.importorskip("torch")
pytest.importorskip("transformers")

import qap_gguf as qap
from clip_text.clip_checkpoint import CASES, EXTRA, Case, make_clip
from qap_gguf.pruning.clip_text import ClipTextTower


@dataclass(frozen=True)
class Clip:
    """A checkpoint, the mmproj file (f32) that carries its text tower, the open tower, and transformers' own."""

    case: Case
    folder: Path
    mmproj: Path
    model: Path
    tower: ClipTextTower
    hf: Any
    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        """Token ids by transformers."""
        found: list[int] = self.tokenizer(text, truncation=True, max_length=self.case.n_ctx).input_ids
        return found


@pytest.fixture(scope="session")
def clip_texts(texts: list[str]) -> list[str]:
    return [*texts, *EXTRA]


@pytest.fixture(scope="session", params=list(CASES))
def clip(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clip_texts: list[str], plain_llava: Path
) -> Iterator[Clip]:
    import torch
    import transformers

    case = CASES[request.param]
    folder = make_clip(tmp_path_factory.mktemp("clip") / "ckpt", clip_texts, case)
    files = qap.convert(
        plain_llava,
        tmp_path_factory.mktemp("gguf"),
        quantize="F32",
        mmproj_type="f32",
        clip_text=folder,
        keep_positions=False,
    )
    hf = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tower = ClipTextTower.open(files.mmproj, n_threads=2)
    assert tower is not None
    with tower:
        yield Clip(case, folder, files.mmproj, files.model, tower, hf, tokenizer)
