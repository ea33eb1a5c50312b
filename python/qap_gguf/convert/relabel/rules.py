"""Which language models can be relabelled, as which architecture, and what changes in the file.

A model whose tokens have one position is a model with M-RoPE whose parts are equal. libllama refuses gaps between
positions for the first and allows them for the second (llama-batch.cpp), so the same weights are given the name of an
architecture with M-RoPE that computes the same. Facts: src/models/{llama,internlm2,qwen2,qwen3,ernie4-5,paddleocr,
qwen3vl}.cpp, load_hparams and llama_model_rope_type in src/llama-model.cpp (llama.cpp 0c1e570).

``paddleocr`` rather than ``qwen2vl``: the latter never reads the epsilon of its norms (docs/upstream.md), and asks for
heads that share the width evenly. ``qwen3vl`` has the norms of q and k that Qwen3 needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qap_gguf.convert.output.raw_header import Layout
from qap_gguf.errors import ConvertError
from qap_gguf.files.gguf import GgufInfo

__all__ = ["RULES", "Change", "Rule", "change_of", "has_mrope", "head_rows"]


@dataclass(frozen=True)
class Rule:
    """How models of one architecture are relabelled.

    Attributes:
        target: the architecture with M-RoPE.
        pairs: neighbours are rotated, so the rows of q and k must be put in another order.
        norms: of q and k, which the target must have.
    """

    target: str
    pairs: bool = False
    norms: bool = False


RULES = {
    "llama": Rule("paddleocr", pairs=True),
    "internlm2": Rule("paddleocr", pairs=True),
    "qwen2": Rule("paddleocr"),
    "qwen3": Rule("qwen3vl", norms=True),
}
#: architectures whose image tokens can keep their places as they are; others where the file has sections of rotary axes
MROPE = ("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "paddleocr")

# Keys below the architecture's name that both read alike, or neither reads.
_KEYS = re.compile(
    r"context_length|embedding_length|block_count|feed_forward_length|vocab_size|tensor_data_layout"
    r"|attention\.(head_count(_kv)?|(key|value)_length|layer_norm(_rms)?_epsilon|sliding_window)"
    r"|rope\.(dimension_count|freq_base|scale_linear)"
    r"|rope\.scaling\.(type|factor|original_context_length|finetuned|attn_factor)"
    r"|expert_(used_)?count"
)
_TENSORS = re.compile(
    r"token_embd\.weight|output(_norm)?\.weight"
    r"|blk\.\d+\.(attn_norm|ffn_norm|attn_output|ffn_gate|ffn_up|ffn_down)\.weight"
    r"|blk\.\d+\.attn_[qkv]\.(weight|bias)"
)
_OUTPUT_BIAS = re.compile(r"blk\.\d+\.attn_output\.bias")
_NORMS = re.compile(r"blk\.\d+\.attn_[qk]_norm\.weight")
_Q_OR_K = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")
_WHY_NOT = (
    (r"rope_freqs\.weight", "Llama 3's factors of its rotary frequencies, which no M-RoPE architecture applies"),
    (r"rope_factors_.*", "LongRoPE's factors of its rotary frequencies, which no M-RoPE architecture applies"),
    (r".*(_exps|_inp|_shexp)\..*", "a mixture of experts"),
    (r".*attn_qkv\..*", "q, k and v in one tensor"),
)


@dataclass(frozen=True)
class Change:
    """What becomes of one file.

    Attributes:
        origin, target: the architectures.
        pairs: the rows of q and k are put in another order.
        head_dim: rows of a head.
        sections: how many of the rotated pairs follow each part of a position; the fourth part, which is 0 for text,
            none.
    """

    origin: str
    target: str
    pairs: bool
    head_dim: int
    sections: tuple[int, int, int, int]


def has_mrope(info: GgufInfo) -> bool:
    """Whether the image tokens of a language model can keep their places as it is, by its header.

    Example:
        >>> from pathlib import Path
        >>> keys = {"general.architecture": "glm4", "glm4.rope.dimension_sections": [8, 12, 12, 0]}
        >>> has_mrope(GgufInfo(Path("model.gguf"), keys, {}))
        True
    """
    arch = str(info.metadata.get("general.architecture", ""))
    return arch in MROPE or f"{arch}.rope.dimension_sections" in info.metadata


def _refuse(
    info: GgufInfo, got: str, cure: str = "its image tokens cannot keep their places; leave it as it is"
) -> NoReturn:
    raise ConvertError(f"expected a language model that can be relabelled, got {got} ({info.path}); {cure}")


def change_of(info: GgufInfo, layout: Layout) -> Change:
    """How the file is to be relabelled.

    Raises:
        ConvertError: it cannot be, with the reason.
    """
    keys = info.metadata
    arch = str(keys.get("general.architecture", ""))
    rule = RULES.get(arch)
    if "qap.origin.architecture" in keys:
        _refuse(info, "one that is relabelled already", "use it as it is, or --undo")
    if arch == "clip":
        _refuse(info, "an mmproj", "give the language model")
    if has_mrope(info):
        _refuse(info, f"{arch}, which has M-RoPE", "its image tokens can keep their places as it is")
    if rule is None:
        reason = " with attention in sliding windows" if arch.startswith("gemma") else ""
        _refuse(info, f"the architecture {arch or 'of no name'}{reason}, of which no M-RoPE architecture is a copy")
    if int(keys.get("split.count") or 0) > 1:
        _refuse(info, "one part of several", "merge them with llama-gguf-split first")
    _check_keys(info, arch, layout)
    _check_tensors(info, arch, rule, layout)
    width, heads = int(keys[f"{arch}.embedding_length"]), int(keys[f"{arch}.attention.head_count"])
    head_dim = int(keys.get(f"{arch}.attention.key_length") or width // heads)
    half = head_dim // 2
    # Qwen3-VL deals the pairs out in turn: shares as even as they can be, so that none falls to the fourth part.
    shares = ((half + 2) // 3, (half + 1) // 3, half // 3, 0) if rule.target == "qwen3vl" else (half, 0, 0, 0)
    return Change(arch, rule.target, rule.pairs, head_dim, shares)


def _check_keys(info: GgufInfo, arch: str, layout: Layout) -> None:
    target = RULES[arch].target
    for key in layout.keys:
        if key.name.startswith((f"{target}.", "qap.origin.")):
            _refuse(info, f"one with the key {key.name}", "remove that key")
        if key.name.startswith(f"{arch}.") and not _KEYS.fullmatch(key.name[len(arch) + 1 :]):
            _refuse(info, f"one with the key {key.name}, which {target} does not read as {arch} does")
    keys: Mapping[str, Any] = info.metadata
    if keys.get(f"{arch}.expert_count") or keys.get(f"{arch}.expert_used_count"):
        _refuse(info, "a mixture of experts")
    scaling = str(keys.get(f"{arch}.rope.scaling.type", "none"))
    if scaling not in ("none", "linear", "yarn"):
        _refuse(info, f"rotary positions scaled by {scaling}")


def _check_tensors(info: GgufInfo, arch: str, rule: Rule, layout: Layout) -> None:
    for tensor in layout.tensors:
        name = tensor.name
        known = _TENSORS.fullmatch(name) or (rule.norms and _NORMS.fullmatch(name))
        if known or (rule.target == "paddleocr" and _OUTPUT_BIAS.fullmatch(name)):
            continue
        reason = next((why for pattern, why in _WHY_NOT if re.fullmatch(pattern, name)), f"a tensor that {arch}")
        if reason.startswith("a tensor"):
            reason = f"the tensor {name}, which {rule.target} does not have"
        _refuse(info, reason)


def head_rows(change: Change, name: str, shape: tuple[int, ...]) -> int:
    """Rows of a tensor whose order changes, 0 where it does not.

    Raises:
        ConvertError: they are no whole heads.
    """
    if not change.pairs or not _Q_OR_K.fullmatch(name):
        return 0
    n_rows = shape[-1]
    if n_rows % change.head_dim:
        raise ConvertError(
            f"expected heads of {change.head_dim} rows in {name}, got {n_rows} rows; fetch the file again"
        )
    return n_rows
