"""Rewrites a LLaVA that transformers saved into the layout of LLaVA's authors, weights unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from convert.test_errors import Tensors, read_safetensors, write_safetensors
from qap_gguf.convert.source.checkpoint import canonical

ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
_NAMES = (
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
)
TOWER = "vision_tower.vision_model."


def original_layout(source: Path, folder: Path, tower: Path, *, inside: bool = False, **changes: Any) -> Path:
    """Writes `folder` and `tower`; with `inside` the tower's weights are in both. `changes`: of config.json."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    siglip = vision["model_type"] == "siglip_vision_model"
    flat = text | {
        "architectures": [ARCHITECTURES[text["model_type"]]], "model_type": "llava", "mm_vision_tower": "someone/tower",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": config["vision_feature_layer"],
        "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "image_aspect_ratio": "pad",
    }  # fmt: skip
    if config["model_type"] == "llava_next":
        flat |= {
            "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [[width, height] for height, width in config["image_grid_pinpoints"]],
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(flat | changes))
    tensors = {canonical(name): row for name, row in read_safetensors(folder / "model.safetensors").items()}
    here: Tensors = {}
    there: Tensors = {}
    for name, row in tensors.items():
        if name.startswith(TOWER):
            there["vision_model." + name.removeprefix(TOWER)] = row
            if inside:
                here["model.vision_tower." + name] = row
        else:
            old, new = next(pair for pair in _NAMES if name.startswith(pair[0]))
            here[new + name.removeprefix(old)] = row
    write_safetensors(folder / "model.safetensors", here)
    tower.mkdir()
    (folder / "preprocessor_config.json").rename(tower / "preprocessor_config.json")
    whole = {"model_type": "siglip" if siglip else "clip", "vision_config": vision, "text_config": {}}
    (tower / "config.json").write_text(json.dumps(whole))
    there |= {"text_model.embeddings.x": ("F32", [1], b"\0" * 4), "logit_scale": ("F32", [], b"\0" * 4)}
    write_safetensors(tower / "model.safetensors", there)
    return folder
