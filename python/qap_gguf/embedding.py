"""Tokens of an image, all of them and those that are kept, and the way from one to the other.

The steps are those of docs/method.md: scores over all tokens, selection of exactly K, gathering of the kept rows.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from qap_gguf.config import PruneConfig
from qap_gguf.defaults import check_config
from qap_gguf.errors import ImageError, UnsupportedError
from qap_gguf.relevance import Signals
from qap_gguf.score import (
    FloatArray,
    IndexArray,
    Scores,
    check_array,
    cosines,
    merge_average,
    needs_cosines,
    needs_scores,
    score,
    select_by,
)


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """All tokens of one encoded image.

    Attributes:
        features: what the projector gives the language model, float32 (n_tok, n_embd).
        grid: (rows, columns) of the tokens in the picture; rows * columns = n_tok.
        attention: class-token attention, mean over heads, float32 (n_tok,); None where the encoder has none.
        size: (width, height) of the picture in pixels.
        seconds: wall-clock time of the encode.
        received: attention received, mean over heads and queries, float32 (n_tok,); None where patches are merged.
        hidden: input of the projector, float32 (n_tok, n_hidden); only for models with a CLIP text tower, else None.
        bytes_read: what the encode copied from the device to the host: the arrays above.
    """

    features: FloatArray
    grid: tuple[int, int]
    attention: FloatArray | None
    size: tuple[int, int]
    seconds: float
    received: FloatArray | None = None
    hidden: FloatArray | None = None
    bytes_read: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the image before pruning."""
        return int(self.features.shape[0])


@dataclass(frozen=True, eq=False)
class PrunedImage:
    """The kept tokens of one image.

    Attributes:
        features: kept rows, float32 (k, n_embd); unchanged unless dropped ones were merged into them.
        indices: their numbers in the image, int32 (k,), ascending.
        positions: their positions relative to the image's start, int32 (k,).
        scores: the scores of all tokens.
        n_total: tokens of the image before pruning.
        score_s: seconds for the scores.
        select_s: seconds for selection and gathering.
    """

    features: FloatArray
    indices: IndexArray
    positions: IndexArray
    scores: Scores
    n_total: int
    score_s: float
    select_s: float


def embedding_of(
    features: FloatArray, report: dict[str, Any] | None, size: tuple[int, int], seconds: float
) -> ImageEmbedding:
    """The embedding of an image from what its encode gave; no report means a model that cannot be pruned."""
    report = report or {}
    n_tokens = int(features.shape[0])
    side = math.isqrt(n_tokens)
    grid = (side, side) if side * side == n_tokens else (1, n_tokens)
    signals = {name: report.get(name) for name in ("attention", "received", "hidden")}
    n_bytes = int(report.get("bytes_read", features.nbytes))  # without a report, all rows and nothing else
    return ImageEmbedding(features=features, grid=grid, size=size, seconds=seconds, bytes_read=n_bytes, **signals)


def check_embedding(image: ImageEmbedding, n_embd: int) -> None:
    """`image` has the width that the language model reads.

    Raises:
        ArrayError: its features are not float32 (n_tok, n_embd) in C order.
        ImageError: it was encoded by another model.
    """
    check_array("features", image.features, 2)
    if image.features.shape[1] != n_embd:
        raise ImageError(
            f"image: expected {n_embd} numbers a token, got {image.features.shape[1]}; encode it with this VisionModel"
        )


def score_image(signals: Signals, cfg: PruneConfig, n_threads: int) -> Scores:
    """Scores of all tokens of an image.

    Raises:
        UnsupportedError: `cfg` asks for a signal that this image does not have.
    """
    check_config(cfg)
    relevance = signals.relevance(cfg.semantic)
    if relevance is None and cfg.alpha == 1.0 and needs_scores(cfg.select):
        raise UnsupportedError("alpha: 1 leaves nothing to rank by without a semantic signal; use alpha < 1")
    return score(signals.features, cfg, relevance, n_threads=n_threads)


def prune_image(signals: Signals, cfg: PruneConfig, n_threads: int) -> PrunedImage:
    """Keep the tokens of an image that score best.

    Raises:
        ConfigError: ``n_keep`` is larger than the image's tokens.
        UnsupportedError: `cfg` asks for a signal or for positions that the model does not have.
    """
    check_config(cfg)
    if cfg.positions == "keep":
        raise UnsupportedError(
            "positions: keep leaves gaps, which libllama refuses on models with 1-D positions; use compact or auto"
        )
    features = signals.features
    n_total = int(features.shape[0])
    n_keep = cfg.count(n_total)
    started = time.perf_counter()
    scores = score_image(signals, cfg, n_threads)
    scored = time.perf_counter()
    merge = cfg.merge == "average" and n_keep < n_total
    table = cosines(features, n_threads=n_threads) if merge or needs_cosines(cfg.select) else None
    indices = select_by(scores.total, table, n_keep, cfg.select, cfg.seed)
    if merge and table is not None:
        features = merge_average(features, table, indices)
    elif n_keep < n_total:  # all tokens: the very same rows, not a copy of them
        features = np.ascontiguousarray(features[indices])
    done = time.perf_counter()
    positions = np.arange(n_keep, dtype=np.int32)  # compact: the only policy for 1-D positions
    return PrunedImage(features, indices, positions, scores, n_total, scored - started, done - scored)
