"""What config.json says, with the defaults that transformers fills in, as small typed records.

Facts: transformers 5.23 configuration_llava.py, configuration_llava_next.py, configuration_clip.py,
configuration_siglip.py. A key that is absent has the default of its class there (llava-1.5-7b-hf names five keys of its
language model; the rest are Llama 7B's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qap_gguf.convert.llava.config_section import Fields, section
from qap_gguf.convert.llava.spec_text import TextSpec, parse_text
from qap_gguf.errors import ConvertError

__all__ = ["LlavaSpec", "TextSpec", "VisionSpec", "parse"]

# The defaults of the vision config classes, and of a LlavaConfig that has no vision_config at all.
_CLIP: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {**_CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_CLIP_L336: dict[str, Any] = {
    **_CLIP, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
_TOWERS = {"clip_vision_model": ("clip", _CLIP), "siglip_vision_model": ("siglip", _SIGLIP)}
_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LlavaNextConfig's default
_MAX_SIDE = 1 << 14
# Activation -> the GGUF switch that clip.cpp reads: use_gelu, use_silu, or neither (which means quick_gelu).
_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "silu": "silu"}
_PROJECTOR_ACTS = ("gelu", "gelu_pytorch_tanh", "gelu_new")  # the graph of projector "mlp" always applies GELU


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower. `n_layer_used` layers run: those that `vision_feature_layer` needs."""

    kind: str  # "clip" or "siglip"
    n_embd: int
    n_ff: int
    n_head: int
    n_layer: int
    n_layer_used: int
    image_size: int
    patch_size: int
    act: str  # "quick_gelu", "gelu" or "silu"
    eps: float

    @property
    def has_class_token(self) -> bool:
        return self.kind == "clip"

    @property
    def n_tokens(self) -> int:
        """Patches of one image, which is also how many tokens it costs the language model."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class LlavaSpec:
    """`grid`: LLaVA-NeXT's (width, height) in pixels that a large image may be resized to; empty for LLaVA-1.5."""

    vision: VisionSpec
    text: TextSpec
    projector_bias: bool
    grid: tuple[tuple[int, int], ...] = ()


def parse(config: dict[str, Any]) -> LlavaSpec:
    """The checked record of a LLaVA config.json (a dict). Raises ConvertError for other architectures.

    Example:
        >>> spec = parse({"model_type": "llava"})  # transformers' defaults: CLIP-L/336 and Llama 7B
        >>> spec.vision.n_layer_used, spec.vision.n_tokens, spec.text.n_embd
        (23, 576, 4096)
    """
    kind = config.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ConvertError(
            f"expected model_type llava or llava_next in config.json, got {kind!r}; no other LLaVA is supported"
        )
    if "quantization_config" in config:
        raise ConvertError(
            "expected float weights, got a quantization_config in config.json; "
            "convert the checkpoint before it was quantized"
        )
    act = config.get("projector_hidden_act", "gelu")
    if act not in _PROJECTOR_ACTS:
        raise ConvertError(
            f"expected projector_hidden_act gelu, got {act!r}; the projector type mlp of llama.cpp knows no other"
        )
    values, text = section(config, "vision_config"), section(config, "text_config")
    _check_strategy(config.get("vision_feature_select_strategy", "default"), values.get("model_type"))
    vision = _vision(values, config.get("vision_config") is not None, config.get("vision_feature_layer", -2))
    grid = _grid(config.get("image_grid_pinpoints"), vision.image_size) if kind == "llava_next" else ()
    return LlavaSpec(vision, parse_text(text, config), config.get("multimodal_projector_bias") is not False, grid)


def _grid(points: Any, side: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's sizes, (width, height) each; config.json has (height, width), and a default."""
    points = _GRID if points is None else points
    sizes = []
    for pair in points if isinstance(points, list) and points else [points]:
        whole = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int for n in pair)
        if not whole or not all(0 < n <= _MAX_SIDE and n % side == 0 for n in pair):
            raise ConvertError(
                f"expected image_grid_pinpoints of (height, width), multiples of the tower's {side} up to {_MAX_SIDE}, "
                f"in config.json, got {pair!r}; correct config.json"
            )
        sizes.append((int(pair[1]), int(pair[0])))
    return tuple(sizes)


def _check_strategy(strategy: Any, tower: Any) -> None:
    """The strategy must say what the encoder graph does: drop the class token where there is one, and no patch.

    transformers drops the first row with "default" and keeps all rows with "full".
    """
    if tower == "siglip_vision_model" and strategy != "full":
        raise ConvertError(
            f"expected vision_feature_select_strategy full for a SigLIP tower, got {strategy!r}; "
            f"it has no class token, and the encoder graph cannot drop a patch in its place"
        )
    if tower != "siglip_vision_model" and strategy != "default":
        raise ConvertError(
            f"expected vision_feature_select_strategy default, got {strategy!r}; "
            f"the encoder graph drops the class token, so a model trained with it cannot be converted"
        )


def _vision(values: dict[str, Any], given: bool, feature_layer: Any) -> VisionSpec:
    name = values.get("model_type", "clip_vision_model")
    if name not in _TOWERS:
        raise ConvertError(
            f"expected a vision tower {' or '.join(_TOWERS)}, got {name!r}; other towers are not supported"
        )
    kind, defaults = _TOWERS[name]
    get = Fields("vision_config", values, defaults if given else _CLIP_L336)
    act, n_layer, n_embd, n_head = (
        get.get("hidden_act"),
        get.integer("num_hidden_layers"),
        get.integer("hidden_size"),
        get.integer("num_attention_heads"),
    )
    if act not in _ACTS:
        raise ConvertError(
            f"expected vision_config.hidden_act {', '.join(_ACTS)}, got {act!r}; llama.cpp's encoder knows no other"
        )
    if get.integer("num_channels") != 3:
        raise ConvertError(
            f"expected vision_config.num_channels 3, got {get.get('num_channels')}; llama.cpp encodes RGB only"
        )
    if n_embd % n_head:
        raise ConvertError(
            f"expected vision_config.hidden_size as a multiple of num_attention_heads, got {n_embd} and {n_head}; "
            "correct config.json"
        )
    if get.integer("patch_size") > get.integer("image_size"):
        raise ConvertError(
            f"expected vision_config.patch_size <= image_size, got {get.get('patch_size')} and "
            f"{get.get('image_size')}; correct config.json"
        )
    return VisionSpec(
        kind=kind, n_embd=n_embd, n_ff=get.integer("intermediate_size"), n_head=n_head, n_layer=n_layer,
        n_layer_used=_feature_layer(feature_layer, n_layer), image_size=get.integer("image_size"),
        patch_size=get.integer("patch_size"), act=_ACTS[act], eps=get.number("layer_norm_eps"),
    )  # fmt: skip


def _feature_layer(value: Any, n_layer: int) -> int:
    """How many layers run. transformers keeps n_layer + 1 hidden states, the first of them the tower's input."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConvertError(
            f"expected one vision_feature_layer, got {value!r}; features of several layers are not supported"
        )
    used = value if value >= 0 else n_layer + 1 + value
    if not 1 <= used <= n_layer:
        raise ConvertError(
            f"expected vision_feature_layer in -{n_layer}..-1 or 1..{n_layer}, got {value}; correct config.json"
        )
    return used
