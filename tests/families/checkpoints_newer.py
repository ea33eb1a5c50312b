"""A tiny random checkpoint of Qwen3.5, whose language model has recurrent layers.

Read through families.checkpoints, which puts it into FAMILIES.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from families import checkpoints as base

transformers = pytest.importorskip("transformers")

#: Qwen3.5's language model: two layers with a recurrent state, one with attention; more value heads than key heads
HYBRID: dict[str, Any] = base.TEXT | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 32,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}  # fmt: skip


def qwen35(folder: Path) -> Any:
    config = transformers.Qwen3_5Config(
        text_config=HYBRID,
        vision_config={
            "depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64,
        },
        image_token_id=base.ID["<|image_pad|>"], video_token_id=base.ID["<|video_pad|>"],
        vision_start_token_id=base.ID["<|vision_start|>"], vision_end_token_id=base.ID["<|vision_end|>"],
    )  # fmt: skip
    model = base.randomize(transformers.Qwen3_5ForConditionalGeneration(config))
    size = {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 1024}
    return base.save(model, folder, base.processor(size, patch_size=8, merge_size=2, temporal_patch_size=2))


NEWER: dict[str, base.Family] = {"qwen3.5": base.Family(qwen35, (96, 64))}
