"""Tiny random language models as GGUF files, made byte by byte, of each architecture that can be relabelled."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np
import numpy.typing as npt

from convert.gguf_files import Key, Tensor, array, build, f32, f32_list, i32_list, string, text, u32

Array = npt.NDArray[Any]
N_VOCAB, N_LAYER = 320, 3

#: architecture and keyword arguments of `language_keys` for each shape that is tried
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, one key head": ("llama", {"n_kv": 1}),
    "mistral, heads wider than the width": ("llama", {"head_dim": 32}),
    "llama with biases": ("llama", {"bias": True, "output_bias": True}),
    "llama, yarn": ("llama", {"scaling": ("yarn", 4.0)}),
    "llama, linear": ("llama", {"scaling": ("linear", 2.0)}),
    "llama, tied": ("llama", {"tied": True}),
    "internlm2": ("internlm2", {}),
    "qwen2": ("qwen2", {"bias": True}),
    "qwen2, tied": ("qwen2", {"bias": True, "tied": True}),
    "qwen3": ("qwen3", {"norms": True, "head_dim": 32}),
    "qwen3, heads of 20": ("qwen3", {"norms": True, "head_dim": 20}),
}


def language_keys(arch: str, shape: Mapping[str, Any], width: int = 64, n_heads: int = 4) -> list[Key]:
    """Keys of a model with a vocabulary of bytes and a few more tokens."""
    head_dim = shape.get("head_dim", width // n_heads)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{i}" for i in range(N_VOCAB - len(tokens))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (N_VOCAB - 259)]
    keys = [
        ("general.architecture", text(arch)),
        ("general.name", text("tiny")),
        (f"{arch}.context_length", u32(256)),
        (f"{arch}.embedding_length", u32(width)),
        (f"{arch}.block_count", u32(N_LAYER)),
        (f"{arch}.feed_forward_length", u32(96)),
        (f"{arch}.attention.head_count", u32(n_heads)),
        (f"{arch}.attention.head_count_kv", u32(shape.get("n_kv", 2))),
        (f"{arch}.attention.key_length", u32(head_dim)),
        (f"{arch}.attention.value_length", u32(head_dim)),
        (f"{arch}.rope.dimension_count", u32(head_dim)),
        (f"{arch}.rope.freq_base", f32(10000.0)),
        (f"{arch}.attention.layer_norm_rms_epsilon", f32(shape.get("eps", 1e-2))),
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.tokens", array(8, [string(token) for token in tokens])),
        ("tokenizer.ggml.scores", f32_list([0.0] * N_VOCAB)),
        ("tokenizer.ggml.token_type", i32_list(kinds)),
        ("tokenizer.ggml.bos_token_id", u32(1)),
        ("tokenizer.ggml.eos_token_id", u32(2)),
    ]
    if "scaling" in shape:
        kind, factor = shape["scaling"]
        keys += [
            (f"{arch}.rope.scaling.type", text(kind)),
            (f"{arch}.rope.scaling.factor", f32(factor)),
            (f"{arch}.rope.scaling.original_context_length", u32(64)),
        ]
    return keys


def language_tensors(shape: Mapping[str, Any], width: int = 64, n_heads: int = 4) -> list[Tensor]:
    """Random F32 tensors; norms and biases moved away from one and nothing, or a mix-up would hide."""
    random = np.random.default_rng(20265)

    def tensor(name: str, *dims: int, std: float = 0.08, mean: float = 0.0) -> Tensor:
        return name, dims, (mean + random.standard_normal(math.prod(dims)) * std).astype("<f4").tobytes()

    head_dim = shape.get("head_dim", width // n_heads)
    q, kv = n_heads * head_dim, shape.get("n_kv", 2) * head_dim
    out = [tensor("token_embd.weight", width, N_VOCAB, std=0.3)]
    for i in range(N_LAYER):
        block = f"blk.{i}."
        out += [tensor(f"{block}{name}_norm.weight", width, std=0.1, mean=1.0) for name in ("attn", "ffn")]
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            out.append(tensor(f"{block}attn_{name}.weight", width, rows, std=0.2))
            if shape.get("bias"):
                out.append(tensor(f"{block}attn_{name}.bias", rows, std=0.2))
            if shape.get("norms") and name != "v":
                out.append(tensor(f"{block}attn_{name}_norm.weight", head_dim, std=0.1, mean=1.0))
        out.append(tensor(f"{block}attn_output.weight", q, width))
        if shape.get("output_bias"):
            out.append(tensor(f"{block}attn_output.bias", width))
        out += [tensor(f"{block}ffn_{name}.weight", width, 96) for name in ("gate", "up")]
        out.append(tensor(f"{block}ffn_down.weight", 96, width))
    out.append(tensor("output_norm.weight", width, std=0.1, mean=1.0))
    return out if shape.get("tied") else [*out, tensor("output.weight", width, N_VOCAB)]


def language_file(path: Path, name: str = "llama", more: list[Key] | None = None, alignment: int = 32) -> Path:
    """A file of one of SHAPES, with more keys at its end."""
    arch, shape = SHAPES[name]
    aligned = [("general.alignment", struct.pack("<II", 4, alignment))] if alignment != 32 else []
    return build(path, [*language_keys(arch, shape), *(more or []), *aligned], language_tensors(shape), alignment)


def logits(model: Path, ids: list[int], *, repack: bool = True) -> Array:
    """Logits at every position, float32 (n, n_vocab), with an F32 KV cache; `repack`: ggml may reorder weights."""
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = repack
    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", return_value=params):
        llama = llama_cpp.Llama(
            str(model), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0,
            flash_attn=False, verbose=False,
        )  # fmt: skip
    try:
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])
    finally:
        llama.close()


def nmse(got: Array, want: Array) -> float:
    return float(((got.astype("f8") - want) ** 2).sum() / (want.astype("f8") ** 2).sum())
