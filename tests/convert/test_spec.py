"""config.json: the defaults are transformers' own, and what cannot be converted is refused in one line."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from qap_gguf.convert.llava.language import rope_factors
from qap_gguf.convert.llava.spec import parse
from qap_gguf.errors import ConvertError

LLAVA_15_7B = {  # the keys that llava-1.5-7b-hf's config.json has
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "llava-1.5-7b": LLAVA_15_7B,
    "empty sections": {"vision_config": {}, "text_config": {}},
    "clip defaults": {"vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "llama"}},
    "siglip": {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 384},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "13b": {
        "text_config": {"model_type": "llama", "hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40}
    },
    "gqa": {"text_config": {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 64, "attention_bias": True}},
    "tied below": {"text_config": {"model_type": "llama", "tie_word_embeddings": True}},
    "tied above": {"tie_word_embeddings": True},
    "old rope": {
        "text_config": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    },
    "mistral": {"text_config": {"model_type": "mistral"}},
    "mistral without a window": {"text_config": {"model_type": "mistral", "sliding_window": None, "head_dim": 64}},
    "qwen2": {"text_config": {"model_type": "qwen2", "bos_token_id": 7, "tie_word_embeddings": True}},
    "qwen2 with a window": {
        "text_config": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 99, "max_window_layers": 4}
    },
    "qwen2 with no layer in the window": {
        "text_config": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 32}
    },
    "new rope": {
        "text_config": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    },
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", list(CONFIGS))
def test_defaults_are_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    given = {"model_type": "llava"} | CONFIGS[name]
    spec = parse(given)
    want = transformers.LlavaConfig.from_dict({k: v for k, v in given.items() if k != "model_type"})
    v, t = want.vision_config, want.text_config
    n_used = want.vision_feature_layer + (v.num_hidden_layers + 1 if want.vision_feature_layer < 0 else 0)
    assert (
        spec.vision.n_embd, spec.vision.n_ff, spec.vision.n_head, spec.vision.n_layer, spec.vision.n_layer_used,
        spec.vision.image_size, spec.vision.patch_size, spec.vision.eps,
    ) == (
        v.hidden_size, v.intermediate_size, v.num_attention_heads, v.num_hidden_layers, n_used,
        v.image_size, v.patch_size, v.layer_norm_eps,
    )  # fmt: skip
    assert v.model_type.startswith(spec.vision.kind)
    assert v.hidden_act.startswith(spec.vision.act)
    assert (
        spec.text.n_vocab, spec.text.n_embd, spec.text.n_ff, spec.text.n_layer, spec.text.n_head,
        spec.text.n_head_kv, spec.text.head_dim,
        spec.text.n_ctx, spec.text.eps, spec.text.rope_theta, spec.text.rope_type,
    ) == (
        t.vocab_size, t.hidden_size, t.intermediate_size, t.num_hidden_layers, t.num_attention_heads,
        t.num_key_value_heads, getattr(t, "head_dim", t.hidden_size // t.num_attention_heads),
        t.max_position_embeddings, t.rms_norm_eps, t.rope_parameters["rope_theta"], t.rope_parameters["rope_type"],
    )  # fmt: skip
    windows = getattr(t, "layer_types", ["sliding_attention"])
    assert spec.text.window == (getattr(t, "sliding_window", None) if "sliding_attention" in windows else None)
    qwen2 = t.model_type == "qwen2"
    assert spec.text.attention_bias == (qwen2 or getattr(t, "attention_bias", False))
    assert (spec.text.output_bias, spec.text.mlp_bias) == (
        getattr(t, "attention_bias", False),
        getattr(t, "mlp_bias", False),
    )
    assert spec.text.tied == want.tie_word_embeddings
    assert spec.text.token_ids.get("bos") == t.bos_token_id
    assert spec.text.token_ids.get("eos") == t.eos_token_id


def test_null_heads_mean_no_sharing() -> None:
    """As transformers 4 read it; version 5 refuses a null."""
    text = {"model_type": "mistral", "num_key_value_heads": None}
    assert parse({"model_type": "llava", "text_config": text}).text.n_head_kv == 32


@pytest.mark.parametrize(("layer", "used"), [(-2, 23), (-1, 24), (-24, 1), (1, 1), (24, 24), ([-2], 23)])
def test_feature_layer(layer: Any, used: int) -> None:
    assert parse({"model_type": "llava", "vision_feature_layer": layer}).vision.n_layer_used == used


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava_onevision"}, "in config.json, got 'llava_onevision'"),
        ({"model_type": "llava_next", "image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[336, 500]]}, "multiples of the tower's 336"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[336]]}, "got [336]"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[336, 336000]]}, "up to 16384"),
        ({"model_type": "llava_next", "image_grid_pinpoints": "(1x1)"}, "got '(1x1)'"),
        ({"model_type": None}, "model_type llava"),
        ({"vision_feature_select_strategy": "full"}, "class token"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "full for a SigLIP tower"),
        ({"vision_feature_layer": [-2, -5]}, "one vision_feature_layer"),
        ({"vision_feature_layer": -25}, "-24..-1"),
        ({"vision_feature_layer": 0}, "1..24"),
        ({"vision_feature_layer": True}, "one vision_feature_layer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act gelu"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"vision_config": []}, "vision_config"),
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"vision_config": {"hidden_act": "tanh"}}, "hidden_act"),
        ({"vision_config": {"num_channels": 1}}, "RGB"),
        ({"vision_config": {"hidden_size": 0}}, "positive whole number"),
        ({"vision_config": {"image_size": [224, 336]}}, "image_size"),
        ({"vision_config": {"hidden_size": 100}}, "multiple"),
        ({"vision_config": {"patch_size": 500}}, "patch_size <= image_size"),
        ({"text_config": {"model_type": "gemma"}}, "llama, mistral, qwen2, got 'gemma'"),
        ({"text_config": {"model_type": "qwen2", "head_dim": 64}}, "times head_dim"),
        ({"text_config": {"model_type": "qwen2", "rope_parameters": LLAMA3}}, "qwen2 graph"),
        ({"text_config": {"hidden_act": "gelu"}}, "silu"),
        ({"text_config": {"num_key_value_heads": 5}}, "num_key_value_heads"),
        ({"text_config": {"rms_norm_eps": float("nan")}}, "positive number"),
        ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "yarn"),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "factor"),
        ({"text_config": {"rope_parameters": [1]}}, "rope_parameters"),
    ],
)
def test_what_cannot_be_converted_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConvertError, match=re.escape(words)) as caught:
        parse({"model_type": "llava"} | change)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message


def test_the_grid_of_llava_next() -> None:
    """(height, width) in config.json, (width, height) in the file; transformers' default where there is none."""
    transformers = pytest.importorskip("transformers")
    assert parse({"model_type": "llava"}).grid == ()
    default = parse({"model_type": "llava_next"}).grid
    assert [[height, width] for width, height in default] == transformers.LlavaNextConfig().image_grid_pinpoints
    assert parse({"model_type": "llava_next", "image_grid_pinpoints": [[336, 1008]]}).grid == ((1008, 336),)


def test_llama3_factors_ramp_from_one_to_the_factor() -> None:
    factors = rope_factors(parse({"model_type": "llava", "text_config": {"rope_parameters": LLAMA3}}).text)
    assert factors.shape == (64,)
    assert factors.dtype == np.float32
    assert (factors[0], factors[-1]) == (1.0, 8.0)
    assert (np.diff(factors) >= 0).all()
