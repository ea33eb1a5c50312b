"""Sizes of models that people run: what a file of random weights must look like to be as fast as the true one.

Facts: the config.json of llava-hf/llava-1.5-7b-hf and -13b-hf, HuggingFaceTB/SmolVLM-256M-Instruct,
Qwen/Qwen2.5-VL-3B-Instruct, google/gemma-3-4b-it and OpenGVLab/InternVL3-1B (sizes); src/models/llama.cpp, qwen2.cpp,
qwen2vl.cpp and gemma3.cpp, tools/mtmd/clip-impl.h and
tools/mtmd/models/*.cpp of llama.cpp (names of keys and tensors); src/llama-quant.cpp (which tensors of a Q4_0 file are
not Q4_0: the output matrix, or the embedding that stands for it, is Q6_K, or Q8_0 where 256 does not divide a row).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qap_gguf.convert.output.writer import Metadata, f32, f32_list, i32_list, value
from qap_gguf.errors import ConfigError
from qap_gguf.generation.chat_formats import VICUNA

CLIP_MEAN: Final = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD: Final = [0.26862954, 0.26130258, 0.27577711]
HALF: Final = [0.5, 0.5, 0.5]
#: Mean and standard deviation of the channels, where they are not CLIP's: SigLIP's, ImageNet's.
_MEANS: Final = {"idefics3": HALF, "gemma3": HALF, "internvl": [0.485, 0.456, 0.406]}
_STDS: Final = {"idefics3": HALF, "gemma3": HALF, "internvl": [0.229, 0.224, 0.225]}
_GELU: Final = tuple(_MEANS)  # towers with GELU and a bias of the patches


@dataclass(frozen=True)
class Language:
    """Sizes of a language model; `arch` is llama.cpp's name of it."""

    arch: str
    n_vocab: int
    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_ctx: int
    rope_base: float = 10000.0
    eps: float = 1e-5
    tied: bool = False  # the embedding is the output matrix too
    bias: bool = False  # of query, key and value
    rope_sections: tuple[int, ...] = ()
    head_dim: int = 0  # 0: n_embd / n_head
    norms: bool = False  # of query and key, and after attention and feed-forward
    window: int = 0  # tokens that most layers attend to; 0: all
    #: Texts that libmtmd puts around an image: one token each in the true vocabulary.
    special: tuple[str, ...] = ()
    #: Words of the prompt's template, a token each as about in the true vocabulary; other text has a token a letter.
    words: tuple[str, ...] = ()

    @property
    def n_head_dim(self) -> int:
        """Numbers of a head."""
        return self.head_dim or self.n_embd // self.n_head


@dataclass(frozen=True)
class Vision:
    """Sizes of an image encoder; `projector` is libmtmd's name of the family."""

    projector: str
    n_embd: int
    n_layer: int  # those that run
    n_ff: int
    n_head: int
    image: int
    patch: int
    eps: float = 1e-5
    merge: int = 1  # patches that become one token, along each side
    extra: tuple[tuple[str, int], ...] = ()  # further integer keys below clip.vision.


@dataclass(frozen=True)
class Shape:
    """One model: `name` is what ``qap-gguf bench --shape`` takes."""

    name: str
    language: Language
    vision: Vision


_CLIP_L: Final = Vision("mlp", 1024, 23, 4096, 16, 336, 14)  # LLaVA takes the output of the last layer but one
#: The words of LLaVA's system text.
_VICUNA: Final = tuple(sorted({word for word in re.findall(r" ?\w+", f"{VICUNA.system} USER") if len(word) > 1}))
_TILES: Final = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))

SHAPES: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5-7b", Language("llama", 32064, 4096, 32, 11008, 32, 32, 4096, words=_VICUNA), _CLIP_L),
        Shape("llava-1.5-13b", Language("llama", 32064, 5120, 40, 13824, 40, 40, 4096, words=_VICUNA), _CLIP_L),
        Shape(
            "smolvlm-256m",
            Language(
                "llama", 49280, 576, 30, 1536, 9, 3, 8192, rope_base=100000.0,
                special=("\n", "\n\n", "<fake_token_around_image>", "<global-img>", *_TILES),
            ),
            Vision(
                "idefics3", 768, 12, 3072, 12, 512, 16, eps=1e-6, merge=4,
                extra=(("projector.scale_factor", 4), ("preproc_image_size", 2048)),
            ),
        ),
        Shape(
            "qwen2.5-vl-3b",
            Language(
                "qwen2vl", 151936, 2048, 36, 11008, 16, 2, 128000, rope_base=1000000.0, eps=1e-6, tied=True, bias=True,
                rope_sections=(16, 24, 24, 0), special=("<|vision_start|>", "<|vision_end|>"),
            ),
            Vision("qwen2.5vl_merger", 1280, 32, 3420, 16, 560, 14, eps=1e-6, merge=2, extra=(("n_wa_pattern", 8),)),
        ),
        Shape(
            "gemma-3-4b",
            Language(
                "gemma3", 262208, 2560, 34, 10240, 8, 4, 131072, rope_base=1000000.0, eps=1e-6, tied=True, head_dim=256,
                norms=True, window=1024, special=("<start_of_image>", "<end_of_image>"),
            ),
            Vision("gemma3", 1152, 27, 4304, 16, 896, 14, eps=1e-6, merge=4),
        ),
        Shape(
            "internvl3-1b",
            Language(
                "qwen2", 151674, 896, 24, 4864, 14, 2, 32768, rope_base=1000000.0, eps=1e-6, bias=True,
                special=("<img>", "</img>"),
            ),
            Vision("internvl", 1024, 24, 4096, 16, 448, 14, eps=1e-6, merge=2, extra=(("projector.scale_factor", 2),)),
        ),
    )
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: there is none.

    Example:
        >>> find_shape("llava-1.5-7b").language.n_layer
        32
    """
    if name not in SHAPES:
        raise ConfigError(f"shape: expected one of {', '.join(SHAPES)}, got {name!r}; choose one of these")
    return SHAPES[name]


@dataclass(frozen=True)
class Tensor:
    """A tensor to make up: its name, ggml type and shape in PyTorch's order (a row last)."""

    name: str
    kind: str
    shape: tuple[int, ...]


def _vector(name: str, n: int) -> Tensor:
    return Tensor(name, "F32", (n,))


def language_tensors(m: Language) -> list[Tensor]:
    """The tensors of a Q4_0 file of this language model."""
    head = m.n_head_dim
    n_q, n_kv = head * m.n_head, head * m.n_head_kv
    last = "Q6_K" if m.n_embd % 256 == 0 else "Q8_0"
    out = [Tensor("token_embd.weight", last if m.tied else "Q4_0", (m.n_vocab, m.n_embd))]
    matrices = {
        "attn_q": (n_q, m.n_embd), "attn_k": (n_kv, m.n_embd), "attn_v": (n_kv, m.n_embd),
        "attn_output": (m.n_embd, n_q), "ffn_gate": (m.n_ff, m.n_embd), "ffn_up": (m.n_ff, m.n_embd),
        "ffn_down": (m.n_embd, m.n_ff),
    }  # fmt: skip
    after = ("post_attention_norm", "post_ffw_norm") if m.norms else ()
    for i in range(m.n_layer):
        out += [_vector(f"blk.{i}.{name}.weight", m.n_embd) for name in ("attn_norm", "ffn_norm", *after)]
        out += [_vector(f"blk.{i}.{name}.weight", head) for name in ("attn_q_norm", "attn_k_norm") if m.norms]
        for name, shape in matrices.items():
            out.append(Tensor(f"blk.{i}.{name}.weight", "Q4_0", shape))
            if m.bias and name in ("attn_q", "attn_k", "attn_v"):
                out.append(_vector(f"blk.{i}.{name}.bias", shape[0]))
    out.append(_vector("output_norm.weight", m.n_embd))
    if not m.tied:
        out.append(Tensor("output.weight", last, (m.n_vocab, m.n_embd)))
    return out


def language_metadata(m: Language, name: str) -> Metadata:
    """All keys of the file but general.architecture and the vocabulary's."""
    head = m.n_head_dim
    keys: Metadata = {
        "general.type": value("model"),
        "general.name": value(name),
        "general.file_type": value(2),
        "general.quantization_version": value(2),
    }
    numbers: dict[str, Any] = {
        "vocab_size": m.n_vocab, "context_length": m.n_ctx, "embedding_length": m.n_embd, "block_count": m.n_layer,
        "feed_forward_length": m.n_ff, "attention.head_count": m.n_head, "attention.head_count_kv": m.n_head_kv,
        "rope.dimension_count": head,
    }  # fmt: skip
    numbers |= {"attention.key_length": head, "attention.value_length": head} if m.head_dim else {}
    numbers |= {"attention.sliding_window": m.window} if m.window else {}
    keys |= {f"{m.arch}.{key}": value(number) for key, number in numbers.items()}
    keys[f"{m.arch}.attention.layer_norm_rms_epsilon"] = f32(m.eps)
    keys[f"{m.arch}.rope.freq_base"] = f32(m.rope_base)
    if m.rope_sections:
        keys[f"{m.arch}.rope.dimension_sections"] = i32_list(list(m.rope_sections))
    return keys


def vision_tensors(v: Vision, n_embd: int) -> list[Tensor]:
    """The tensors of the mmproj file, f16, for a language model that is `n_embd` wide."""
    qwen, clip, internvl = v.projector == "qwen2.5vl_merger", v.projector == "mlp", v.projector == "internvl"
    kernel = (v.n_embd, 3, v.patch, v.patch)
    n_patches = (v.image // v.patch) ** 2
    out = [Tensor("v.patch_embd.weight", "F16", kernel)]
    if qwen:
        out.append(Tensor("v.patch_embd.weight.1", "F16", kernel))
    else:
        out.append(Tensor("v.position_embd.weight", "F32", (n_patches + (clip or internvl), v.n_embd)))
    if clip:
        out += [_vector(name, v.n_embd) for name in ("v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias")]
    if internvl:
        out.append(_vector("v.class_embd", v.n_embd))
    if v.projector in _GELU:
        out.append(_vector("v.patch_embd.bias", v.n_embd))
    square, up, down = (v.n_embd, v.n_embd), (v.n_ff, v.n_embd), (v.n_embd, v.n_ff)
    matrices = {"attn_q": square, "attn_k": square, "attn_v": square, "attn_out": square}
    matrices |= {"ffn_up": up, "ffn_down": down} | ({"ffn_gate": up} if qwen else {})
    norms = ("weight",) if qwen else ("weight", "bias")
    for i in range(v.n_layer):
        out += [_vector(f"v.blk.{i}.{ln}.{part}", v.n_embd) for ln in ("ln1", "ln2") for part in norms]
        out += [_vector(f"v.blk.{i}.{scale}.weight", v.n_embd) for scale in ("ls1", "ls2") if internvl]
        for name, shape in matrices.items():
            out.append(Tensor(f"v.blk.{i}.{name}.weight", "F16", shape))
            out.append(_vector(f"v.blk.{i}.{name}.bias", shape[0]))
    if not clip and not internvl:
        out += [_vector(f"v.post_ln.{part}", v.n_embd) for part in norms]
    width = v.n_embd * v.merge**2
    if v.projector == "idefics3":
        return [*out, Tensor("mm.model.fc.weight", "F16", (n_embd, width))]
    if v.projector == "gemma3":
        projection = Tensor("mm.input_projection.weight", "F16", (v.n_embd, n_embd))
        return [*out, projection, _vector("mm.soft_emb_norm.weight", v.n_embd)]
    if internvl:
        out += [_vector(f"mm.model.mlp.0.{part}", width) for part in norms]
        for number, columns in ((1, width), (3, n_embd)):
            name = f"mm.model.mlp.{number}"
            out += [Tensor(f"{name}.weight", "F16", (n_embd, columns)), _vector(f"{name}.bias", n_embd)]
        return out
    for name, shape in (("mm.0", (width if qwen else n_embd, width)), ("mm.2", (n_embd, width if qwen else n_embd))):
        out += [Tensor(f"{name}.weight", "F16", shape), _vector(f"{name}.bias", shape[0])]
    return out


def vision_metadata(v: Vision, n_embd: int, name: str) -> Metadata:
    """All keys of the mmproj file but general.architecture."""
    clip, qwen = v.projector == "mlp", v.projector == "qwen2.5vl_merger"
    keys: Metadata = {
        "general.type": value("mmproj"),
        "general.name": value(name),
        "general.file_type": value(1),
        "clip.has_vision_encoder": value(True),
        "clip.projector_type": value(v.projector),
        "clip.use_gelu": value(v.projector in _GELU),
        "clip.use_silu": value(qwen),
        "clip.vision.attention.layer_norm_epsilon": f32(v.eps),
        "clip.vision.image_mean": f32_list(_MEANS.get(v.projector, CLIP_MEAN)),
        "clip.vision.image_std": f32_list(_STDS.get(v.projector, CLIP_STD)),
    }
    numbers = {
        "image_size": v.image, "patch_size": v.patch, "embedding_length": v.n_embd, "feed_forward_length": v.n_ff,
        "projection_dim": n_embd, "block_count": v.n_layer, "attention.head_count": v.n_head, **dict(v.extra),
    }  # fmt: skip
    keys |= {f"clip.vision.{key}": value(number) for key, number in numbers.items()}
    if clip:
        keys["clip.vision.feature_layer"] = i32_list([v.n_layer])
    return keys
