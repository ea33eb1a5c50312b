"""What goes into the language model's file: its architecture (`llama` or `qwen2`), metadata and tensors.

Facts: gguf-py constants.py and tensor_mapping.py (keys and names), src/models/llama.cpp and qwen2.cpp (what
the graphs read), transformers modeling_rope_utils.py (the llama3 scaling).
"""

from __future__ import annotations

import math

import numpy as np

from qap_gguf.convert.llava.spec import TextSpec
from qap_gguf.convert.llava.tensor_plan import Planner
from qap_gguf.convert.output.writer import Array, Metadata, TensorPlan, f32, f32_list, i32_list, str_list, value
from qap_gguf.convert.tokenizers.load import Vocabulary
from qap_gguf.errors import ConvertError

__all__ = ["metadata", "tensors"]

_MODEL = "language_model.model."
_LM_HEAD = "language_model.lm_head.weight"
_SPECIAL = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}


def metadata(spec: TextSpec, vocab: Vocabulary, name: str, ftype: int) -> Metadata:
    """All keys of the language model's file but general.architecture."""
    arch = spec.arch
    # Attention in llama.cpp's graphs has no window: up to its length both are the same, so no more is promised.
    n_ctx = spec.n_ctx if spec.window is None else min(spec.n_ctx, spec.window)
    keys: Metadata = {
        "general.type": value("model"),
        "general.name": value(name),
        "general.file_type": value(ftype),
        "general.quantization_version": value(2),
        f"{arch}.vocab_size": value(spec.n_vocab),
        f"{arch}.context_length": value(n_ctx),
        f"{arch}.embedding_length": value(spec.n_embd),
        f"{arch}.block_count": value(spec.n_layer),
        f"{arch}.feed_forward_length": value(spec.n_ff),
        f"{arch}.attention.head_count": value(spec.n_head),
        f"{arch}.attention.head_count_kv": value(spec.n_head_kv),
        f"{arch}.attention.key_length": value(spec.head_dim),
        f"{arch}.attention.value_length": value(spec.head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": f32(spec.eps),
        f"{arch}.rope.dimension_count": value(spec.head_dim),
        f"{arch}.rope.freq_base": f32(spec.rope_theta),
    }
    if spec.rope_type == "linear":
        keys |= {f"{arch}.rope.scaling.type": value("linear"), f"{arch}.rope.scaling.factor": f32(spec.rope["factor"])}
    keys |= {
        "tokenizer.ggml.model": value(vocab.model),
        "tokenizer.ggml.pre": value(vocab.pre),
        "tokenizer.ggml.tokens": str_list(vocab.tokens),
        "tokenizer.ggml.token_type": i32_list(vocab.types),
        "tokenizer.ggml.add_bos_token": value(vocab.add_bos),
        "tokenizer.ggml.add_eos_token": value(vocab.add_eos),
    }
    if vocab.scores:
        keys["tokenizer.ggml.scores"] = f32_list(vocab.scores)
    if vocab.merges:
        keys["tokenizer.ggml.merges"] = str_list(vocab.merges)
    if vocab.add_space_prefix is not None:
        keys["tokenizer.ggml.add_space_prefix"] = value(vocab.add_space_prefix)
    for kind, token in vocab.special.items():
        keys[f"tokenizer.ggml.{_SPECIAL[kind]}_token_id"] = value(token)
    if vocab.chat_template:
        keys["tokenizer.chat_template"] = value(vocab.chat_template)
    return keys


def interleave(weight: Array, n_head: int) -> Array:
    """Rows of a Q or K projection from transformers' order to llama.cpp's, within each head.

    transformers rotates row j together with row j + head_dim / 2; llama.cpp's Llama rotates neighbours (2j, 2j + 1).

    Example:
        >>> interleave(np.arange(4), n_head=1).tolist()
        [0, 2, 1, 3]
    """
    rows, rest = weight.shape[0], weight.shape[1:]
    return weight.reshape(n_head, 2, rows // n_head // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def rope_factors(spec: TextSpec) -> Array:
    """Llama 3's frequency divisors, (head_dim / 2,) float32: 1 for short waves, `factor` for long, a ramp between."""
    factor, low, high = (spec.rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = spec.rope["original_max_position_embeddings"]
    wave = 2 * math.pi * spec.rope_theta ** (np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    smooth = np.clip((context / wave - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def tensors(planner: Planner, spec: TextSpec, dtype: str | None) -> list[TensorPlan]:
    """The tensors in the file's order: matrices as `dtype` (None: the checkpoint's own float type), vectors as F32."""
    q, kv = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    shapes = {
        "self_attn.q_proj": ("attn_q", (q, spec.n_embd), spec.attention_bias),
        "self_attn.k_proj": ("attn_k", (kv, spec.n_embd), spec.attention_bias),
        "self_attn.v_proj": ("attn_v", (kv, spec.n_embd), spec.attention_bias),
        "self_attn.o_proj": ("attn_output", (spec.n_embd, q), spec.output_bias),
        "mlp.gate_proj": ("ffn_gate", (spec.n_ff, spec.n_embd), spec.mlp_bias),
        "mlp.up_proj": ("ffn_up", (spec.n_ff, spec.n_embd), spec.mlp_bias),
        "mlp.down_proj": ("ffn_down", (spec.n_embd, spec.n_ff), spec.mlp_bias),
    }
    reorder = {
        "self_attn.q_proj": lambda w: interleave(w, spec.n_head),
        "self_attn.k_proj": lambda w: interleave(w, spec.n_head_kv),
    }
    if spec.arch != "llama":  # rotated as transformers does it
        reorder = {}
    take = planner.take
    plans = [take(f"{_MODEL}embed_tokens.weight", "token_embd.weight", (spec.n_vocab, spec.n_embd), dtype)]
    for i in range(spec.n_layer):
        layer, block = f"{_MODEL}layers.{i}.", f"blk.{i}."
        plans.append(take(f"{layer}input_layernorm.weight", f"{block}attn_norm.weight", (spec.n_embd,)))
        plans.append(take(f"{layer}post_attention_layernorm.weight", f"{block}ffn_norm.weight", (spec.n_embd,)))
        for source, (target, shape, bias) in shapes.items():
            turn = reorder.get(source)
            plans.append(take(f"{layer}{source}.weight", f"{block}{target}.weight", shape, dtype, turn))
            if bias:
                plans.append(take(f"{layer}{source}.bias", f"{block}{target}.bias", shape[:1], "F32", turn))
    plans.append(take(f"{_MODEL}norm.weight", "output_norm.weight", (spec.n_embd,)))
    if spec.tied:
        _check_tied(planner)
    else:
        plans.append(take(_LM_HEAD, "output.weight", (spec.n_vocab, spec.n_embd), dtype))
    if spec.rope_type == "llama3":
        factors = rope_factors(spec)
        plans.append(TensorPlan("rope_freqs.weight", factors, "F32", factors.shape))
    planner.drop(rf"{_MODEL}layers\.\d+\.self_attn\.rotary_emb\.inv_freq", rf"{_MODEL}rotary_emb\.inv_freq")
    return plans


def _check_tied(planner: Planner) -> None:
    """A tied checkpoint may carry its output matrix again.

    Another one beside the embeddings would be lost, so it is refused.
    """
    head = planner.left.pop(_LM_HEAD, None)
    embed = planner.checkpoint.tensors.get(f"{_MODEL}embed_tokens.weight")
    if head is None or embed is None:
        return
    if head.dtype != embed.dtype or head.shape != embed.shape or not np.array_equal(head.read(), embed.read()):
        raise ConvertError(
            f"expected {head.name} equal to the embeddings as tie_word_embeddings says, got other values; "
            f"set tie_word_embeddings to false in config.json if both were trained"
        )
