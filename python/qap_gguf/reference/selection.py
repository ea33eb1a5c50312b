"""Selection of exactly K tokens, and merging of the others, in NumPy, float64.

Facts: random is splitmix64 (Steele, Lea, Flood 2014) of the index; dpp is CDPruner's selection (arXiv 2506.10967) by
the greedy algorithm of Chen, Zhang, Zhou (2018), with the fused score as relevance as in QAPruner (arXiv 2604.02816);
divprune is arXiv 2503.02175; coverage is facility location by the greedy algorithm of Nemhauser, Wolsey and Fisher
(1978). merge_average is ours (docs/method.md, section 8). Indices come back ascending, and ties
go to the lower index. The selectors compare cosines with a margin that float32 keeps, so that the native code, which
has float32 cosines, sees the same ties.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qap_gguf.reference.checks import F64, check_features, check_k, check_vector
from qap_gguf.reference.scores import cosines

I32 = NDArray[np.int32]

SPANNED: Final = 1e-5  #: dpp: a residual below this part of L_ii is zero: the token lies in the span of the kept ones
SAME: Final = 1e-6  #: divprune: a distance up to this is zero; coverage: so is a gain up to this part of all weights
_MASK: Final = 2**64 - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15


def topk(scores: ArrayLike, k: int) -> I32:
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
    values = check_vector("scores", scores)
    k = check_k(k, values.size)
    order = np.argsort(-values, kind="stable")
    return np.sort(order[:k]).astype(np.int32)


def _splitmix64(z: int) -> int:
    """Return the finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _random(n: int, k: int, seed: int) -> list[int]:
    seed = operator.index(seed)
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed must be in 0..2**64-1, got {seed}; choose one in that range")
    keys = [_splitmix64((seed + (i + 1) * _GOLDEN) & _MASK) for i in range(n)]
    return sorted(range(n), key=keys.__getitem__)[:k]  # sorted() is stable: ties go to the lower index


def _dpp(scores: F64, k: int, table: F64) -> list[int]:
    """Greedy MAP of det(L), L_ij = S_i cos_ij S_j, by incremental Cholesky; the rest by the highest scores."""
    own = np.square(scores) * table.diagonal()
    residual = own.copy()  # det(L of the kept ones and i) / det(L of the kept ones)
    rows = np.zeros((0, scores.size))  # of the Cholesky factor, one for each kept token
    kept: list[int] = []
    while len(kept) < k:
        free = residual > SPANNED * own
        free[kept] = False
        if not free.any():
            break
        best = int(np.where(free, residual, -1.0).argmax())  # argmax takes the first of equals
        row = scores[best] * scores * table[best] - (rows[:, best, None] * rows).sum(axis=0)
        row /= np.sqrt(residual[best])
        rows = np.vstack([rows, row])
        residual -= np.square(row)
        kept.append(best)
    rest = [int(i) for i in np.argsort(-scores, kind="stable") if i not in kept]
    return kept + rest[: k - len(kept)]


def _divprune(scores: F64, k: int, table: F64) -> list[int]:
    """Greedy max-min of the distance 1 - cos; first the token whose nearest neighbour is farthest."""
    distance = 1.0 - table
    distance[distance <= SAME] = 0.0
    others = distance + np.diag(np.full(scores.size, np.inf))
    kept = [int(others.min(axis=1).argmax())]
    while len(kept) < k:
        nearest = distance[kept].min(axis=0)
        nearest[kept] = -1.0
        kept.append(int(nearest.argmax()))
    return kept


def ranks(v: ArrayLike) -> F64:
    """Return each value's place in ascending order, counted from 1; equal values share the mean of their places.

    Args:
        v: shape (n,), finite.

    Returns:
        float64, shape (n,), whole or half numbers in 1..n.

    Example:
        >>> ranks([0.2, 0.9, 0.2, 0.5])
        array([1.5, 4. , 1.5, 3. ])
    """
    values = check_vector("v", v)
    below = (values[:, None] > values).sum(axis=1)
    equal = (values[:, None] == values).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2, dtype=np.float64)


def _coverage(scores: F64, k: int, table: F64, dropped: F64 | None = None, near: F64 | None = None) -> list[int]:
    """Greedy facility location over the cosines, each token weighted by the rank of its score; then the best scores.

    table: (n_tok, n_tok). dropped: scores of other tokens that have to be stood for, (n_dropped,); near: the cosines of
    the tokens with them, (n_tok, n_dropped).
    """
    weights, similar = ranks(scores), np.maximum(table, 0.0)
    if dropped is not None and near is not None:
        part = scores.size / (scores.size + dropped.size)
        weights = np.concatenate([dropped.size + weights, part * ranks(dropped)])
        similar = np.concatenate([similar, np.maximum(near.T, 0.0)])
    margin = SAME * weights.sum()
    covered = np.zeros(weights.size)  # of each token: the highest cosine to a kept one
    kept: list[int] = []
    while len(kept) < k:
        gains = weights @ np.maximum(similar - covered[:, None], 0.0)
        gains[kept] = -1.0
        if gains.max() <= margin:
            break
        kept.append(int((gains >= gains.max() - margin).argmax()))  # argmax takes the first
        covered = np.maximum(covered, similar[:, kept[-1]])
    rest = [int(i) for i in np.argsort(-scores, kind="stable") if i not in kept]
    return kept + rest[: k - len(kept)]


_BY_COSINES: Final[dict[str, Callable[[F64, int, F64], list[int]]]] = {
    "dpp": _dpp,
    "divprune": _divprune,
    "coverage": _coverage,
}
_METHODS: Final = ("topk", "dpp", "divprune", "coverage", "random", "uniform")


def select(
    scores: ArrayLike,
    k: int,
    method: str = "topk",
    seed: int = 0,
    features: NDArray[np.floating[Any]] | None = None,
    dropped: tuple[ArrayLike, ArrayLike] | None = None,
) -> I32:
    """Choose exactly k tokens.

    - "topk" takes the k largest scores.
    - "dpp" takes, one after the other, the token that makes det(L) largest, L_ij = S_i cos(x_i, x_j) S_j. A token
      that adds less than 1e-5 of its own L_ii lies in the span of the kept ones and adds nothing; when no token adds
      anything, the rest is filled by the largest scores.
    - "divprune" takes, one after the other, the token whose nearest kept token is farthest by 1 - cos; the first is
      the one whose nearest neighbour is farthest. Distances up to 1e-6 are zero. Scores do not matter.
    - "coverage" takes, one after the other, the token that adds most to sum_i w_i max(0, max_j cos(x_i, x_j)), j the
      kept ones and w_i the rank of token i's score. Gains that differ by less than 1e-6 of all weights are equal; when
      no token adds more than that, the rest is filled by the largest scores. Tokens that an early drop took count in
      the sum too, with the lowest ranks times the part of the tokens that is left, and are never chosen.
    - "random" takes the k smallest keys splitmix64(seed + (i + 1) * golden), so a seed gives the same tokens on every
      machine, and a larger k only adds to them. It looks at the number of scores only, and so does
    - "uniform", the middles of k equal stretches, floor((2 j + 1) n / (2 k)).

    Args:
        scores: shape (n_tok,), finite.
        k: how many, in 1..n_tok.
        method: "topk", "dpp", "divprune", "coverage", "random" or "uniform".
        seed: 0..2**64-1, for "random".
        features: floating point, shape (n_tok, n_embd), for "dpp", "divprune" and "coverage".
        dropped: for "coverage", what an early drop took: scores (n_dropped,), at least one, and cosines of the tokens
            with them, (n_tok, n_dropped).

    Returns:
        int32, shape (k,), strictly ascending.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> select([0.0] * 8, 4, "uniform")
        array([1, 3, 5, 7], dtype=int32)
        >>> x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], np.float32)
        >>> select([1.0, 0.9, 0.2], 2, "dpp", features=x)    # token 1 says what token 0 says
        array([0, 2], dtype=int32)
    """
    values = check_vector("scores", scores)
    n = values.size
    k = check_k(k, n)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}; choose one of these")
    if method == "topk":
        return topk(values, k)
    if method == "uniform":
        return np.array([(2 * j + 1) * n // (2 * k) for j in range(k)], dtype=np.int32)
    if method == "random":
        return np.array(sorted(_random(n, k, seed)), dtype=np.int32)
    if features is None:
        raise ValueError(f"features must be given for {method}, which compares tokens, got None; pass the features")
    table = cosines(features)
    if table.shape[0] != n:
        raise ValueError(f"features must have {n} rows, one for each score, got {table.shape[0]}; pass one image's")
    if method == "coverage" and dropped is not None:
        others, near = check_vector("dropped", dropped[0]), np.asarray(dropped[1], np.float64)
        if near.shape != (n, others.size):
            raise ValueError(f"dropped must have cosines of shape {(n, others.size)}, got {near.shape}; transpose them")
        return np.array(sorted(_coverage(values, k, table, others, near)), dtype=np.int32)
    return np.array(sorted(_BY_COSINES[method](values, k, table)), dtype=np.int32)


def merge_average(x: NDArray[np.floating[Any]], indices: ArrayLike) -> F64:
    """Return the kept tokens, each averaged with the dropped ones that are most similar to it.

    A dropped token goes to the kept one with the highest cosine, ties to the lower index.

    Args:
        x: features, floating point, shape (n_tok, n_embd), finite, at most 1e30 in size.
        indices: kept tokens, integers, shape (k,), strictly ascending, in 0..n_tok-1, at least one.

    Returns:
        float64, shape (k, n_embd).

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> merge_average(np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]], np.float32), [0, 2])
        array([[2., 0.],
               [0., 5.]])
    """
    wide = check_features(x)
    kept = np.asarray(indices)
    if kept.ndim != 1 or kept.size == 0 or not np.issubdtype(kept.dtype, np.integer):
        raise ValueError(f"indices must be integers of shape (k,), k at least 1, got {kept.dtype} {kept.shape}")
    if kept[0] < 0 or kept[-1] >= len(wide) or (np.diff(kept) <= 0).any():
        raise ValueError(f"indices must ascend strictly within 0..{len(wide) - 1}; sort them and drop repeated ones")
    into = cosines(x)[:, kept].argmax(axis=1)  # argmax takes the first of equals
    into[kept] = np.arange(kept.size)
    return np.stack([wide[into == j].mean(axis=0) for j in range(kept.size)])
