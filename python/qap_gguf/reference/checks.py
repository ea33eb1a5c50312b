"""Checks of arguments that the reference's modules share. It imports nothing but NumPy.

Errors are plain ValueError and TypeError in one line: what was expected, what came, what to do.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]

MAX_ABS: Final = 1e30  #: features beyond this are refused: float32 sums of their squares would overflow


def check_features(x: NDArray[np.floating[Any]]) -> F64:
    """Check features of shape (n_tok, n_embd) and return them as float64."""
    if not isinstance(x, np.ndarray) or not np.issubdtype(x.dtype, np.floating):
        got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"features must be a floating-point array, got {got}; convert them to float32")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"features must have shape (n_tok, n_embd), both at least 1, got {x.shape}; reshape them")
    wide = x.astype(np.float64)
    if not np.isfinite(wide).all() or float(np.abs(wide).max()) > MAX_ABS * (1 + 1e-6):  # float32(1e30) is above 1e30
        raise ValueError(f"features must be finite and at most {MAX_ABS:g} in size; look for NaN or infinity upstream")
    return wide


def check_vector(name: str, v: ArrayLike) -> F64:
    """Check a vector of at least one finite number and return it as float64."""
    wide = np.asarray(v, dtype=np.float64)
    if wide.ndim != 1 or wide.size == 0:
        raise ValueError(f"{name} must have shape (n_tok,), n_tok at least 1, got {wide.shape}; reshape it")
    if not np.isfinite(wide).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity; look for its source")
    return wide


def check_weights(needed: bool, weights: ArrayLike | None, n: int) -> F64:
    """Check the weights of n channels and scale them to a mean of 1; ones where none are needed."""
    if needed != (weights is not None):
        got, cure = ("none", "pass them") if needed else ("some", "leave them out")
        raise ValueError(f"channel_weights belong to error model and to no other, got {got}; {cure}")
    if weights is None:
        return np.ones(n)
    wide = check_vector("channel_weights", weights)
    if wide.size != n or (wide < 0).any() or not wide.any():
        raise ValueError(
            f"channel_weights must be {n} numbers from 0, one above it, got {wide.size} with a sum of {wide.sum():g}; "
            "take those of this model"
        )
    return np.asarray(wide / wide.mean())


def check_unit(name: str, value: float) -> float:
    """Check a number in [0, 1]; NaN fails."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}; choose one in that range")
    return float(value)


def check_same_length(**vectors: F64) -> None:
    if len({v.size for v in vectors.values()}) != 1:
        sizes = ", ".join(f"{name} {v.size}" for name, v in vectors.items())
        raise ValueError(f"vectors must have one value for each token, got {sizes}; pass vectors of one image")


def check_number(alpha: object) -> float:
    if isinstance(alpha, (int, float, np.number)) and not isinstance(alpha, (bool, complex)):
        return float(alpha)
    raise ValueError(f'alpha must be a number in [0, 1] or "dynamic", got {alpha!r}; choose one of these')


def check_k(k: int, n: int) -> int:
    k = operator.index(k)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, got {k}; keep at least one token and at most all")
    return k
