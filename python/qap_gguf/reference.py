"""The method in NumPy: the truth that the native code is compared with. It imports nothing but NumPy.

Facts: QAPruner (arXiv 2604.02816, section 3) and its authors' public reference: scores on the projector's output,
groups of 128 channels, scale = absmax / 7, alpha 0.7 or dynamic. docs/design.md, section 3, spells out what zero,
constant and single-token inputs give. All arithmetic is in float64; ties in rounding go away from zero as in C's
round(), which is what ggml uses.
"""

from __future__ import annotations

import operator
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Scores",
    "dynamic_alpha",
    "fuse",
    "minmax",
    "outlier_magnitude",
    "quantization_error",
    "score",
    "select",
    "sensitivity",
    "topk",
]

F64 = NDArray[np.float64]

MAX_ABS: Final = 1e30  #: features beyond this are refused: float32 sums of their squares would overflow
SCALE_EPS: Final = 1e-8  #: added to the scale before the division, as in the paper's code
SPAN_MIN: Final = 1.1754944e-38  #: smallest normal float32: constants give zeros, not 0 / 0
_BITS: Final = {f"int{bits}": bits for bits in range(2, 9)}
_MASK: Final = 2**64 - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15


class Scores(NamedTuple):
    """All parts of the score of one image. Arrays are float64 of shape (n_tok,).

    Attributes:
        error: L2 norm of the quantization error of each token, >= 0, in the features' unit.
        outlier: outlier magnitude of each token, >= 0, in the features' unit.
        sensitivity: both of them min-max normalised and mixed, in [0, 1].
        semantic: the semantic score, min-max normalised, in [0, 1]; zeros when none was given.
        alpha: weight of `semantic` that was used, in [0, 1].
        total: alpha * semantic + (1 - alpha) * sensitivity, in [0, 1].
    """

    error: F64
    outlier: F64
    sensitivity: F64
    semantic: F64
    alpha: float
    total: F64


def _features(x: NDArray[np.floating[Any]]) -> F64:
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


def _vector(name: str, v: ArrayLike) -> F64:
    """Check a vector of at least one finite number and return it as float64."""
    wide = np.asarray(v, dtype=np.float64)
    if wide.ndim != 1 or wide.size == 0:
        raise ValueError(f"{name} must have shape (n_tok,), n_tok at least 1, got {wide.shape}; reshape it")
    if not np.isfinite(wide).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity; look for its source")
    return wide


def _unit(name: str, value: float) -> float:
    """Check a number in [0, 1]; NaN fails."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}; choose one in that range")
    return float(value)


def _same_length(**vectors: F64) -> None:
    if len({v.size for v in vectors.values()}) != 1:
        sizes = ", ".join(f"{name} {v.size}" for name, v in vectors.items())
        raise ValueError(f"vectors must have one value for each token, got {sizes}; pass vectors of one image")


def quantization_error(x: NDArray[np.floating[Any]], error: str = "int4", group_size: int = 128) -> F64:
    """Return the L2 norm of what symmetric group-wise quantization changes in each token.

    In each group g of `group_size` channels: L = 2**(b-1) - 1, s = max|x_g| / L, q = round(x / (s + 1e-8)),
    error = x - s * q. A last, shorter group is a group of its own.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.
        error: "int2" .. "int8".
        group_size: channels in a group, at least 1.

    Returns:
        float64, shape (n_tok,), >= 0.

    Raises:
        TypeError, ValueError: `x` or a setting is not as above.

    Example:
        >>> quantization_error(np.array([[7.0, 1.0, -2.4]], np.float32)).round(4)
        array([0.4])
    """
    if error not in _BITS:
        raise ValueError(f"error must be one of {', '.join(_BITS)}, got {error!r}; choose one of these")
    if operator.index(group_size) < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}; the usual value is 128")
    wide = _features(x)
    levels = 2 ** (_BITS[error] - 1) - 1
    squares = np.zeros(wide.shape[0])
    for start in range(0, wide.shape[1], group_size):
        group = wide[:, start : start + group_size]
        scale = np.abs(group).max(axis=1, keepdims=True) / levels
        steps = group / (scale + SCALE_EPS)
        rounded = np.trunc(steps + np.copysign(0.5, steps))  # half away from zero
        squares += np.square(group - scale * rounded).sum(axis=1)
    return np.asarray(np.sqrt(squares))


def outlier_magnitude(x: NDArray[np.floating[Any]], outlier: str = "range") -> F64:
    """Return the outlier magnitude of each token: max_j x_ij - min_j x_ij.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.
        outlier: "range".

    Returns:
        float64, shape (n_tok,), >= 0.

    Example:
        >>> outlier_magnitude(np.array([[1.0, -2.0, 0.5]], np.float32))
        array([3.])
    """
    if outlier != "range":
        raise ValueError(f"outlier must be one of range, got {outlier!r}; choose one of these")
    wide = _features(x)
    return np.asarray(wide.max(axis=1) - wide.min(axis=1))


def minmax(v: ArrayLike) -> F64:
    """Map a vector of shape (n_tok,) linearly to [0, 1]; a constant one gives zeros.

    Example:
        >>> minmax([2.0, 4.0, 3.0]), minmax([5.0, 5.0])
        (array([0. , 1. , 0.5]), array([0., 0.]))
    """
    wide = _vector("v", v)
    return np.asarray((wide - wide.min()) / max(float(wide.max() - wide.min()), SPAN_MIN))


def sensitivity(error: ArrayLike, outlier: ArrayLike, weight: float = 0.5) -> F64:
    """Return (1 - weight) * minmax(error) + weight * minmax(outlier), shape (n_tok,), in [0, 1].

    Example:
        >>> sensitivity([1.0, 3.0, 2.0], [0.0, 0.0, 8.0])
        array([0.  , 0.5 , 0.75])
    """
    weight = _unit("weight", weight)
    e, r = minmax(error), minmax(outlier)
    _same_length(error=e, outlier=r)
    return np.asarray((1.0 - weight) * e + weight * r)


def dynamic_alpha(sensitivity: ArrayLike) -> float:
    """Return the alpha that an image asks for: 0.55 - 0.10 * clamp(std / (mean + 1e-8) - 0.2, 0, 1).

    The standard deviation divides by n - 1; a single token has none, which gives 0.55.

    Args:
        sensitivity: shape (n_tok,), in [0, 1].

    Returns:
        A number in [0.45, 0.55].

    Example:
        >>> dynamic_alpha([0.5, 0.5, 0.5])
        0.55
    """
    q = _vector("sensitivity", sensitivity)
    std = float(q.std(ddof=1)) if q.size > 1 else 0.0
    spread = std / (float(q.mean()) + SCALE_EPS)
    return 0.55 - 0.10 * min(max(spread - 0.2, 0.0), 1.0)


def fuse(semantic: ArrayLike, sensitivity: ArrayLike, alpha: float) -> F64:
    """Return alpha * semantic + (1 - alpha) * sensitivity, shape (n_tok,).

    Example:
        >>> fuse([1.0, 0.0], [0.0, 0.5], alpha=0.5)
        array([0.5 , 0.25])
    """
    alpha = _unit("alpha", alpha)
    p, q = _vector("semantic", semantic), _vector("sensitivity", sensitivity)
    _same_length(semantic=p, sensitivity=q)
    return np.asarray(alpha * p + (1.0 - alpha) * q)


def score(
    x: NDArray[np.floating[Any]],
    *,
    semantic: ArrayLike | None = None,
    alpha: float | Literal["dynamic"] = 0.7,
    error: str = "int4",
    group_size: int = 128,
    outlier: str = "range",
    outlier_weight: float = 0.5,
) -> Scores:
    """Score the tokens of one image. See :class:`Scores` for what comes back.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.
        semantic: raw semantic score, shape (n_tok,), any scale; None counts as zeros.
        alpha: weight of the semantic score in [0, 1], or "dynamic".
        error, group_size: see :func:`quantization_error`.
        outlier: see :func:`outlier_magnitude`.
        outlier_weight: weight of the outlier magnitude in the sensitivity, in [0, 1].

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> s = score(np.array([[7.0, 0.5], [0.0, 0.0]], np.float32), semantic=[0.0, 2.0], alpha=0.25)
        >>> s.total
        array([0.75, 0.25])
    """
    e = quantization_error(x, error, group_size)
    r = outlier_magnitude(x, outlier)
    q = sensitivity(e, r, outlier_weight)
    p = np.zeros_like(q) if semantic is None else minmax(semantic)
    weight = dynamic_alpha(q) if isinstance(alpha, str) and alpha == "dynamic" else _unit("alpha", _number(alpha))
    return Scores(e, r, q, p, weight, fuse(p, q, weight))


def _number(alpha: object) -> float:
    if isinstance(alpha, (int, float, np.number)) and not isinstance(alpha, (bool, complex)):
        return float(alpha)
    raise ValueError(f'alpha must be a number in [0, 1] or "dynamic", got {alpha!r}; choose one of these')


def _check_k(k: int, n: int) -> int:
    k = operator.index(k)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, got {k}; keep at least one token and at most all")
    return k


def topk(scores: ArrayLike, k: int) -> NDArray[np.int32]:
    """Return the indices of the k largest scores, ascending. Among equals the lower index wins.

    Args:
        scores: shape (n_tok,), finite.
        k: how many, in 1..n_tok.

    Returns:
        int32, shape (k,), strictly ascending.

    Example:
        >>> topk([0.5, 0.9, 0.5, 0.1], 2)
        array([0, 1], dtype=int32)
    """
    values = _vector("scores", scores)
    k = _check_k(k, values.size)
    order = np.argsort(-values, kind="stable")
    return np.sort(order[:k]).astype(np.int32)


def _splitmix64(z: int) -> int:
    """Return the finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def select(scores: ArrayLike, k: int, method: str = "topk", seed: int = 0) -> NDArray[np.int32]:
    """Choose exactly k tokens.

    "topk" takes the k largest scores. "random" takes the k smallest keys splitmix64(seed + (i + 1) * golden), so a
    seed gives the same tokens on every machine, and a larger k only adds to them. "uniform" takes the middles of k
    equal stretches, floor((2 j + 1) n / (2 k)). The last two look at the number of scores only.

    Args:
        scores: shape (n_tok,), finite.
        k: how many, in 1..n_tok.
        method: "topk", "random" or "uniform".
        seed: 0..2**64-1, for "random".

    Returns:
        int32, shape (k,), strictly ascending.

    Example:
        >>> select([0.0] * 8, 4, "uniform")
        array([1, 3, 5, 7], dtype=int32)
    """
    values = _vector("scores", scores)
    n = values.size
    k = _check_k(k, n)
    if method == "topk":
        return topk(values, k)
    if method == "uniform":
        return np.array([(2 * j + 1) * n // (2 * k) for j in range(k)], dtype=np.int32)
    if method == "random":
        seed = operator.index(seed)
        if not 0 <= seed <= _MASK:
            raise ValueError(f"seed must be in 0..2**64-1, got {seed}; choose one in that range")
        keys = [_splitmix64((seed + (i + 1) * _GOLDEN) & _MASK) for i in range(n)]
        chosen = sorted(range(n), key=keys.__getitem__)[:k]  # sorted() is stable: ties go to the lower index
        return np.array(sorted(chosen), dtype=np.int32)
    raise ValueError(f"method must be one of topk, random, uniform, got {method!r}; choose one of these")
