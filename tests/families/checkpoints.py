"""Tiny random checkpoints of the families, made by transformers from a config with a fixed seed.

Weights are large enough to matter (standard deviation 0.08, position embeddings 0.3, norms and biases moved away from
one and nothing), or a mix-up would hide. Each is a few hundred kilobytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import strings, train_bpe, write_bpe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SPECIAL = [
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>", "<fake_token_around_image>",
    "<global-img>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<img>", "</img>", "<IMG_CONTEXT>",
    "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|image|>",
    "<|img_thumbnail|>", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>", "<|img_row_1_col_1|>",
    "<|img_row_1_col_2|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
]  # fmt: skip
FIRST_SPECIAL = 641  # after the 640 of train_bpe and its <box>
ID = {name: FIRST_SPECIAL + i for i, name in enumerate(SPECIAL)}
VOCAB = FIRST_SPECIAL + len(SPECIAL)

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "initializer_range": 0.08,
    "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8,
    "initializer_range": 0.08,
}  # fmt: skip


QWEN_PIXELS = {"min_pixels": 16 * 16 * 4, "max_pixels": 16 * 16 * 1024}


@dataclass(frozen=True)
class Family:
    """How to make one family's checkpoint, and what its files are to the tests.

    Attributes:
        make: writes a checkpoint into a folder.
        image: (width, height) of a picture that enters the encoder as it is.
        mean, std: of the pixels in 0..1.
    """

    make: Callable[[Path], Any]
    image: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


def randomize(model: Any) -> Any:
    """Weights from one generator, in the order of their names."""
    generator = torch.Generator().manual_seed(20265)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 1 and "embed" not in name:
                noise = torch.randn(weight.shape, generator=generator) * 0.1
                weight.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + noise)
            else:
                std = 0.3 if "pos" in name else 0.08
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model.eval()


def save(model: Any, folder: Path, processor: dict[str, Any], special: Sequence[str] = ()) -> Any:
    """Model, tokenizer and image processor's config. `special`: tokens after SPECIAL, numbered from VOCAB on."""
    import tokenizers

    model.save_pretrained(folder)
    tok = train_bpe(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    tok.add_special_tokens([*SPECIAL, *special])
    assert tok.token_to_id(SPECIAL[0]) == FIRST_SPECIAL
    write_bpe(folder, tok)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def processor(size: Any, **more: Any) -> dict[str, Any]:
    return {
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_rescale": True, "rescale_factor": 1 / 255,
        "do_resize": True, "size": size,
    } | more  # fmt: skip


def qwen2vl(folder: Path) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 4, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=ID["<|image_pad|>"], video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"], vision_end_token_id=ID["<|vision_end|>"],
    )  # fmt: skip
    model = randomize(transformers.Qwen2VLForConditionalGeneration(config))
    size = {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 1024}
    return save(model, folder, processor(size, patch_size=8, merge_size=2, temporal_patch_size=2, **QWEN_PIXELS))


def qwen25vl(folder: Path) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 64,
        },
        image_token_id=ID["<|image_pad|>"], video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"], vision_end_token_id=ID["<|vision_end|>"],
    )  # fmt: skip
    model = randomize(transformers.Qwen2_5_VLForConditionalGeneration(config))
    size = {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 1024}
    return save(model, folder, processor(size, patch_size=14, merge_size=2, temporal_patch_size=2, **QWEN_PIXELS))


def qwen3vl(folder: Path) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=ID["<|image_pad|>"], video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"], vision_end_token_id=ID["<|vision_end|>"],
    )  # fmt: skip
    model = randomize(transformers.Qwen3VLForConditionalGeneration(config))
    size = {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 1024}
    return save(model, folder, processor(size, patch_size=8, merge_size=2, temporal_patch_size=2))


def smolvlm(folder: Path) -> Any:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"]),
        vision_config=VISION | {"image_size": 64},
        scale_factor=2, image_token_id=ID["<image>"], pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = randomize(transformers.SmolVLMForConditionalGeneration(config))
    return save(model, folder, processor({"longest_edge": 64}, max_image_size={"longest_edge": 64}))


def gemma_tokenizer(folder: Path) -> None:
    """A tokenizer.model with tokens for one to six line breaks, as Gemma's has up to 31; SPECIAL keep their ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in strings() * 3 for line in text.replace("\x00", "").splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=FIRST_SPECIAL,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.98,
        eos_id=0, bos_id=1, unk_id=2, pad_id=-1, user_defined_symbols=["\n" * n for n in range(1, 7)], minloglevel=2,
    )  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps(ID))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    roles = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    more = {
        "tokenizer_class": "GemmaTokenizer", "extra_special_tokens": roles,
        "added_tokens_decoder": {str(number): {"content": name, "special": True} for name, number in ID.items()},
        "chat_template": "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}</s>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(names | more))


def gemma3(folder: Path) -> Any:
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 512, "query_pre_attn_scalar": 16},
        vision_config=VISION | {"image_size": 64},
        mm_tokens_per_image=16, image_token_index=ID["<image_soft_token>"], boi_token_index=ID["<start_of_image>"],
        eoi_token_index=ID["<end_of_image>"],
    )  # fmt: skip
    model = randomize(transformers.Gemma3ForConditionalGeneration(config))
    model.save_pretrained(folder)
    gemma_tokenizer(folder)
    settings = processor({"height": 64, "width": 64}, image_seq_length=16)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def internvl(folder: Path) -> Any:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT, architectures=["Qwen2ForCausalLM"]),
        vision_config=VISION | {"image_size": [64, 64], "patch_size": [8, 8], "use_mask_token": False,
                                "architectures": ["InternVisionModel"], "use_absolute_position_embeddings": True},
        image_token_id=ID["<IMG_CONTEXT>"], image_seq_length=16, downsample_ratio=0.5,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = randomize(transformers.InternVLForConditionalGeneration(config))
    return save(model, folder, processor({"height": 64, "width": 64}))


def pixtral(folder: Path) -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(**(VISION | {"image_size": 128, "head_dim": 16})),
        image_token_index=ID["[IMG]"], vision_feature_select_strategy="full", vision_feature_layer=-1,
        projector_hidden_act="gelu", image_seq_length=1,
    )  # fmt: skip
    model = randomize(transformers.LlavaForConditionalGeneration(config))
    return save(model, folder, processor({"longest_edge": 128}, patch_size={"height": 8, "width": 8}))


def mistral3(folder: Path) -> Any:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(**(VISION | {"image_size": 128, "head_dim": 16})),
        image_token_index=ID["[IMG]"], spatial_merge_size=2, vision_feature_layer=-1, multimodal_projector_bias=False,
    )  # fmt: skip
    model = randomize(transformers.Mistral3ForConditionalGeneration(config))
    return save(model, folder, processor({"longest_edge": 128}, patch_size=8, spatial_merge_size=2))


def llama4(folder: Path) -> Any:
    text = {k: v for k, v in TEXT.items() if k != "num_hidden_layers"}
    config = transformers.Llama4Config(
        text_config=text | {
            "num_hidden_layers": 4, "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "rope_scaling": None, "no_rope_layer_interval": 4,
            "attention_chunk_size": 1024,
        },
        vision_config=VISION | {
            "image_size": 64, "pixel_shuffle_ratio": 0.5, "intermediate_size": 256, "vision_output_dim": 96,
            "projector_input_dim": 96, "projector_output_dim": 96,
        },
        image_token_index=ID["<|patch|>"], boi_token_index=ID["<|image_start|>"],
        eoi_token_index=ID["<|image_end|>"],
    )  # fmt: skip
    model = randomize(transformers.Llama4ForConditionalGeneration(config))
    return save(model, folder, processor({"height": 64, "width": 64}, max_patches=4))


def lfm2vl(folder: Path) -> Any:
    text = {k: v for k, v in TEXT.items() if k not in ("head_dim", "initializer_range")}
    config = transformers.Lfm2VlConfig(
        text_config=transformers.Lfm2Config(
            **text, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3,
            architectures=["Lfm2ForCausalLM"], block_auto_adjust_ff_dim=False,
        ),
        vision_config=transformers.Siglip2VisionConfig(
            **(VISION | {"num_patches": 64, "patch_size": 16, "vision_use_head": False})
        ),
        image_token_id=ID["<image>"], downsample_factor=2, projector_hidden_size=96,
    )  # fmt: skip
    model = randomize(transformers.Lfm2VlForConditionalGeneration(config))
    return save(model, folder, processor({"height": 128, "width": 128}, tile_size=128))


NEXT_GRID = [
    [64, 128],
    [128, 64],
    [128, 128],
    [192, 64],
    [64, 192],
]  # (height, width), LLaVA-NeXT's own with tiles of 64


def llavanext(folder: Path, *, text: str = "Llama", siglip: bool = False, tower: dict[str, Any] | None = None) -> Any:
    """LLaVA-NeXT; it is not among FAMILIES, for each of its pictures is resized and packed (test_next.py)."""
    vision = VISION | {"image_size": 64} | (tower or {})
    side = vision["image_size"]
    vision_class = transformers.SiglipVisionConfig if siglip else transformers.CLIPVisionConfig
    more = {"sliding_window": None} if text == "Mistral" else {}
    config = transformers.LlavaNextConfig(
        text_config=getattr(transformers, f"{text}Config")(**(TEXT | more)),
        vision_config=vision_class(**vision),
        image_token_index=ID["<image>"], vision_feature_select_strategy="full" if siglip else "default",
        vision_feature_layer=-2, image_grid_pinpoints=[[side * y // 64, side * x // 64] for y, x in NEXT_GRID],
    )  # fmt: skip
    model = randomize(transformers.LlavaNextForConditionalGeneration(config))
    square = {"height": side, "width": side}
    return save(
        model,
        folder,
        processor({"shortest_edge": side}, crop_size=square, image_grid_pinpoints=config.image_grid_pinpoints),
    )


FAMILIES: dict[str, Family] = {
    "qwen2-vl": Family(qwen2vl, (96, 64)),
    "qwen2.5-vl": Family(qwen25vl, (168, 140)),
    "qwen3-vl": Family(qwen3vl, (96, 64)),
    "smolvlm": Family(smolvlm, (64, 64)),
    "gemma-3": Family(gemma3, (64, 64)),
    "internvl": Family(internvl, (64, 64)),
    "pixtral": Family(pixtral, (96, 64)),
    "mistral-3": Family(mistral3, (96, 64)),
    "llama-4": Family(llama4, (64, 64)),
    "lfm2-vl": Family(lfm2vl, (320, 256)),
}

from families.checkpoints_grid import GRID  # noqa: E402  (both take what stands above)
from families.checkpoints_newer import NEWER  # noqa: E402

FAMILIES |= GRID | NEWER
