"""The functions of emoji_scenes.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from qap_gguf.eval.scoring import is_right

SCENES = Path("scenes")


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question."""
    return [Image.open(SCENES / doc["image"]).convert("RGB")]


def right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the expected one, as `qap-gguf eval` counts short answers."""
    return {"right": float(is_right(results[0], doc["answer"]))}
