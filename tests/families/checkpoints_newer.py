"""Tiny random checkpoints of Qwen3.5 (its language model has recurrent layers), MiniCPM-V 4.6, Gemma 4, Granite 4,
LightOnOCR and Janus Pro.

Read through families.checkpoints, which puts them into FAMILIES.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import checkpoints as base

torch = pytest.importorskip("torch")
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


MINICPM_SPECIAL = ["</image>", "<slice>", "</slice>"]
MINICPM_SLICE = 128  # pixels of a slice's side


def minicpmv46(folder: Path) -> Any:
    text = HYBRID | {"vocab_size": base.VOCAB + len(MINICPM_SPECIAL), "model_type": "qwen3_5_text"}
    config = transformers.MiniCPMV4_6Config(
        text_config=text,
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
            "patch_size": 8, "image_size": 8 * 70,  # libmtmd takes 70 places a side for granted
        },
        insert_layer_id=1, image_size=MINICPM_SLICE, image_token_id=base.ID["<|image_pad|>"],
        video_token_id=base.ID["<|video_pad|>"],
    )  # fmt: skip
    model = base.randomize(transformers.MiniCPMV4_6ForConditionalGeneration(config))
    slices = base.processor({"height": 0, "width": 0}, patch_size=8, scale_resolution=MINICPM_SLICE, max_slice_nums=9)
    return base.save(model, folder, slices, MINICPM_SPECIAL)


GEMMA4_SPECIAL = ["<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio|>"]


def gemma4_tokenizer(folder: Path) -> int:
    """A BPE with bytes to fall back to, as Gemma 4's: llama.cpp's converter takes no other. Returns its size."""
    tokenizers = pytest.importorskip("tokenizers")
    from conftest import strings

    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=640, special_tokens=control, initial_alphabet=list("\u2581\n"), limit_alphabet=80,
        show_progress=False,
    )  # fmt: skip
    plain = [text for text in strings() if text.isascii() and "\x00" not in text]
    tok.train_from_iterator(plain * 3, trainer)
    parsed = json.loads(tok.to_str())
    words = {name for name, number in parsed["model"]["vocab"].items() if number < len(control)}
    learned = sorted(parsed["model"]["vocab"].items(), key=lambda item: item[1])
    names = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *(name for name, _ in learned if name not in words)]
    parsed["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    tok = tokenizers.Tokenizer.from_str(json.dumps(parsed))
    tok.add_special_tokens(GEMMA4_SPECIAL)
    tok.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}<eos>"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
                "tokenizer_class": "TokenizersBackend", "chat_template": template,
            }
        )
    )  # fmt: skip
    return int(tok.get_vocab_size())


def gemma4_text(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tokenizer in the folder; the settings of a large one's language model, and of the whole.

    The large ones read pictures without a causal mask in the layers with a window.
    """
    folder.mkdir(parents=True)
    n_vocab = gemma4_tokenizer(folder)
    first = n_vocab - len(GEMMA4_SPECIAL)
    ids = {name: first + number for number, name in enumerate(GEMMA4_SPECIAL)}
    text = base.TEXT | {
        "vocab_size": n_vocab, "sliding_window": 512, "num_hidden_layers": 4, "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "use_bidirectional_attention": "vision", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    own = {
        "image_token_id": ids["<|image|>"], "video_token_id": ids["<|video|>"], "audio_token_id": ids["<|audio|>"],
        "boi_token_id": ids["<|image>"], "eoi_token_id": ids["<image|>"],
    }  # fmt: skip
    return text, own


def save_gemma4(model: Any, folder: Path) -> Any:
    """Sets what randomize() leaves alone, buffers, so that it shows whether they are used."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for number, layer in enumerate(model.model.language_model.layers):
            layer.layer_scalar.fill_(0.7 + 0.2 * number)
        for name, weight in model.model.named_parameters():
            if "vision_tower" in name and name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.mul_(0.5)  # they stand in for the usual 1 / sqrt(head_dim)
        for name, value in model.model.named_buffers():
            if name.endswith(("std_bias", "std_scale")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3 + name.endswith("scale"))
            elif name.endswith(("put_min", "put_max")):
                value.fill_(-1.5 if name.endswith("min") else 1.25)
    model.save_pretrained(folder)
    processor = base.processor(None, patch_size=8, pooling_kernel_size=3, max_soft_tokens=280)
    processor |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def gemma4(folder: Path) -> Any:
    text, own = gemma4_text(folder)
    text |= {"vocab_size_per_layer_input": text["vocab_size"], "hidden_size_per_layer_input": 0}
    tower = base.VISION | {
        "head_dim": 16, "num_key_value_heads": 4, "position_embedding_size": 3360, "standardize": True,
        "use_clipped_linears": True,
    }  # fmt: skip
    config = transformers.Gemma4Config(text_config=text, vision_config=tower, audio_config=None, **own)
    return save_gemma4(base.randomize(transformers.Gemma4ForConditionalGeneration(config)), folder)


def gemma4_unified(folder: Path) -> Any:
    """The 12B, which has no tower: pixels go to the language model by products, positions and norms alone."""
    text, own = gemma4_text(folder)
    tower = {"patch_size": 8, "mm_embed_dim": 64, "mm_posemb_size": 1120, "output_proj_dims": 64}
    config = transformers.Gemma4UnifiedConfig(text_config=text, vision_config=tower, audio_config={}, **own)
    return save_gemma4(base.randomize(transformers.Gemma4UnifiedForConditionalGeneration(config)), folder)


GRANITE_GRID = [[64, 64], [64, 128], [128, 64], [128, 128], [192, 64], [64, 192]]  # (height, width)


def granite4(folder: Path) -> Any:
    text = {name: value for name, value in base.TEXT.items() if name != "head_dim"} | {
        "num_hidden_layers": 7, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.8,
        "attention_multiplier": 0.2, "model_type": "granite4_vision_text",
        "architectures": ["GraniteForCausalLM"],
    }  # fmt: skip
    config = transformers.Granite4VisionConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(
            **(base.VISION | {"image_size": 64, "hidden_size": 128, "num_hidden_layers": 6})
        ),
        image_token_index=base.ID["<image>"], vision_feature_select_strategy="full", image_grid_pinpoints=GRANITE_GRID,
        downsample_rate="2/4", deepstack_layer_map=[[-3, 2], [-1, 0]], spatial_vision_layer=-1,
        spatial_target_layers=[1, 3, 4, 5],
        qformer_config={
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 96,
            "cross_attention_frequency": 1, "max_position_embeddings": 2048, "use_qformer_text_input": False,
        },
    )  # fmt: skip
    model = base.randomize(transformers.Granite4VisionForConditionalGeneration(config))
    square = {"height": 64, "width": 64}
    return base.save(model, folder, base.processor(square, image_grid_pinpoints=GRANITE_GRID))


def lightonocr(folder: Path) -> Any:
    config = transformers.LightOnOcrConfig(
        text_config=transformers.Qwen3Config(**base.TEXT, architectures=["Qwen3ForCausalLM"]),
        vision_config=transformers.PixtralVisionConfig(**(base.VISION | {"image_size": 128, "head_dim": 16})),
        image_token_id=base.ID["<|image_pad|>"], spatial_merge_size=2,
    )  # fmt: skip
    model = base.randomize(transformers.LightOnOcrForConditionalGeneration(config))
    return base.save(model, folder, base.processor({"longest_edge": 128}, patch_size={"height": 16, "width": 16}))


JANUS_SPECIAL = ["<begin_of_image>", "<end_of_image>", "<image_placeholder>"]


def januspro(folder: Path) -> Any:
    """Janus; what it draws pictures with is small and unused."""
    tower = {name: value for name, value in base.VISION.items() if name != "intermediate_size"} | {
        "mlp_ratio": 2, "image_size": 64, "projection_dim": 64, "num_image_tokens": 64,
    }  # fmt: skip
    drawing = {
        "base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
        "num_embeddings": 16, "projection_dim": 64, "image_token_embed_dim": 64,
    }  # fmt: skip
    config = transformers.JanusConfig(
        text_config=transformers.LlamaConfig(**(base.TEXT | {"vocab_size": base.VOCAB + len(JANUS_SPECIAL)})),
        vision_config=transformers.JanusVisionConfig(**tower),
        vq_config=transformers.JanusVQVAEConfig(**drawing),
        image_token_id=base.VOCAB + 2,
    )  # fmt: skip
    model = base.randomize(transformers.JanusForConditionalGeneration(config))
    return base.save(model, folder, base.processor({"height": 64, "width": 64}), JANUS_SPECIAL)


NEWER: dict[str, base.Family] = {
    "qwen3.5": base.Family(qwen35, (96, 64)),
    "minicpm-v-4.6": base.Family(minicpmv46, (128, 128)),
    "gemma-4": base.Family(gemma4, (240, 168), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "gemma-4-unified": base.Family(gemma4_unified, (240, 168), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "granite-4": base.Family(granite4, (64, 64)),
    "lighton-ocr": base.Family(lightonocr, (128, 96)),  # a smaller one is enlarged by stock
    "janus-pro": base.Family(januspro, (64, 64)),
}
