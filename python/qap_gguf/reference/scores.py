"""Scores of image tokens in NumPy, float64: error, outliers, fusion, cosines.

Facts: QAPruner (arXiv 2604.02816, section 3) and its authors' public reference: scores on the projector's output,
groups of 128 channels, scale = absmax / 7, alpha 0.7 or dynamic. "model" is ours. docs/method.md spells out what zero,
constant and single-token inputs give. Ties in rounding go away from zero as in C's round(), which is what ggml uses.
"""

from __future__ import annotations

import operator
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qap_gguf.reference.checks import (
    F64,
    check_features,
    check_number,
    check_same_length,
    check_unit,
    check_vector,
    check_weights,
)

SCALE_EPS: Final = 1e-8  #: added to the scale before the division, as in the paper's code
SPAN_MIN: Final = 1.1754944e-38  #: smallest normal float32: constants give zeros, not 0 / 0
OUTLIERS: Final = ("range", "absmax", "crest")
_BITS: Final = {f"int{bits}": bits for bits in range(2, 9)} | {"model": 4}


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


def quantization_error(
    x: NDArray[np.floating[Any]],
    error: str = "int4",
    group_size: int = 128,
    channel_weights: ArrayLike | None = None,
) -> F64:
    """Return the L2 norm of what symmetric group-wise quantization changes in each token.

    In each group g of `group_size` channels: L = 2**(b-1) - 1, s = max|x_g| / L, q = round(x / (s + 1e-8)),
    error = x - s * q. A last, shorter group is a group of its own. "model" is int4 in a weighted norm: a channel's
    squared error counts `channel_weights` times, and these are scaled to a mean of 1.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.
        error: "int2" .. "int8" or "model". ggml's types are not here: their truth is ggml's own quantizer.
        group_size: channels in a group, at least 1.
        channel_weights: for "model": how important each channel is to the language model, shape (n_embd,), finite, from
            0 in any unit, not all 0; None for the others.

    Returns:
        float64, shape (n_tok,), >= 0.

    Raises:
        TypeError, ValueError: `x` or a setting is not as above.

    Example:
        >>> x = np.array([[7.0, 1.0, -2.4, 2.7]], np.float32)
        >>> quantization_error(x).round(4), quantization_error(x, "model", channel_weights=[5, 5, 10, 0]).round(4)
        (array([0.5]), array([0.5657]))
    """
    if error not in _BITS:
        raise ValueError(
            f"error must be one of {', '.join(_BITS)}, got {error!r}; "
            "ggml types are ggml's own quantizers: take qap_gguf.score for those"
        )
    if operator.index(group_size) < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}; the usual value is 128")
    wide = check_features(x)
    weights = check_weights(error == "model", channel_weights, wide.shape[1])
    levels = 2 ** (_BITS[error] - 1) - 1
    squares = np.zeros(wide.shape[0])
    for start in range(0, wide.shape[1], group_size):
        group = wide[:, start : start + group_size]
        scale = np.abs(group).max(axis=1, keepdims=True) / levels
        steps = group / (scale + SCALE_EPS)
        rounded = np.trunc(steps + np.copysign(0.5, steps))  # half away from zero
        squares += (np.square(group - scale * rounded) * weights[start : start + group_size]).sum(axis=1)
    return np.asarray(np.sqrt(squares))


def outlier_magnitude(x: NDArray[np.floating[Any]], outlier: str = "range") -> F64:
    """Return the outlier magnitude of each token.

    "range" is max_j x_ij - min_j x_ij (the paper), "absmax" is max_j |x_ij|, and "crest" is absmax in units of the
    token's root mean square, in [1, sqrt(n_embd)], 0 for a token of zeros.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.
        outlier: "range", "absmax" or "crest".

    Returns:
        float64, shape (n_tok,), >= 0.

    Raises:
        TypeError, ValueError: `x` or `outlier` is not as above.

    Example:
        >>> x = np.array([[1.0, -2.0, 0.5], [2.0, -2.0, 2.0]], np.float32)
        >>> outlier_magnitude(x), outlier_magnitude(x, "absmax"), outlier_magnitude(x, "crest").round(4)
        (array([3., 4.]), array([2., 2.]), array([1.5119, 1.    ]))
    """
    if outlier not in OUTLIERS:
        raise ValueError(f"outlier must be one of {', '.join(OUTLIERS)}, got {outlier!r}; choose one of these")
    wide = check_features(x)
    if outlier == "range":
        return np.asarray(wide.max(axis=1) - wide.min(axis=1))
    absmax = np.abs(wide).max(axis=1)
    if outlier == "absmax":
        return np.asarray(absmax)
    unit = np.where(absmax > 0, absmax, 1.0)
    rms = np.sqrt(np.square(wide / unit[:, None]).mean(axis=1))  # in units of absmax, at least 1 / sqrt(n_embd)
    return np.asarray(np.divide(1.0, rms, out=np.zeros_like(rms), where=absmax > 0))


def cosines(x: NDArray[np.floating[Any]]) -> F64:
    """Return the cosines between all tokens, shape (n_tok, n_tok); a token of zeros has 0 with all, itself included.

    Equal rows have bit-equal cosines with every third one, which a matrix product does not promise: the selectors
    below compare cosines, and tell ties by that.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.

    Returns:
        float64, shape (n_tok, n_tok), symmetric, with 1 on the diagonal where the token is not zero.

    Raises:
        TypeError, ValueError: `x` is not as above.

    Example:
        >>> cosines(np.array([[3.0, 4.0], [4.0, -3.0], [0.0, 0.0]], np.float32))
        array([[1., 0., 0.],
               [0., 1., 0.],
               [0., 0., 0.]])
    """
    wide = check_features(x)
    absmax = np.abs(wide).max(axis=1, keepdims=True)
    rows = wide / np.where(absmax > 0, absmax, 1.0)
    norm = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    rows /= np.where(norm > 0, norm, 1.0)
    table = np.stack([(rows * row).sum(axis=1) for row in rows])
    np.fill_diagonal(table, (absmax > 0).astype(np.float64))
    return table


def minmax(v: ArrayLike) -> F64:
    """Map a vector of shape (n_tok,) linearly to [0, 1]; a constant one gives zeros.

    Example:
        >>> minmax([2.0, 4.0, 3.0]), minmax([5.0, 5.0])
        (array([0. , 1. , 0.5]), array([0., 0.]))
    """
    wide = check_vector("v", v)
    return np.asarray((wide - wide.min()) / max(float(wide.max() - wide.min()), SPAN_MIN))


def sensitivity(error: ArrayLike, outlier: ArrayLike, weight: float = 0.5) -> F64:
    """Return (1 - weight) * minmax(error) + weight * minmax(outlier), shape (n_tok,), in [0, 1].

    Example:
        >>> sensitivity([1.0, 3.0, 2.0], [0.0, 0.0, 8.0])
        array([0.  , 0.5 , 0.75])
    """
    weight = check_unit("weight", weight)
    e, r = minmax(error), minmax(outlier)
    check_same_length(error=e, outlier=r)
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
    q = check_vector("sensitivity", sensitivity)
    std = float(q.std(ddof=1)) if q.size > 1 else 0.0
    spread = std / (float(q.mean()) + SCALE_EPS)
    return 0.55 - 0.10 * min(max(spread - 0.2, 0.0), 1.0)


def fuse(semantic: ArrayLike, sensitivity: ArrayLike, alpha: float) -> F64:
    """Return alpha * semantic + (1 - alpha) * sensitivity, shape (n_tok,).

    Example:
        >>> fuse([1.0, 0.0], [0.0, 0.5], alpha=0.5)
        array([0.5 , 0.25])
    """
    alpha = check_unit("alpha", alpha)
    p, q = check_vector("semantic", semantic), check_vector("sensitivity", sensitivity)
    check_same_length(semantic=p, sensitivity=q)
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
    channel_weights: ArrayLike | None = None,
) -> Scores:
    """Score the tokens of one image. See :class:`Scores` for what comes back.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.
        semantic: raw semantic score, shape (n_tok,), any scale; None counts as zeros.
        alpha: weight of the semantic score in [0, 1], or "dynamic".
        error, group_size, channel_weights: see :func:`quantization_error`.
        outlier: see :func:`outlier_magnitude`.
        outlier_weight: weight of the outlier magnitude in the sensitivity, in [0, 1].

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> s = score(np.array([[7.0, 0.5], [0.0, 0.0]], np.float32), semantic=[0.0, 2.0], alpha=0.25)
        >>> s.total
        array([0.75, 0.25])
    """
    e = quantization_error(x, error, group_size, channel_weights)
    r = outlier_magnitude(x, outlier)
    q = sensitivity(e, r, outlier_weight)
    p = np.zeros_like(q) if semantic is None else minmax(semantic)
    dynamic = isinstance(alpha, str) and alpha == "dynamic"
    weight = dynamic_alpha(q) if dynamic else check_unit("alpha", check_number(alpha))
    return Scores(e, r, q, p, weight, fuse(p, q, weight))
