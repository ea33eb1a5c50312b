"""Random features and the two figures that the tests of the native scores bound. No test in here."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
TINY = 1.1754944e-38


def tokens(n: int, d: int, seed: int = 0, scale: float = 1.0) -> F32:
    """Random features (n, d) whose rows differ in size by a factor of up to five, as image tokens do."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.2, 1.0, (n, 1)) if n > 1 else np.ones((1, 1))
    x = np.clip(rng.standard_normal((n, d)) * sizes, -4.0, 4.0) / 4.0
    return np.ascontiguousarray(x * scale, dtype=np.float32)


def relevance(n: int, seed: int = 1) -> F32:
    return np.random.default_rng(seed).gamma(0.5, size=n).astype(np.float32)


def nmse(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    unit = max(float(np.abs(b).max()), TINY)  # 1e30 squared is fine in float64, 1e-38 squared too; be sure anyway
    return float(np.square((a - b) / unit).sum() / max(float(np.square(b / unit).sum()), 1e-300))


def largest(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max() / max(float(np.abs(b).max()), TINY))
