#!/usr/bin/env python3
"""Build the packaged model's checkpoint: what its GGUF files were made from, and what training goes on from.

    python tools/demo/tiny_checkpoint.py tiny-llava
    qap-gguf convert tiny-llava out --name tiny-llava --quantize Q4_0 --mmproj-type f16 --keep-positions

Tower and projector are those of the packaged mmproj, which holds them as they are. Of the language model, its weights
before quantization are in tiny-llava.safetensors beside this file, and its tokenizer and the embeddings of words that
no question uses are the packaged model's. Needs safetensors and this package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

import packaged_parts
from emoji_scenes import SIZE
from packaged_parts import END, IMAGE, START

TRAINED: Final = Path(__file__).with_name("tiny-llava.safetensors")
LAYERS: Final = 5  #: of the tower
PATCH: Final = 16  #: pixels of a side
SIDE: Final = SIZE // PATCH  #: patches of a side
MEAN: Final = (0.48145466, 0.4578275, 0.40821073)  #: of the pixels in training, red, green and blue
DEVIATION: Final = (0.26862954, 0.26130258, 0.27577711)
#: LLaVA reads the tower before this norm, and no mmproj holds it; transformers wants to find one.
_UNUSED: Final = {
    f"model.vision_tower.post_layernorm.{name}": fill(192) for name, fill in (("weight", np.ones), ("bias", np.zeros))
}


def config() -> dict[str, Any]:
    """config.json of the checkpoint."""
    text = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
        "hidden_act": "silu", "vocab_size": 49152, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": START, "eos_token_id": END, "pad_token_id": END,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": LAYERS,
        "num_attention_heads": 3, "hidden_act": "quick_gelu", "image_size": SIZE, "patch_size": PATCH,
        "num_channels": 3, "projection_dim": 192, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text,
        "vision_config": vision, "image_token_index": IMAGE, "image_seq_length": SIDE**2,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True, "tie_word_embeddings": True, "dtype": "float16",
    }  # fmt: skip


def preprocessor() -> dict[str, Any]:
    """preprocessor_config.json: CLIP's own."""
    return {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE}, "image_mean": MEAN, "image_std": DEVIATION,
    }  # fmt: skip


def build(out: Path, trained: Path = TRAINED) -> None:
    """Write the checkpoint `out`; see packaged_parts.build."""
    packaged_parts.build(
        out, trained, lambda packaged: {**packaged.image_side(), **_UNUSED}, np.float16, config(), preprocessor()
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0 done, 1 not possible here, 2 wrong usage."""
    args = packaged_parts.arguments(__doc__.splitlines()[0], TRAINED).parse_args(argv)
    return packaged_parts.status("tiny_checkpoint", lambda: build(args.out, args.trained))


if __name__ == "__main__":
    sys.exit(main())
