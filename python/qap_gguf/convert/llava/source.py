"""A LLaVA checkpoint in either layout, as one record: config and tensor names are those of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf.convert.llava.original import TOWER, Tower, is_original, original_name, translate
from qap_gguf.convert.source.checkpoint import Checkpoint, read_json
from qap_gguf.errors import ConvertError

__all__ = ["LlavaSource", "open_llava"]


@dataclass(frozen=True)
class LlavaSource:
    """`config` and `processor` (of the images) are parsed JSON; `folder` holds the tokenizer."""

    folder: Path
    config: dict[str, Any]
    checkpoint: Checkpoint
    processor: dict[str, Any]


def open_llava(folder: Path, config: dict[str, Any], vision_tower: str | Path | None) -> LlavaSource:
    """Opens a LLaVA's folder whose parsed config.json is `config`.

    vision_tower: the folder of the vision tower; for the authors' layout only. Its weights are taken where the
    checkpoint carries none: a tower that was trained on with the rest is inside, and another one than the folder's.

    Raises ConvertError where a part is missing or not known.
    """
    if not is_original(config):
        if vision_tower is not None:
            raise ConvertError(
                "vision_tower: expected a checkpoint in LLaVA's original layout (mm_vision_tower in config.json), got "
                "one that has its tower inside; leave it out"
            )
        return LlavaSource(folder, config, Checkpoint(folder), _processor(folder))
    tower = None if vision_tower is None else Tower(vision_tower)
    checkpoint = Checkpoint(folder, rename=original_name)
    inside = any(name.startswith(TOWER) for name in checkpoint.tensors)
    if not inside and tower is None:
        raise ConvertError(
            f"expected vision_tower=... (--vision-tower), the folder of {config['mm_vision_tower']!r}, for {folder} "
            "carries no tower; fetch it and give it"
        )
    translated = translate(config, None if tower is None else tower.config)
    if tower is not None and not inside:
        checkpoint.tensors |= tower.tensors()
    # The authors' code takes the tower's own image processor.
    return LlavaSource(folder, translated, checkpoint, {} if tower is None else tower.processor)


def _processor(folder: Path) -> dict[str, Any]:
    """The image processor's config, whichever of its two names it has."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    raise ConvertError(
        f"expected preprocessor_config.json or processor_config.json in {folder}, found neither; "
        "fetch the whole checkpoint"
    )
