"""The language model that config.json describes: Llama (Vicuna is one), Mistral or Qwen2.

Facts: transformers 5.23 configuration_llama.py, configuration_mistral.py, configuration_qwen2.py (defaults, biases,
sliding windows), modeling_rope_utils.py; llama.cpp src/models/llama.cpp and qwen2.cpp (what each graph can do).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qap_gguf.convert.llava.config_section import Fields
from qap_gguf.errors import ConvertError

__all__ = ["TextSpec", "parse_text"]

_SHARED: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
# model_type -> (architecture in llama.cpp, defaults of transformers' config class)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}),
    "mistral": (
        "llama",
        {
            "vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072,
            "num_key_value_heads": 8, "sliding_window": 4096,
        },
    ),
    "qwen2": (
        "qwen2",
        {
            "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
            "num_key_value_heads": 32, "sliding_window": 4096,
        },
    ),
}  # fmt: skip
_TOKEN_IDS: dict[str, dict[str, int | None]] = {
    "llama": {"bos": 1, "eos": 2, "pad": None},
    "mistral": {"bos": 1, "eos": 2, "pad": None},
    "qwen2": {"bos": None, "eos": None, "pad": None},
}
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class TextSpec:
    """The language model. `rope` holds the scaling parameters as config.json names them.

    `arch` is its name in llama.cpp. `window`: how far attention reaches back, None without a limit.
    """

    arch: str
    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx: int
    window: int | None
    eps: float
    tied: bool
    attention_bias: bool  # q, k and v
    output_bias: bool  # of the attention
    mlp_bias: bool
    rope_theta: float
    rope_type: str
    rope: dict[str, float]
    token_ids: dict[str, int | list[int]]  # bos, eos, pad as config.json gives them


def parse_text(values: dict[str, Any], top: dict[str, Any]) -> TextSpec:
    """The checked record of `text_config`. `top`: the whole config, which may tie the embeddings as well.

    Raises ConvertError for a language model that llama.cpp would compute otherwise.

    Example:
        >>> spec = parse_text({"model_type": "mistral", "num_hidden_layers": 2}, {})
        >>> spec.arch, spec.n_layer, spec.n_head_kv, spec.window
        ('llama', 2, 8, 4096)
    """
    name = values.get("model_type", "llama")
    if name not in _MODELS:
        raise ConvertError(
            f"expected text_config.model_type {', '.join(_MODELS)}, got {name!r}; "
            "no other language model is supported in a LLaVA"
        )
    arch, defaults = _MODELS[name]
    get = Fields("text_config", values, _SHARED | defaults)
    if get.get("hidden_act") != "silu":
        raise ConvertError(
            f"expected text_config.hidden_act silu, got {get.get('hidden_act')!r}; "
            f"llama.cpp's {arch} graph knows no other"
        )
    n_embd, n_head = get.integer("hidden_size"), get.integer("num_attention_heads")
    null = "num_key_value_heads" in values and values["num_key_value_heads"] is None
    n_head_kv = n_head if null else get.integer("num_key_value_heads", n_head)
    head_dim = get.integer("head_dim", n_embd // n_head)
    if n_head % n_head_kv or head_dim % 2:
        raise ConvertError(
            f"expected num_attention_heads as a multiple of num_key_value_heads and an even head_dim, "
            f"got {n_head}, {n_head_kv}, {head_dim}; correct config.json"
        )
    if arch == "qwen2" and head_dim * n_head != n_embd:
        raise ConvertError(
            f"expected hidden_size as num_attention_heads times head_dim, got {n_embd}, {n_head}, {head_dim}; "
            "llama.cpp's qwen2 graph knows no other"
        )
    theta, rope_type, rope = _rope(values)
    if rope_type == "llama3" and arch != "llama":
        raise ConvertError(
            f"expected a RoPE type default or linear for {name}, got llama3; llama.cpp's {arch} graph knows no other"
        )
    ids = {k: values.get(f"{k}_token_id", d) for k, d in _TOKEN_IDS[name].items()}
    qwen = name == "qwen2"  # biases of q, k and v, whatever config.json says
    llama_bias = name == "llama" and bool(values.get("attention_bias"))
    return TextSpec(
        arch=arch, n_vocab=get.integer("vocab_size"), n_embd=n_embd, n_ff=get.integer("intermediate_size"),
        n_layer=get.integer("num_hidden_layers"), n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim,
        n_ctx=get.integer("max_position_embeddings"), window=_window(name, get), eps=get.number("rms_norm_eps"),
        # LlavaConfig ties the embeddings when either of the two places says so.
        tied=bool(values.get("tie_word_embeddings") or top.get("tie_word_embeddings")),
        attention_bias=llama_bias or qwen, output_bias=llama_bias,
        mlp_bias=name == "llama" and bool(values.get("mlp_bias")),
        rope_theta=theta, rope_type=rope_type, rope=rope,
        token_ids={k: v for k, v in ids.items() if isinstance(v, (int, list))},
    )  # fmt: skip


def _window(name: str, get: Fields) -> int | None:
    """The sliding window, None where attention sees everything. A null in config.json means none."""
    values = get.values
    if name == "llama" or ("sliding_window" in values and values["sliding_window"] is None):
        return None
    if name == "qwen2":
        layers = values.get("layer_types")
        if isinstance(layers, list):
            used = "sliding_attention" in layers
        else:
            limit = values.get("max_window_layers", 28)
            used = not isinstance(limit, int) or limit < get.integer("num_hidden_layers")
        if not values.get("use_sliding_window") or not used:
            return None
    return get.integer("sliding_window")


def _rope(values: dict[str, Any]) -> tuple[float, str, dict[str, float]]:
    """RoPE's base, type and scaling: rope_parameters in transformers 5, rope_theta and rope_scaling in version 4."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConvertError(
            f"expected an object as text_config.rope_parameters in config.json, got {given!r}; correct config.json"
        )
    name = given.get("rope_type", given.get("type", "default"))
    if name not in _ROPE_TYPES:
        raise ConvertError(
            f"expected a RoPE type {', '.join(_ROPE_TYPES)}, got {name!r}; other scalings are not supported yet"
        )
    get = Fields("text_config.rope_parameters", given, {})
    theta = get.number("rope_theta", values.get("rope_theta") or 10000.0)
    rope: dict[str, float] = {}
    if name == "linear":
        rope = {"factor": get.number("factor")}
    elif name == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = {key: get.number(key) for key in keys}
    return theta, name, rope
