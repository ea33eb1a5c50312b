"""Methods that no config can say: what the language model is to read is made here and put in place of other tokens.

``pool`` makes new tokens (see pool.py). ``dpp-flat`` is the determinantal point process with equal scores: the control
that tells what a score adds to it, for any score that is not zero somewhere lets it choose different tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qap_gguf.errors import ConfigError
from qap_gguf.eval.pool import pool, pooled_grid
from qap_gguf.pruning.score import select

FloatArray = npt.NDArray[np.float32]


def replacement(method: str, image: Any, n_keep: int) -> FloatArray:
    """The tokens of a method, float32 (k, n_embd), in reading order; k is `n_keep`, or less where pool has no grid.

    Args:
        method: one of ``REPLACED``.
        image: an ImageEmbedding.
        n_keep: tokens to have, 1..n_real.

    Raises:
        ConfigError: the tokens form no grid that pool could average, or rows that are no tokens stand between them.
    """
    if image.n_rows != image.n_tokens:
        raise ConfigError(f"{method}: expected rows that are all tokens, got special ones; leave {method} out")
    real = np.flatnonzero(~(image.padding | image.dropped))  # padding is no token
    features: FloatArray = image.features[real]
    if method == "dpp-flat":
        equal = np.ones(len(real), np.float32)
        kept: FloatArray = features[select(equal, n_keep, features=features, method="dpp")]
        return kept
    rows, columns = image.grid
    if rows * columns != image.n_tokens:
        raise ConfigError(f"pool: expected a grid of {image.n_tokens} tokens, got {rows} x {columns}; leave pool out")
    if image.kept_early is not None:
        raise ConfigError("pool: expected a whole grid of tokens, got one after an early drop; leave pool out")
    grid = (len(np.unique(real // columns)), len(np.unique(real % columns)))  # what a letterbox leaves is a rectangle
    averages: FloatArray = pool(features, grid, pooled_grid(n_keep, grid))
    return averages


def replaced_image(image: Any, tokens: FloatArray, indices: npt.NDArray[np.int32]) -> Any:
    """`image` with `tokens` in its rows at `indices`.

    Keeping exactly these rows (select="uniform" does) makes the language model read the tokens and nothing else.

    Args:
        image: an ImageEmbedding.
        tokens: (k, n_embd).
        indices: ascending, (k,).
    """
    features = image.features.copy()
    features[indices] = tokens
    return dataclasses.replace(image, features=features)
