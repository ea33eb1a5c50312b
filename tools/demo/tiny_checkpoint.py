#!/usr/bin/env python3
"""Build the packaged model's checkpoint: what its GGUF files were made from, and what training goes on from.

    python tools/demo/tiny_checkpoint.py tiny-llava
    qap-gguf convert tiny-llava out --name tiny-llava --quantize Q4_0 --mmproj-type f16 --keep-positions

Tower and projector are those of the packaged mmproj, which holds them as they are. Of the language model, its weights
before quantization are in tiny-llava.safetensors beside this file, and its tokenizer and the embeddings of words that
no question uses are the packaged model's. Needs safetensors and this package.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

from emoji_scenes import SIZE
from folders import replacing_folder
from packaged_parts import END, IMAGE, START, Packaged

TRAINED: Final = Path(__file__).with_name("tiny-llava.safetensors")
LAYERS: Final = 5  #: of the tower
_PATCH: Final = 16  # pixels
_TABLE: Final = "model.language_model.embed_tokens.weight"
#: LLaVA reads the tower before this norm, and no mmproj holds it; transformers wants to find one.
_UNUSED: Final = {
    f"model.vision_tower.post_layernorm.{name}": fill(192) for name, fill in (("weight", np.ones), ("bias", np.zeros))
}


class CheckpointError(Exception):
    """The checkpoint cannot be built; the message is one line with the cure."""


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
        "num_attention_heads": 3, "hidden_act": "quick_gelu", "image_size": SIZE, "patch_size": _PATCH,
        "num_channels": 3, "projection_dim": 192, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text,
        "vision_config": vision, "image_token_index": IMAGE, "image_seq_length": (SIZE // _PATCH) ** 2,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True, "tie_word_embeddings": True, "dtype": "float16",
    }  # fmt: skip


def preprocessor() -> dict[str, Any]:
    """preprocessor_config.json: CLIP's own."""
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE}, "image_mean": mean, "image_std": deviation,
    }  # fmt: skip


def build(out: Path, trained: Path = TRAINED) -> None:
    """Write the checkpoint `out`, whole or not at all.

    Raises:
        CheckpointError: there is no trained part, or `out` is there.
    """
    from safetensors.numpy import load_file, save_file

    if out.exists():
        raise CheckpointError(f"expected {out} to be free; choose another folder")
    if not trained.is_file():
        raise CheckpointError(f"expected the trained part, found no {trained}; give it with --trained")
    parts = load_file(trained)
    packaged = Packaged()
    table = packaged.embeddings()
    table[parts.pop("words")] = parts.pop("rows")
    tensors = parts | packaged.image_side() | {_TABLE: table} | _UNUSED
    with replacing_folder(out) as made:
        save_file(
            {name: array.astype(np.float16) for name, array in tensors.items()},
            made / "model.safetensors",
            metadata={"format": "pt"},
        )
        for name, content in (("config.json", config()), ("preprocessor_config.json", preprocessor())):
            (made / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        packaged.write_tokenizer(made)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0 done, 1 not possible here, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--trained", type=Path, default=TRAINED, help="language model (default: ours)")
    args = parser.parse_args(argv)
    try:
        build(args.out, args.trained)
    except ImportError as err:
        print(f"tiny_checkpoint: error: {err}; pip install safetensors", file=sys.stderr)
        return 1
    except (CheckpointError, OSError) as err:
        print(f"tiny_checkpoint: error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
