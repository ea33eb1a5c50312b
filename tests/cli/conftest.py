"""A model in place of the native one, so that the command is tested without building anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import qap_gguf
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ImageError, QapError


class FakeGeneration:
    """Pieces of a text; statistics once they are exhausted."""

    def __init__(self, pieces: list[Any], counts: list[int], total: int) -> None:
        self.pieces, self.total, self.closed = pieces, total, False
        self.kept = [np.arange(count, dtype=np.int32) for count in counts]
        self.n_kept = sum(counts)

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
        self.stats = SimpleNamespace(
            n_image_kept=self.n_kept, prefill_s=0.02,
            to_dict=lambda: {
                "n_image_tokens": self.total, "n_image_kept": self.n_kept, "n_prompt_tokens": 20, "n_generated": 2,
                "n_kv": 40, "n_cached": 0, "encode_s": 0.05, "score_s": 0.001, "select_s": 0.0001, "prefill_s": 0.02,
                "decode_s": 0.04,
            },
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


class FakeModel:
    """VisionModel without a model: remembers its arguments, says what it was told to."""

    says: ClassVar[list[Any]] = []
    opened: ClassVar[list[FakeModel]] = []
    file_config: Any = None
    why_not_prunable: str | None = None

    def __init__(self, mmproj: Any = None, model: Any = None, **kwargs: Any) -> None:
        self.files, self.kwargs = (mmproj, model), kwargs
        self.limit = os.environ.get("QAP_MAX_IMAGE_TOKENS")
        self.forced = os.environ.get("QAP_FORCE_FAMILY")
        self.encoded: list[Path] = []
        self.encoded_for: list[PruneConfig | None] = []
        self.calls: list[dict[str, Any]] = []
        self.closed = False
        FakeModel.opened.append(self)

    @property
    def default_prune(self) -> PruneConfig | None:
        return self.file_config or (None if self.why_not_prunable else PruneConfig())

    @classmethod
    def only(cls) -> FakeModel:
        """The one that was opened."""
        (opened,) = cls.opened
        return opened

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def load_fitting(self, images: Any, prune: Any, text: str = "") -> list[Any]:
        return list(images)

    def encode(self, image: Path, prune: PruneConfig | None = None) -> Any:
        if "broken" in str(image):
            raise ImageError(f"expected a picture, got {image};\nchoose another file")
        self.encoded.append(image)
        self.encoded_for.append(prune)
        return SimpleNamespace(path=image, n_tokens=144, n_real=144, n_left=144, attention=np.ones(144, np.float32))

    def prune(self, image: Any, cfg: PruneConfig, prompt: str | None = None) -> Any:
        return SimpleNamespace(indices=np.arange(cfg.count(image.n_tokens), dtype=np.int32))

    def generate(self, parts: list[Any], *, prune: Any, max_tokens: int, temperature: float, stream: bool) -> Any:
        images = [part for part in parts if not isinstance(part, str)]
        total = sum(image.n_tokens for image in images)
        kept = [image.n_tokens if prune is None else prune.count(image.n_tokens) for image in images]
        self.calls.append({"parts": parts, "prune": prune, "max_tokens": max_tokens, "temperature": temperature})
        return FakeGeneration(list(FakeModel.says), kept, total)

    def chat(self, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
        self.calls.append(
            {"messages": json.loads(json.dumps(messages, default=lambda image: str(image.path)))} | kwargs
        )
        reply = FakeModel.says.pop(0)
        if isinstance(reply, QapError):
            raise reply
        return FakeGeneration(reply, [18], 144)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeModel]:
    """Put the fake in the package's place and return its class: `says` is what the next one will say."""
    files = SimpleNamespace(mmproj=tmp_path / "mmproj.gguf", model=tmp_path / "model.gguf", sample=tmp_path / "s.png")
    monkeypatch.setattr(FakeModel, "says", ["a ", "dog"])
    monkeypatch.setattr(FakeModel, "opened", [])
    for name, value in {"VisionModel": FakeModel, "packaged_model": lambda: files}.items():
        monkeypatch.setattr(qap_gguf, name, value, raising=False)
    return FakeModel
