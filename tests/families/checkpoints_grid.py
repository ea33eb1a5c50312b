"""Tiny random checkpoints of GLM, PaddleOCR-VL, EXAONE 4.5, MiMo-VL, HunyuanVL, Kimi: their tokens are 2 x 2 patches.

Read through families.checkpoints, which puts them into FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import strings
from families import checkpoints as base
from families import truth
from qap_gguf.convert.upstream.child import kimi_name

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GLM_SPECIAL = ["<|user|>", "<|begin_of_image|>", "<|end_of_image|>"]
PADDLE_SPECIAL = ["<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"]
EXAONE_SPECIAL = ["<vision>", "</vision>"]
KIMI_SPECIAL = ["<|media_begin|>", "<|media_end|>"]
KIMI_VL_SPECIAL = ["<|media_start|>", "<|media_end|>"]
HUNYUAN_SPECIAL = [f"<\uff5chy_place\u2581holder\u2581no\u2581{n}\uff5c>" for n in (100, 101, 102)]
LIMITS = {"shortest_edge": 1024, "longest_edge": 16 * 16 * 1024}  # pixels
SIDES = {"size": LIMITS, "min_pixels": LIMITS["shortest_edge"], "max_pixels": LIMITS["longest_edge"]}


def glm41v(folder: Path) -> Any:
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3],
    }  # fmt: skip
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = transformers.Glm4vConfig(
        text_config=base.TEXT | heads | {"vocab_size": base.VOCAB + len(GLM_SPECIAL), "rope_parameters": rope},
        vision_config={
            "depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64,
            "image_size": 64, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=base.ID["<|image_pad|>"], video_token_id=base.ID["<|video_pad|>"],
    )  # fmt: skip
    model = base.randomize(transformers.Glm4vForConditionalGeneration(config))
    size = {"shortest_edge": 2 * 8 * 256, "longest_edge": 2 * 4096 * 256}  # pixels of two frames; what libmtmd has
    settings = base.processor(size, patch_size=8, merge_size=2, temporal_patch_size=2)
    return base.save(model, folder, settings, GLM_SPECIAL)


def glm_ocr(folder: Path) -> Any:
    """GLM-OCR: GLM-4.1V's tower without learned positions, with norms of queries and keys."""
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3],
    }  # fmt: skip
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = transformers.GlmOcrConfig(
        text_config=base.TEXT | heads | {"vocab_size": base.VOCAB + len(GLM_SPECIAL), "rope_parameters": rope},
        vision_config={
            "depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64,
            "image_size": 64, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=base.ID["<|image_pad|>"], video_token_id=base.ID["<|video_pad|>"],
    )  # fmt: skip
    model = base.randomize(transformers.GlmOcrForConditionalGeneration(config))
    size = {"shortest_edge": 2 * 8 * 256, "longest_edge": 2 * 4096 * 256}
    settings = base.processor(size, patch_size=8, merge_size=2, temporal_patch_size=2)
    return base.save(model, folder, settings, GLM_SPECIAL)


def paddleocr(folder: Path) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.PaddleOCRVLConfig(
        text_config=base.TEXT | {"rope_parameters": rope},
        vision_config=base.VISION | {"image_size": 64, "architectures": ["PaddleOCRVisionModel"]},
        image_token_id=base.ID["<|image_pad|>"], video_token_id=base.ID["<|video_pad|>"],
        vision_start_token_id=base.ID["<|vision_start|>"], vision_end_token_id=base.ID["<|vision_end|>"],
    )  # fmt: skip
    model = base.randomize(transformers.PaddleOCRVLForConditionalGeneration(config))
    base.save(model, folder, base.processor(patch_size=8, merge_size=2, temporal_patch_size=1, **SIDES))
    write_sentencepiece(folder, PADDLE_SPECIAL)
    return model


def write_sentencepiece(folder: Path, special: list[str]) -> None:
    """In place of the tokenizer.json that is there: ERNIE's is a SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "tokenizer.json").unlink()
    lines = [line for text in strings() * 3 for line in text.replace("\x00", "").splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=640, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    added = {str(640 + i): {"content": text, "special": True} for i, text in enumerate(special)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))


def exaone45(folder: Path) -> Any:
    vocabulary = {"vocab_size": base.VOCAB + len(EXAONE_SPECIAL)}
    layers = {"sliding_window": None, "layer_types": ["full_attention"] * base.TEXT["num_hidden_layers"]}
    config = transformers.Exaone4_5_Config(
        text_config=transformers.Exaone4Config(**(base.TEXT | vocabulary | layers)),
        vision_config={
            "depth": 4, "hidden_size": 64, "num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [1, 3], "out_hidden_size": 64,
        },
        image_token_id=base.ID["<|image_pad|>"], video_token_id=base.ID["<|video_pad|>"],
    )  # fmt: skip
    model = base.randomize(transformers.Exaone4_5_ForConditionalGeneration(config))
    settings = base.processor(patch_size=14, merge_size=2, temporal_patch_size=2, **SIDES)
    return base.save(model, folder, settings, EXAONE_SPECIAL)


def mimovl(folder: Path) -> Any:
    """Qwen2.5-VL's classes with what MiMo-VL-7B's config.json has of its own: four heads a key, another epsilon."""
    rope = {"rope_type": "default", "rope_theta": 640000.0, "mrope_section": [2, 3, 3]}
    text = base.TEXT | {"num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_parameters": rope}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 64, "hidden_act": "silu",
        },
        image_token_id=base.ID["<|image_pad|>"], video_token_id=base.ID["<|video_pad|>"],
        vision_start_token_id=base.ID["<|vision_start|>"], vision_end_token_id=base.ID["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    model = base.randomize(transformers.Qwen2_5_VLForConditionalGeneration(config))
    settings = base.processor(LIMITS, patch_size=14, merge_size=2, temporal_patch_size=2, **base.QWEN_PIXELS)
    return base.save(model, folder, settings)


def hunyuanvl(folder: Path) -> Any:
    """HunyuanVL; the model that is returned has two methods as its authors have them (truth.as_authors)."""
    rope = {
        "rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0, "mrope_section": [2, 2, 2, 2],
    }  # fmt: skip
    vocabulary = {"vocab_size": base.VOCAB + len(HUNYUAN_SPECIAL), "eod_token_id": 0}
    config = transformers.HunYuanVLConfig(
        text_config=base.TEXT | vocabulary | {"rope_parameters": rope},
        vision_config=base.VISION | {
            "max_image_size": 80, "min_image_size": 16, "spatial_merge_size": 2, "out_hidden_size": 64,
            "text_hidden_size": 64,
        },
        image_token_id=base.ID["<|image_pad|>"], im_start_id=base.VOCAB, im_end_id=base.VOCAB + 1,
        im_newline_id=base.VOCAB + 2,
    )  # fmt: skip
    model = base.randomize(transformers.HunYuanVLForConditionalGeneration(config))
    settings = base.processor(patch_size=8, merge_size=2, temporal_patch_size=1, resample=1, **SIDES)
    return truth.as_authors(base.save(model, folder, settings, HUNYUAN_SPECIAL))


def kimi_k25(folder: Path) -> Any:
    return kimi(folder, KIMI_SPECIAL, str, {"architectures": ["KimiK25ForConditionalGeneration"]})


def kimi_vl(folder: Path) -> Any:
    """Kimi-K2.5 under Kimi-VL's names: for one picture the authors' code of both computes the same."""
    tower = {"model_type": "moonvit", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4} | {
        "num_attention_heads": 4, "patch_size": 8, "init_pos_emb_height": 8, "init_pos_emb_width": 8,
        "merge_kernel_size": [2, 2],
    }  # fmt: skip
    published = {"architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl", "vision_config": tower}

    def renamed(name: str) -> str:
        name = kimi_name(name)
        for new, old in (("pre_norm", "pre_norm"), ("proj.0", "linear_1"), ("proj.2", "linear_2")):
            name = name.replace(f"mm_projector.{new}.", f"multi_modal_projector.{old}.")
        return name

    return kimi(folder, KIMI_VL_SPECIAL, renamed, published)


def kimi(folder: Path, special: list[str], renamed: Callable[[str], str], published: dict[str, Any]) -> Any:
    """renamed: the names of published checkpoints by those of Kimi-K2.5's; published: what their config.json has."""
    import safetensors.torch

    text = {name: value for name, value in base.TEXT.items() if name != "head_dim"} | {
        "vocab_size": base.VOCAB + len(special), "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "scoring_func": "sigmoid",
    }  # fmt: skip
    config = transformers.Kimi_K25Config(
        text_config=transformers.DeepseekV3Config(**text),
        vision_config={
            "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 4, "num_hidden_layers": 4,
            "hidden_size": 64, "intermediate_size": 96,
        },
        projection_hidden_size=64, image_token_id=base.ID["<|image_pad|>"], video_token_id=base.ID["<|video_pad|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    model = base.randomize(transformers.Kimi_K25ForConditionalGeneration(config))
    size = {"max_height": 512, "max_width": 512}  # patches
    base.save(model, folder, base.processor(size, patch_size=8, merge_size=2, in_patch_limit=1024), special)
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    # transformers saves the layers of the language model as blocks, too, though published checkpoints have layers
    names = {
        name: renamed(name.replace("language_model.model.blocks.", "language_model.model.layers.")) for name in tensors
    }
    safetensors.torch.save_file({names[name]: value for name, value in tensors.items()}, weights, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | published
    (folder / "config.json").write_text(json.dumps(settings))
    return model


GRID: dict[str, base.Family] = {
    "glm-4.1v": base.Family(glm41v, (96, 64)),
    "glm-ocr": base.Family(glm_ocr, (96, 64)),
    "paddleocr-vl": base.Family(paddleocr, (160, 48)),
    "exaone-4.5": base.Family(exaone45, (168, 140)),
    "mimo-vl": base.Family(mimovl, (168, 140)),
    "hunyuan-vl": base.Family(hunyuanvl, (96, 64)),
    "kimi-vl": base.Family(kimi_vl, (96, 64)),
    "kimi-k2.5": base.Family(kimi_k25, (96, 64)),
}
