"""The baseline without scores: the picture at a lower resolution, with the same number of tokens.

An encoder of fixed size makes as many tokens of a small picture as of a large one, so shrinking the picture saves
nothing there. What a smaller picture would give is made after the encoder instead: the grid of tokens is averaged down
to h x w cells with h * w = K. (Averages of the projector's output, as of patches of a coarser grid.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qap_gguf.errors import ConfigError

_STRETCH = 2.25  # how much narrower than the picture a cell may be


def pooled_grid(n_keep: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the smaller grid: the largest product up to `n_keep`, then the shape nearest the picture's.

    Args:
        n_keep: tokens to have, 1..rows * columns.
        grid: (rows, columns) of the image's tokens.

    Raises:
        ConfigError: `n_keep` is outside of its range.

    Example:
        >>> pooled_grid(36, (12, 12)), pooled_grid(18, (12, 12)), pooled_grid(17, (12, 12))
        ((6, 6), (6, 3), (4, 4))
    """
    rows, columns = grid
    if not 1 <= n_keep <= rows * columns:
        raise ConfigError(f"n_keep must be in 1..{rows * columns} for a grid of {rows} x {columns}, got {n_keep}")
    best = (0, 0.0, (1, 1))
    for h in range(1, min(rows, n_keep) + 1):
        w = min(columns, n_keep // h)
        stretch = max(h * columns / (w * rows), w * rows / (h * columns))
        if stretch <= _STRETCH or n_keep < 3:
            best = max(best, (h * w, -stretch, (h, w)))
    return best[2]


def _cells(n: int, parts: int) -> npt.NDArray[np.float32]:
    """Weights (parts, n) that average n neighbours in a row to `parts`; a neighbour on a border counts for both."""
    edges = np.linspace(0, n, parts + 1)
    left, right = edges[:-1, None], edges[1:, None]
    at = np.arange(n)
    overlap = np.clip(np.minimum(right, at + 1) - np.maximum(left, at), 0, None)
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True), np.float32)


def pool(features: npt.NDArray[np.float32], grid: tuple[int, int], smaller: tuple[int, int]) -> Any:
    """Average a grid of tokens down: float32 (rows * columns, n_embd) -> (h * w, n_embd), row by row.

    Example:
        >>> pool(np.arange(16, dtype=np.float32)[:, None], (4, 4), (2, 2)).ravel().tolist()
        [2.5, 4.5, 10.5, 12.5]
    """
    (rows, columns), (h, w) = grid, smaller
    cube = features.reshape(rows, columns, -1)
    out = np.einsum("hr,wc,rcd->hwd", _cells(rows, h), _cells(columns, w), cube, optimize=True)
    return np.ascontiguousarray(out.reshape(h * w, -1), dtype=np.float32)
