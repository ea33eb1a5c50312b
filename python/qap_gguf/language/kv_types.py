"""The types of a KV cache, and what they become as arguments of llama_cpp.Llama."""

from __future__ import annotations

from typing import Any, Final

from qap_gguf.errors import ConfigError

#: Name of a KV cache type -> ggml_type.
KV_TYPES: Final = {"f16": 1, "f32": 0, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20}


def kv_settings(kv: str | None) -> dict[str, Any]:
    """Arguments of ``llama_cpp.Llama`` for a type of the KV cache; None leaves it to llama-cpp-python.

    Raises:
        ConfigError: an unknown type.

    Example:
        >>> kv_settings("q8_0")
        {'flash_attn': True, 'type_k': 8, 'type_v': 8}
    """
    if kv is None:
        return {}
    if kv not in KV_TYPES:
        raise ConfigError(f"kv: expected one of {', '.join(KV_TYPES)}, got {kv!r}; choose one of these")
    return {"flash_attn": True, "type_k": KV_TYPES[kv], "type_v": KV_TYPES[kv]}
