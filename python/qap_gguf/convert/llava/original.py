"""The layout of LLaVA's authors: one flat config.json, `model.mm_projector.*`, a vision tower in its own folder.

Facts: haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT: llava/model/llava_arch.py (names), multimodal_projector/builder.py
(mm_projector_type, "linear" where it is absent), multimodal_encoder/clip_encoder.py (mm_vision_select_layer and
_feature) and siglip_encoder.py (the last layer is deleted, so that the output of the one before it is taken),
mm_utils.py (grid points are width, height; transformers has height, width).
The config is translated to the one that transformers would have, so that all else is the same for both layouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qap_gguf.convert.llava.config_section import section
from qap_gguf.convert.source.checkpoint import Checkpoint, checkpoint_folder, read_json
from qap_gguf.convert.source.safetensors_file import TensorRef
from qap_gguf.errors import ConvertError

__all__ = ["TOWER", "Tower", "is_original", "original_name", "translate"]

TOWER = "vision_tower.vision_model."
_LANGUAGES = {
    "LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2",
}  # fmt: skip
_PREFIXES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.vision_model.", TOWER),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# The towers that public checkpoints name and carry inside, as their own config.json describe them.
_KNOWN: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": _LARGE | {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    "clip-vit-large-patch14": _LARGE | {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip


def is_original(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is in the authors' layout.

    Example:
        >>> is_original({"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"})
        True
    """
    return "mm_vision_tower" in config and "vision_config" not in config


def original_name(name: str) -> str:
    """The canonical name of a tensor in the authors' layout.

    Example:
        >>> original_name("model.layers.0.mlp.up_proj.weight")
        'language_model.model.layers.0.mlp.up_proj.weight'
        >>> original_name("model.mm_projector.2.bias")
        'multi_modal_projector.linear_2.bias'
    """
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class Tower:
    """A vision tower's own folder: `config` in transformers' form, `tensors` by canonical name, `processor`.

    The folder may hold a whole CLIPModel or SiglipModel: the text half is passed over.
    """

    def __init__(self, src: str | Path) -> None:
        self.folder = checkpoint_folder(src)
        self.config = _vision_config(read_json(self.folder / "config.json"))
        path = self.folder / "preprocessor_config.json"
        self.processor = read_json(path) if path.is_file() else {}

    def tensors(self) -> dict[str, TensorRef]:
        """All tensors of the vision half."""
        found = Checkpoint(self.folder, rename=_tower_name).tensors
        return {name: ref for name, ref in found.items() if name.startswith(TOWER)}


def _tower_name(name: str) -> str:
    if name.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")):
        return TOWER + name
    return TOWER + name.removeprefix("vision_model.") if name.startswith("vision_model.") else f"other.{name}"


def _vision_config(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type")
    if kind in ("clip", "siglip"):
        # Files of 2021 and 2022 repeat a section under a second name, which counts.
        return (
            section(config, "vision_config")
            | section(config, "vision_config_dict")
            | {"model_type": f"{kind}_vision_model"}
        )
    if kind in ("clip_vision_model", "siglip_vision_model"):
        return config
    raise ConvertError(f"vision_tower: expected a CLIP or SigLIP, got model_type {kind!r}; give the tower's folder")


def translate(config: dict[str, Any], tower: dict[str, Any] | None) -> dict[str, Any]:
    """A parsed config.json of the authors' layout as transformers would have written it.

    tower: the vision tower's config; None where only its name, `mm_vision_tower`, is known.
    Raises ConvertError for a projector or an arrangement of tiles that the files could not say.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in _LANGUAGES:
        raise ConvertError(
            f"expected architecture {', '.join(_LANGUAGES)} in config.json, got {name!r}; no other is known"
        )
    for key, wanted in (
        ("mm_projector_type", ("mlp2x_gelu",)),
        ("mm_resampler_type", (None,)),
        ("mm_use_im_start_end", (None, False)),
        ("mm_use_im_patch_token", (None, False)),
        ("mm_vision_select_feature", (None, "patch")),
    ):
        if config.get(key) not in wanted:
            raise ConvertError(
                f"expected {key} {wanted[-1]!r} in config.json, got {config.get(key)!r}; "
                "llama.cpp's encoder for LLaVA knows no other"
            )
    vision = tower if tower is not None else _known(config)
    siglip = vision.get("model_type") == "siglip_vision_model"
    out = {
        "model_type": "llava",
        "text_config": config | {"model_type": _LANGUAGES[name]},
        "vision_config": vision,
        "vision_feature_layer": -2 if siglip else config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if siglip else "default",
    }
    aspect = config.get("image_aspect_ratio")
    if aspect in (None, "pad", "square"):
        return out
    merge, grid = config.get("mm_patch_merge_type"), config.get("image_grid_pinpoints")
    if aspect != "anyres" or merge != "spatial_unpad" or not isinstance(grid, list):
        raise ConvertError(
            "expected image_aspect_ratio pad, square or anyres with spatial_unpad and a list of grid points in "
            f"config.json, got {aspect!r}, {merge!r}, {grid!r}; no other arrangement of tiles is known"
        )
    pairs = [list(reversed(pair)) if isinstance(pair, list) else pair for pair in grid]
    return out | {"model_type": "llava_next", "image_grid_pinpoints": pairs}


def _known(config: dict[str, Any]) -> dict[str, Any]:
    name = str(config.get("mm_vision_tower"))
    short = name.rstrip("/").rpartition("/")[2]
    if short not in _KNOWN:
        raise ConvertError(
            f"expected vision_tower=... (--vision-tower), the folder of the tower {name!r} that config.json names, got "
            "none; fetch it and give it"
        )
    return _KNOWN[short]
