"""What an mmproj file's header says about its model: projector, tokens of an image, and the signals that it can give.

Facts: tools/mtmd/clip-impl.h (keys and tensor names), native/src/clip-text/load.cpp (the text tower's keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qap_gguf.convert.llava.clip_text import PREFIX as TEXT_PREFIX
from qap_gguf.files.gguf import GgufInfo

__all__ = ["MmprojFacts", "mmproj_facts"]

_IMAGE_KEYS = (
    "image_size", "patch_size", "image_min_pixels", "image_max_pixels", "preproc_image_size", "preproc_min_tiles",
    "preproc_max_tiles",
)  # fmt: skip


@dataclass(frozen=True)
class MmprojFacts:
    """What the header of an mmproj file says.

    Attributes:
        projector: name of the projector, "mlp" for LLaVA; empty where the file names none.
        n_tokens: tokens of every image, None where it depends on the image (or is not known here).
        class_token: the vision tower has a class token.
        text_tower: the file carries CLIP's text tower and projections.
        image: its keys about the size of a picture, in pixels or tiles, those that it has.
    """

    projector: str
    n_tokens: int | None
    class_token: bool
    text_tower: bool
    image: Mapping[str, int]


def mmproj_facts(info: GgufInfo) -> MmprojFacts:
    """The facts of an mmproj file.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.files.gguf import read_gguf
        >>> mmproj_facts(read_gguf(qap.packaged_model().mmproj))
        MmprojFacts(projector='mlp', n_tokens=144, class_token=True, text_tower=False,
                    image={'image_size': 192, 'patch_size': 16})
    """
    keys = info.metadata
    # Newer files of several modalities name the projector once for each.
    projector = keys.get("clip.vision.projector_type") or keys.get("clip.projector_type") or ""
    return MmprojFacts(
        projector=str(projector),
        n_tokens=_tokens(info, str(projector)),
        class_token="v.class_embd" in info.tensors,
        text_tower=f"{TEXT_PREFIX}version" in keys,
        image={name: value for name in _IMAGE_KEYS if isinstance(value := keys.get(f"clip.vision.{name}"), int)},
    )


def _tokens(info: GgufInfo, projector: str) -> int | None:
    """LLaVA's patches, one token each; with grid points (LLaVA-NeXT) the number of tiles depends on the image."""
    keys = info.metadata
    side, patch = keys.get("clip.vision.image_size"), keys.get("clip.vision.patch_size")
    if projector != "mlp" or "clip.vision.image_grid_pinpoints" in keys:
        return None
    if not isinstance(side, int) or not isinstance(patch, int) or not 0 < patch <= side:
        return None
    return (side // patch) ** 2
