"""The method in NumPy: the truth that the native code is compared with. It imports nothing but NumPy.

``scores`` holds the errors, outliers, fusion and cosines, ``selection`` the choice of K tokens and the merging of the
others. All arithmetic is in float64. docs/method.md gives each formula with its source; ggml's own quantizers (error
"q4_0" and the like) are not repeated here.
"""

from __future__ import annotations

from qap_gguf.reference.scores import (
    Scores,
    cosines,
    dynamic_alpha,
    fuse,
    minmax,
    outlier_magnitude,
    quantization_error,
    score,
    sensitivity,
)
from qap_gguf.reference.selection import merge_average, select, topk

__all__ = [
    "Scores",
    "cosines",
    "dynamic_alpha",
    "fuse",
    "merge_average",
    "minmax",
    "outlier_magnitude",
    "quantization_error",
    "score",
    "select",
    "sensitivity",
    "topk",
]
