"""Typed reading of config.json's sections, with one-line errors; the base of the `spec*` modules."""

from __future__ import annotations

import math
from typing import Any

from qap_gguf.errors import ConvertError

__all__ = ["Fields", "section"]

_MAX_LAYERS = 512  # of llama.cpp (LLAMA_MAX_LAYERS)
_MAX_INTEGER = 2**31 - 1  # of a GGUF key that llama.cpp reads as an int


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object `key` of a parsed config.json, {} where there is none. Raises ConvertError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConvertError(
            f"expected an object as {key} in config.json, got {type(value).__name__}; fetch the checkpoint again"
        )
    return value or {}


class Fields:
    """Reads typed values of one config section; an absent key or null means the default."""

    def __init__(self, where: str, values: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.where, self.values, self.defaults = where, values, defaults

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key, default) if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, (list, tuple)) and len(value) > 0 and all(v == value[0] for v in value):
            value = value[0]  # image_size: [336, 336]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConvertError(
                f"expected a positive whole number as {self.where}.{key} in config.json, got {value!r}; "
                "correct config.json"
            )
        most = _MAX_LAYERS if key == "num_hidden_layers" else _MAX_INTEGER
        if value > most:
            raise ConvertError(
                f"expected at most {most} as {self.where}.{key} in config.json, got {value}; correct config.json"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ConvertError(
                f"expected a positive number as {self.where}.{key} in config.json, got {value!r}; correct config.json"
            )
        return float(value)
