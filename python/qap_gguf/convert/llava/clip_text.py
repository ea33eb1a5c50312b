"""CLIP's text tower and its two projections, which an mmproj file carries for the semantic signal `clip_text`.

Facts: transformers 5.23 configuration_clip.py, modeling_clip.py (CLIPTextModelWithProjection, CLIPModel) and
tokenization_clip.py. Readers: native/src/clip-text/load.cpp, and pruning/clip_tokenizer.py for
the tokenizer. The keys and tensors are called `qap_clip_text.*`: llama.cpp ignores names that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf.convert.llava.clip_vocabulary import ClipVocabulary, load_vocabulary
from qap_gguf.convert.llava.spec import VisionSpec
from qap_gguf.convert.llava.tensor_plan import Planner
from qap_gguf.convert.output.writer import Metadata, TensorPlan, f32, i32_list, str_list, value
from qap_gguf.convert.source.checkpoint import Checkpoint, read_json
from qap_gguf.errors import ConvertError

__all__ = ["PREFIX", "VERSION", "ClipText", "load"]

PREFIX, VERSION = "qap_clip_text.", 1
_TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip
_VISION: dict[str, Any] = {"hidden_size": 768, "layer_norm_eps": 1e-5}
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_OLD_EOS = 2  # in configs of 2021; transformers then pools the token with the highest id
_LAYER = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class ClipText:
    """What is added to an mmproj file."""

    metadata: Metadata
    tensors: list[TensorPlan]


@dataclass(frozen=True)
class _Spec:
    n_layer: int
    n_head: int
    n_embd: int
    n_ff: int
    n_ctx: int
    n_vocab: int
    n_proj: int
    n_hidden: int
    eps: float
    eps_vision: float
    activation: str
    eos: int


def load(folder: str | Path, vision: VisionSpec, kind: str) -> ClipText:
    """Keys and tensors (matrices as `kind`, a name of MMPROJ_TYPES) from a CLIPModel checkpoint.

    folder: config.json of model_type clip, *.safetensors, and tokenizer.json or vocab.json with merges.txt.
    vision: the tower of the LLaVA model that the file is made for.

    Raises ConvertError where the checkpoint is no CLIP, is not whole, or has another width than LLaVA's tower.

    Example:
        >>> from qap_gguf.convert.llava.spec import parse
        >>> try:
        ...     load("no/such/folder", parse({"model_type": "llava"}).vision, "f16")
        ... except ConvertError as err:
        ...     print(err)
        clip_text: expected a checkpoint folder, got no/such/folder; give the folder that holds config.json
    """
    try:
        return _load(Path(folder), vision, kind)
    except ConvertError as err:
        raise ConvertError(f"clip_text: {err}") from err
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, ValueError) as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ConvertError(f"clip_text: cannot understand {folder} ({reason}); fetch the checkpoint again") from err


def _load(folder: Path, vision: VisionSpec, kind: str) -> ClipText:
    if vision.kind != "clip":
        raise ConvertError(f"expected a LLaVA with a CLIP tower, got {vision.kind}; leave clip_text out")
    checkpoint = Checkpoint(folder)
    spec = _parse(read_json(folder / "config.json"))
    if spec.n_hidden != vision.n_embd:
        raise ConvertError(
            f"expected a CLIP whose vision tower is {vision.n_embd} wide as the LLaVA's, got {spec.n_hidden}; "
            "give the CLIP that the LLaVA was made from"
        )
    vocabulary = load_vocabulary(folder, spec.n_vocab)
    if spec.eos not in (_OLD_EOS, vocabulary.eos):
        raise ConvertError(
            f"expected the tokenizer's end token {vocabulary.eos} as eos_token_id in config.json, got {spec.eos}; "
            "give the tokenizer that belongs to these weights"
        )
    return ClipText(_metadata(spec, vocabulary), _tensors(Planner(checkpoint), spec, kind.upper()))


def _parse(config: dict[str, Any]) -> _Spec:
    if config.get("model_type") != "clip":
        raise ConvertError(
            f"expected model_type clip in config.json, got {config.get('model_type')!r}; give a CLIPModel checkpoint"
        )
    text, vision = _section(config, "text", _TEXT), _section(config, "vision", _VISION)
    act = text["hidden_act"]
    if act not in _ACTIVATIONS:
        raise ConvertError(f"expected hidden_act {', '.join(_ACTIVATIONS)}, got {act!r}; no other is supported")
    spec = _Spec(
        n_layer=_integer(text, "num_hidden_layers"), n_head=_integer(text, "num_attention_heads"),
        n_embd=_integer(text, "hidden_size"), n_ff=_integer(text, "intermediate_size"),
        n_ctx=_integer(text, "max_position_embeddings", 3), n_vocab=_integer(text, "vocab_size", 3),
        n_proj=_integer({"projection_dim": 512, **config}, "projection_dim"),
        n_hidden=_integer(vision, "hidden_size"), eps=_epsilon(text), eps_vision=_epsilon(vision),
        activation=_ACTIVATIONS[act], eos=_integer(text, "eos_token_id", 0),
    )  # fmt: skip
    if spec.n_embd % spec.n_head:
        raise ConvertError(
            f"expected hidden_size as a multiple of num_attention_heads, got {spec.n_embd} and {spec.n_head}; "
            "correct config.json"
        )
    return spec


def _section(config: dict[str, Any], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """A part of config.json with transformers' defaults; an old <name>_config_dict replaces all of them."""
    found: dict[str, Any] = dict(defaults)
    for key in (f"{name}_config", f"{name}_config_dict"):
        given = config.get(key)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ConvertError(f"expected an object as {key} in config.json, got {given!r}; correct config.json")
        found = {**defaults, **given}
    return found


def _integer(values: dict[str, Any], key: str, low: int = 1) -> int:
    number = values[key]
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number < 1 << 24:
        raise ConvertError(f"expected an integer from {low} as {key} in config.json, got {number!r}; correct it")
    return number


def _epsilon(values: dict[str, Any]) -> float:
    number = values["layer_norm_eps"]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise ConvertError(f"expected layer_norm_eps in 0..1 in config.json, got {number!r}; correct it")
    return float(number)


def _metadata(spec: _Spec, vocabulary: ClipVocabulary) -> Metadata:
    keys: Metadata = {
        "version": value(VERSION),
        "block_count": value(spec.n_layer),
        "attention.head_count": value(spec.n_head),
        "attention.layer_norm_epsilon": f32(spec.eps),
        "embedding_length": value(spec.n_embd),
        "feed_forward_length": value(spec.n_ff),
        "context_length": value(spec.n_ctx),
        "projection_length": value(spec.n_proj),
        "vocab_size": value(spec.n_vocab),
        "activation": value(spec.activation),
        "eos_token_id": value(spec.eos),  # the token whose state is the text's; 2: the one with the highest id
        "vision.embedding_length": value(spec.n_hidden),
        "vision.layer_norm_epsilon": f32(spec.eps_vision),
        "tokenizer.tokens": str_list(vocabulary.tokens),
        "tokenizer.merges": str_list(vocabulary.merges),
        "tokenizer.bos_token_id": value(vocabulary.bos),
        "tokenizer.eos_token_id": value(vocabulary.eos),
        "tokenizer.pad_token_id": value(vocabulary.pad),
        "tokenizer.unknown_token_id": value(vocabulary.unknown),
        "tokenizer.special_token_ids": i32_list(vocabulary.special),
    }
    return {PREFIX + key: item for key, item in keys.items()}


def _tensors(planner: Planner, spec: _Spec, big: str) -> list[TensorPlan]:
    d, text = spec.n_embd, "text_model."

    def take(source: str, name: str, shape: tuple[int, ...], dtype: str = "F32") -> TensorPlan:
        return planner.take(source, PREFIX + name, shape, dtype)

    def both(source: str, name: str, shape: tuple[int, ...]) -> list[TensorPlan]:
        return [
            take(f"{source}.weight", f"{name}.weight", shape, big if len(shape) > 1 else "F32"),
            take(f"{source}.bias", f"{name}.bias", shape[:1]),
        ]

    embed = f"{text}embeddings."
    plans = [
        take(f"{embed}token_embedding.weight", "token_embd.weight", (spec.n_vocab, d), big),
        take(f"{embed}position_embedding.weight", "position_embd.weight", (spec.n_ctx, d)),
    ]
    shapes = {"mlp.fc1": (spec.n_ff, d), "mlp.fc2": (d, spec.n_ff)}
    for i in range(spec.n_layer):
        for source, target in _LAYER.items():
            shape = (d,) if "norm" in source else shapes.get(source, (d, d))
            plans += both(f"{text}encoder.layers.{i}.{source}", f"blk.{i}.{target}", shape)
    plans += both(f"{text}final_layer_norm", "final_ln", (d,))
    plans.append(take("text_projection.weight", "text_proj.weight", (spec.n_proj, d), big))
    plans += both("vision_model.post_layernorm", "post_ln", (spec.n_hidden,))
    plans.append(take("visual_projection.weight", "visual_proj.weight", (spec.n_proj, spec.n_hidden), big))
    planner.drop(r".*")  # the vision tower is LLaVA's own; the rest (logit_scale, position_ids) is not needed
    planner.finish()
    return plans
