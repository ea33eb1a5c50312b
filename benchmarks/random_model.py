"""A LLaVA-1.5-7B-shaped pair of files with random weights: CLIP-L/336 and its projector, and the shell of a Llama.

Speed does not ask what the weights are, so random ones of the true shapes will do; accuracy would. The encoder is the
whole one: 24 layers in the file as in CLIP-L, 23 of them run (LLaVA takes the last but one), 1024 wide, 577 positions,
f16 matrices, projected to 4096. Of the language model libmtmd only needs the width, so it has one small layer, and the
vocabulary of the packaged model. Keys and names are those that python/qap_gguf/convert writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from qap_gguf.convert.writer import OutputFolder, TensorPlan, f32, f32_list, i32_list, value, write_gguf

N_EMBD, N_HIDDEN, N_HEAD, N_FF, N_LAYER, PATCH, IMAGE = 4096, 1024, 16, 4096, 24, 14, 336


@dataclass(frozen=True)
class RandomModel:
    """Where the two files are."""

    mmproj: Path
    model: Path


def make_random_model(folder: Path, n_layer: int = N_LAYER) -> RandomModel:
    """Write the pair into `folder`, or find it there; `n_layer` layers of the encoder run. 620 MB for 24 layers."""
    made = RandomModel(folder / f"mmproj-random-{n_layer}.gguf", folder / "model-random.gguf")
    pairs = [(made.mmproj, _mmproj(n_layer)), (made.model, _language_model())]
    with OutputFolder(folder, force=False) as out:
        for path, (arch, metadata, plans) in pairs:
            if not path.is_file():
                temporary = out.temp(path)
                write_gguf(temporary, arch, metadata, plans, lambda _: None)
                out.commit((temporary, path))
    return made


def _plans(shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
    """Matrices in f16, vectors in f32, of a size that keeps activations near one."""
    rng = np.random.default_rng(0)
    plans = []
    for name, shape in shapes.items():
        is_big = len(shape) > 1 and "position" not in name
        scale = 0.5 * float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.02
        values: npt.NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        if len(shape) == 1 and name.endswith("weight"):
            values += np.float32(1.0)  # of a norm
        plans.append(TensorPlan(name, values, "F16" if is_big else "F32", shape))
    return plans


def _mmproj(n_layer: int) -> tuple[str, dict[str, Any], list[TensorPlan]]:
    metadata = {
        "general.type": value("mmproj"),
        "general.name": value("random CLIP-L/336"),
        "general.file_type": value(1),
        "clip.has_vision_encoder": value(True),
        "clip.projector_type": value("mlp"),
        "clip.use_gelu": value(False),
        "clip.use_silu": value(False),
        "clip.vision.image_size": value(IMAGE),
        "clip.vision.patch_size": value(PATCH),
        "clip.vision.embedding_length": value(N_HIDDEN),
        "clip.vision.feed_forward_length": value(N_FF),
        "clip.vision.projection_dim": value(N_EMBD),
        "clip.vision.block_count": value(n_layer),
        "clip.vision.feature_layer": i32_list([n_layer]),
        "clip.vision.attention.head_count": value(N_HEAD),
        "clip.vision.attention.layer_norm_epsilon": f32(1e-5),
        "clip.vision.image_mean": f32_list([0.48145466, 0.4578275, 0.40821073]),
        "clip.vision.image_std": f32_list([0.26862954, 0.26130258, 0.27577711]),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "v.class_embd": (N_HIDDEN,),
        "v.patch_embd.weight": (N_HIDDEN, 3, PATCH, PATCH),
        "v.position_embd.weight": ((IMAGE // PATCH) ** 2 + 1, N_HIDDEN),
        "v.pre_ln.weight": (N_HIDDEN,),
        "v.pre_ln.bias": (N_HIDDEN,),
    }
    rows = {"ffn_up": (N_FF, N_HIDDEN), "ffn_down": (N_HIDDEN, N_FF), "ln1": (N_HIDDEN,), "ln2": (N_HIDDEN,)}
    for i in range(n_layer):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out", "ln1", "ln2", "ffn_up", "ffn_down"):
            shape = rows.get(part, (N_HIDDEN, N_HIDDEN))
            shapes |= {f"v.blk.{i}.{part}.weight": shape, f"v.blk.{i}.{part}.bias": shape[:1]}
    for name, width in (("mm.0", N_HIDDEN), ("mm.2", N_EMBD)):
        shapes |= {f"{name}.weight": (N_EMBD, width), f"{name}.bias": (N_EMBD,)}
    return "clip", metadata, _plans(shapes)


def _language_model() -> tuple[str, dict[str, Any], list[TensorPlan]]:
    fields = gguf.GGUFReader(qap.packaged_model().model).fields
    metadata: dict[str, Any] = {}
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            kinds = list(field.types)
            sub = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            metadata[key] = (field.contents(), kinds[0], sub)
    n_vocab, n_ff, head = len(metadata["tokenizer.ggml.tokens"][0]), 256, 128
    metadata |= {
        "general.type": value("model"),
        "general.name": value("random shell"),
        "general.file_type": value(1),
        "llama.vocab_size": value(n_vocab),
        "llama.context_length": value(4096),
        "llama.embedding_length": value(N_EMBD),
        "llama.block_count": value(1),
        "llama.feed_forward_length": value(n_ff),
        "llama.attention.head_count": value(N_EMBD // head),
        "llama.attention.head_count_kv": value(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.dimension_count": value(head),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, N_EMBD),
        "blk.0.attn_norm.weight": (N_EMBD,),
        "blk.0.ffn_norm.weight": (N_EMBD,),
        "blk.0.attn_q.weight": (N_EMBD, N_EMBD),
        "blk.0.attn_k.weight": (head, N_EMBD),
        "blk.0.attn_v.weight": (head, N_EMBD),
        "blk.0.attn_output.weight": (N_EMBD, N_EMBD),
        "blk.0.ffn_gate.weight": (n_ff, N_EMBD),
        "blk.0.ffn_up.weight": (n_ff, N_EMBD),
        "blk.0.ffn_down.weight": (N_EMBD, n_ff),
        "output_norm.weight": (N_EMBD,),
        "output.weight": (n_vocab, N_EMBD),
    }
    return "llama", metadata, _plans(shapes)
