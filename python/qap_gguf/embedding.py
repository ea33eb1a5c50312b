"""Tokens of an image, all of them and those that are kept, and the way from one to the other.

The steps are those of docs/method.md: scores over all tokens, selection of exactly K, gathering of the kept rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from qap_gguf.config import PruneConfig
from qap_gguf.defaults import check_config
from qap_gguf.errors import ImageError, UnsupportedError
from qap_gguf.score import FloatArray, IndexArray, Scores, check_array, score, select


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """All tokens of one encoded image.

    Attributes:
        features: what the projector gives the language model, float32 (n_tok, n_embd).
        grid: (rows, columns) of the tokens in the picture; rows * columns = n_tok.
        attention: class-token attention, mean over heads, float32 (n_tok,); None where the encoder has none.
        size: (width, height) of the picture in pixels.
        seconds: wall-clock time of the encode.
    """

    features: FloatArray
    grid: tuple[int, int]
    attention: FloatArray | None
    size: tuple[int, int]
    seconds: float

    @property
    def n_tokens(self) -> int:
        """Tokens of the image before pruning."""
        return int(self.features.shape[0])


@dataclass(frozen=True, eq=False)
class PrunedImage:
    """The kept tokens of one image.

    Attributes:
        features: kept rows, float32 (k, n_embd), unchanged.
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


def score_image(image: ImageEmbedding, cfg: PruneConfig, n_threads: int) -> Scores:
    """Scores of all tokens of an image.

    Raises:
        UnsupportedError: `cfg` asks for a signal that this image does not have.
    """
    check_config(cfg)
    if cfg.semantic == "cls" and image.attention is None:
        raise UnsupportedError("semantic: this encoder has no class token (cls); use none or auto")
    semantic = None if cfg.semantic == "none" else image.attention
    if semantic is None and cfg.alpha == 1.0 and cfg.select == "topk":
        raise UnsupportedError("alpha: 1 leaves nothing to rank by without a semantic signal; use alpha < 1")
    return score(image.features, cfg, semantic, n_threads=n_threads)


def prune_image(image: ImageEmbedding, cfg: PruneConfig, n_threads: int) -> PrunedImage:
    """Keep the tokens of an image that score best.

    Raises:
        ConfigError: ``n_keep`` is larger than the image's tokens.
        UnsupportedError: `cfg` asks for a signal that this image does not have.
    """
    check_config(cfg)
    n_keep = cfg.count(image.n_tokens)
    started = time.perf_counter()
    scores = score_image(image, cfg, n_threads)
    scored = time.perf_counter()
    indices = select(scores.total, n_keep, features=image.features, method=cfg.select, seed=cfg.seed)
    # all tokens: the very same rows, not a copy of them
    features = image.features if n_keep == image.n_tokens else np.ascontiguousarray(image.features[indices])
    done = time.perf_counter()
    positions = np.arange(n_keep, dtype=np.int32)  # compact: the only policy for 1-D positions
    return PrunedImage(features, indices, positions, scores, image.n_tokens, scored - started, done - scored)
