"""What goes into the mmproj file: the vision tower and the projector, under the names that clip.cpp reads.

Facts: tools/mtmd/clip-impl.h (keys and tensor names), tools/mtmd/models/llava.cpp (which layers run).
Two keys decide how deep the encoder goes: with `clip.vision.feature_layer = [n]` and `block_count = n` exactly n layers
run. Without the first the graph stops one layer early, which is why older LLaVA files use the wrong layer. A
post-layernorm would be applied to the features if the file held one; LLaVA takes them before it, so it is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qap_gguf.convert.llava.spec import LlavaSpec
from qap_gguf.convert.llava.tensor_plan import Planner
from qap_gguf.convert.output.writer import Q8_0_BLOCK, Metadata, TensorPlan, f32, f32_list, i32_list, value
from qap_gguf.errors import ConvertError

__all__ = ["MMPROJ_TYPES", "fit_rows", "metadata", "tensors"]

MMPROJ_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # name -> general.file_type
_TOWER, _PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
# What transformers' image processors use where the file names no mean and deviation.
_NORMALIZE = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip


def metadata(spec: LlavaSpec, processor: dict[str, Any], name: str, kind: str, prune: dict[str, Any]) -> Metadata:
    """All keys of the mmproj file but general.architecture. `prune` holds the `qap.*` keys, if any."""
    mean, std = _mean_std(processor, spec.vision.kind)
    v = spec.vision
    keys: Metadata = {
        "general.type": value("mmproj"),
        "general.name": value(name),
        "general.file_type": value(MMPROJ_TYPES[kind]),
        "general.quantization_version": value(2),
        "clip.has_vision_encoder": value(True),
        "clip.projector_type": value("mlp"),
        # Neither of the two means quick_gelu. The projector always uses GELU.
        "clip.use_gelu": value(v.act == "gelu"),
        "clip.use_silu": value(v.act == "silu"),
        "clip.vision.image_size": value(v.image_size),
        "clip.vision.patch_size": value(v.patch_size),
        "clip.vision.embedding_length": value(v.n_embd),
        "clip.vision.feed_forward_length": value(v.n_ff),
        "clip.vision.projection_dim": value(spec.text.n_embd),
        "clip.vision.block_count": value(v.n_layer_used),
        "clip.vision.feature_layer": i32_list([v.n_layer_used]),
        "clip.vision.attention.head_count": value(v.n_head),
        "clip.vision.attention.layer_norm_epsilon": f32(v.eps),
        "clip.vision.image_mean": f32_list(mean),
        "clip.vision.image_std": f32_list(std),
    }
    if spec.grid:
        keys |= {
            "clip.vision.mm_patch_merge_type": value("spatial_unpad"),
            "clip.vision.image_grid_pinpoints": i32_list([side for size in spec.grid for side in size]),
        }
    return keys | {key: value(item) for key, item in prune.items()}


def _mean_std(processor: dict[str, Any], kind: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels (0..1, RGB) from a preprocessor_config.json, however it nests them."""
    nested = processor.get("image_processor")
    config = nested if isinstance(nested, dict) else processor
    if config.get("do_rescale") is False or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ConvertError(
            "expected an image processor that divides pixels by 255, got another; "
            "llama.cpp's preprocessing knows no other"
        )
    if config.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    out = []
    for key, default in zip(("image_mean", "image_std"), _NORMALIZE[kind], strict=True):
        numbers = config.get(key) or default
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(isinstance(n, (int, float)) for n in numbers):
            raise ConvertError(
                f"expected three numbers as {key} in the image processor's config, got {numbers!r}; correct the file"
            )
        out.append([float(n) for n in numbers])
    if min(out[1]) <= 0:
        raise ConvertError(
            f"expected positive numbers as image_std in the image processor's config, got {out[1]}; correct the file"
        )
    return out[0], out[1]


def tensors(planner: Planner, spec: LlavaSpec, kind: str) -> list[TensorPlan]:
    """The tensors in the file's order; matrices as `kind`; vectors, class and position embeddings as F32."""
    v, n_text, big = spec.vision, spec.text.n_embd, kind.upper()
    kernel = big if big == "F16" else "F32"  # of a convolution, for which ggml has these two types
    take, plans = planner.take, []
    n_positions = v.n_tokens + v.has_class_token
    embed = f"{_TOWER}embeddings."
    if v.has_class_token:
        plans.append(take(f"{embed}class_embedding", "v.class_embd", (v.n_embd,)))
    plans.append(
        take(f"{embed}patch_embedding.weight", "v.patch_embd.weight", (v.n_embd, 3, v.patch_size, v.patch_size), kernel)
    )
    if v.kind == "siglip":
        plans.append(take(f"{embed}patch_embedding.bias", "v.patch_embd.bias", (v.n_embd,)))
    plans.append(take(f"{embed}position_embedding.weight", "v.position_embd.weight", (n_positions, v.n_embd)))
    if v.kind == "clip":  # "pre_layrnorm" is how transformers spells it
        plans += [take(f"{_TOWER}pre_layrnorm.{part}", f"v.pre_ln.{part}", (v.n_embd,)) for part in ("weight", "bias")]
    rows = {"mlp.fc1": (v.n_ff, v.n_embd), "mlp.fc2": (v.n_embd, v.n_ff)}
    for i in range(v.n_layer_used):
        for source, target in _LAYER.items():
            shape = rows.get(source, (v.n_embd, v.n_embd)) if "norm" not in source else (v.n_embd,)
            prefix, name = f"{_TOWER}encoder.layers.{i}.{source}", f"v.blk.{i}.{target}"
            plans.append(take(f"{prefix}.weight", f"{name}.weight", shape, big if len(shape) > 1 else "F32"))
            plans.append(take(f"{prefix}.bias", f"{name}.bias", (shape[0],)))
    for source, target, width in (("linear_1", "mm.0", v.n_embd), ("linear_2", "mm.2", n_text)):
        plans.append(take(f"{_PROJECTOR}{source}.weight", f"{target}.weight", (n_text, width), big))
        if spec.projector_bias:
            plans.append(take(f"{_PROJECTOR}{source}.bias", f"{target}.bias", (n_text,)))
        else:  # the graph always adds one
            plans.append(TensorPlan(f"{target}.bias", np.zeros(n_text, np.float32), "F32", (n_text,)))
    if spec.grid:  # ends each row of a tiled image
        plans.append(take("image_newline", "v.image_newline", (n_text,)))
    planner.drop(rf"{_TOWER}(post_layernorm|head)\..*", rf"{_TOWER}embeddings\.position_ids")
    for i in range(v.n_layer_used, v.n_layer):  # after the layer that vision_feature_layer names
        planner.drop(rf"{_TOWER}encoder\.layers\.{i}\..*")
    return plans


def fit_rows(plans: list[TensorPlan]) -> tuple[list[TensorPlan], list[str]]:
    """Matrices whose rows are not made of whole Q8_0 blocks stay F16: the plans corrected, and their names."""
    odd = {p.name for p in plans if p.dtype == "Q8_0" and p.shape[-1] % Q8_0_BLOCK}
    return [replace(p, dtype="F16") if p.name in odd else p for p in plans], sorted(odd)
