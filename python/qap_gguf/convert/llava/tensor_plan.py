"""Matches a checkpoint's tensors with those that a GGUF file needs; says what is missing, left over or misshapen."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from qap_gguf.convert.output.writer import Array, TensorPlan
from qap_gguf.convert.source.checkpoint import Checkpoint
from qap_gguf.errors import ConvertError

__all__ = ["Planner"]


class Planner:
    """Takes tensors out of a checkpoint by canonical name; `finish` raises what went wrong, all at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.left = dict(checkpoint.tensors)
        self.missing: list[str] = []

    def take(
        self,
        source: str,
        name: str,
        shape: tuple[int, ...],
        dtype: str | None = "F32",
        transform: Callable[[Array], Array] | None = None,
    ) -> TensorPlan:
        """A plan to write `source` as `name`. `dtype` None keeps the checkpoint's own float type."""
        ref = self.left.pop(source, None)
        if ref is None:
            self.missing.append(source)
            return TensorPlan(name, np.zeros(0, np.float32), "F32", shape)  # never written: finish() raises
        if ref.shape != shape:
            raise ConvertError(
                f"expected shape {list(shape)} of {ref.name} by config.json, got {list(ref.shape)}; "
                f"give the config.json that belongs to these weights"
            )
        if ref.dtype not in ("F64", "F32", "F16", "BF16"):
            raise ConvertError(
                f"expected float values in {ref.name}, got {ref.dtype}; convert the checkpoint that is not quantized"
            )
        own = ref.dtype if ref.dtype in ("F16", "BF16") else "F32"
        return TensorPlan(name, ref, own if dtype is None else dtype, shape, transform)

    def drop(self, *patterns: str) -> None:
        """Forgets the tensors whose whole canonical name matches: they are known and not needed."""
        for pattern in patterns:
            for name in [n for n in self.left if re.fullmatch(pattern, n)]:
                del self.left[name]

    def finish(self) -> None:
        """Raises ConvertError if a tensor was missing, or if the checkpoint holds one that nobody took."""
        if self.missing:
            raise ConvertError(
                f"expected {len(self.missing)} more tensors in the checkpoint: {_some(self.missing)}; "
                f"fetch all of its files and the config.json that belongs to them"
            )
        if self.left:
            names = [ref.name for ref in self.left.values()]
            raise ConvertError(
                f"expected only LLaVA's tensors, got {len(names)} others: {_some(names)}; "
                f"this architecture is not supported, or config.json belongs to other weights"
            )


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
