"""Prune an encoded image: scores, selection and positions of the kept rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qap_gguf.arguments import FloatArray, IndexArray
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import check_config
from qap_gguf.errors import ConfigError, UnsupportedError
from qap_gguf.pruning.relevance import Signals
from qap_gguf.pruning.score import Scores, cosines, merge_average, needs_cosines, needs_scores, score, select_by
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.tiles import Piece, share


@dataclass(frozen=True, eq=False)
class PrunedPiece:
    """The kept rows of one piece: float32 (k + special rows, n_embd); numbers of its tokens, int32 (k,), ascending."""

    features: FloatArray
    indices: IndexArray


@dataclass(frozen=True, eq=False)
class PrunedImage:
    """The kept tokens of one image.

    Attributes:
        features: kept rows, float32 (k + special rows, n_embd); unchanged unless dropped ones were merged into them.
        indices: numbers of the kept tokens in the image, int32 (k,), ascending.
        positions: their positions relative to the start of their piece: int32 (k,) without gaps, or for M-RoPE models
            that keep places int32 (k, 3), (time, row, column).
        scores: the scores of all tokens that left the encoder.
        n_total: tokens of the image before pruning, those that the encoder dropped early among them.
        score_s: seconds for the scores.
        select_s: seconds for selection and gathering.
        pieces: the same, piece by piece.
        policy: what was asked for the positions, a name of ``PruneConfig.positions``.
    """

    features: FloatArray
    indices: IndexArray
    positions: IndexArray
    scores: Scores
    n_total: int
    score_s: float
    select_s: float
    pieces: tuple[PrunedPiece, ...]
    policy: str = "auto"


def _spans(pieces: Sequence[Piece], signals: Signals) -> list[Signals]:
    """The signals of each piece: statistics are over the tokens of one piece, as in the encoder's own graph."""
    if len(pieces) == 1:
        return [signals]
    parts, start = [], 0
    for piece in pieces:
        span = slice(start, start + piece.n_tokens)
        start += piece.n_tokens
        cut: dict[str, Any] = {}
        for name in ("features", "attention", "received", "hidden"):
            whole = getattr(signals, name)
            cut[name] = None if whole is None else whole[span]
        parts.append(replace(signals, **cut))
    return parts


def _score_piece(signals: Signals, cfg: PruneConfig, n_threads: int) -> Scores:
    relevance = signals.relevance(cfg.semantic)
    if relevance is None and cfg.alpha == 1.0 and needs_scores(cfg.select):
        raise UnsupportedError("alpha: 1 leaves nothing to rank by without a semantic signal; use alpha < 1")
    return score(signals.features, cfg, relevance, n_threads=n_threads)


def _joined(scores: Sequence[Scores]) -> Scores:
    if len(scores) == 1:
        return scores[0]
    names = ("error", "outlier", "sensitivity", "semantic", "total")
    arrays = {name: np.concatenate([getattr(part, name) for part in scores]) for name in names}
    sizes = [len(part.total) for part in scores]
    return Scores(**arrays, alpha=float(np.average([part.alpha for part in scores], weights=sizes)))


def score_image(image: ImageEmbedding, signals: Signals, cfg: PruneConfig, n_threads: int) -> Scores:
    """Scores of all tokens of an image, each piece by itself; alpha is the mean over the pieces.

    Raises:
        UnsupportedError: `cfg` asks for a signal that this image does not have.
    """
    check_config(cfg)
    return _joined([_score_piece(part, cfg, n_threads) for part in _spans(image.pieces, signals)])


def check_positions(cfg: PruneConfig, mrope: bool) -> None:
    """`cfg` asks for positions that the language model has.

    Raises:
        UnsupportedError: gaps, for a model with 1-D positions.
    """
    if cfg.positions == "keep" and not mrope:
        raise UnsupportedError(
            "positions: keep leaves gaps, which libllama refuses on models with 1-D positions; use compact or auto"
        )


def prune_image(
    image: ImageEmbedding, signals: Signals, cfg: PruneConfig, n_threads: int, *, mrope: bool = False
) -> PrunedImage:
    """Keep the tokens of an image that score best.

    Args:
        image: all its tokens.
        signals: what relevance can be made of; its features are ``image.tokens``.
        cfg: how to prune.
        n_threads: CPU threads.
        mrope: whether the language model has positions in time, row and column.

    Raises:
        ConfigError: ``n_keep`` is larger than the image's tokens, or less than one for each of its pieces.
        UnsupportedError: `cfg` asks for a signal or for positions that the model does not have.
    """
    check_config(cfg)
    check_positions(cfg, mrope)
    counts = _counts(image, cfg)
    started = time.perf_counter()
    parts = _spans(image.pieces, signals)
    scores = [_score_piece(part, cfg, n_threads) for part in parts]
    scored = time.perf_counter()
    pruned, indices, positions, first_row, first_token = [], [], [], 0, 0
    for piece, part, found, n_keep in zip(image.pieces, parts, scores, counts, strict=True):
        rows = image.features[first_row : first_row + piece.n_rows]
        cut = _prune_piece(piece, rows, part.features, found, cfg, n_keep, n_threads)
        positions.append(_positions(piece, cut.indices, mrope and cfg.positions != "compact"))
        cut = replace(cut, indices=piece.numbers(cut.indices))
        pruned.append(cut)
        indices.append(cut.indices + first_token)
        first_row, first_token = first_row + piece.n_rows, first_token + piece.n_total
    features = pruned[0].features if len(pruned) == 1 else np.concatenate([cut.features for cut in pruned])
    done = time.perf_counter()
    return PrunedImage(
        features=features,
        indices=np.concatenate(indices).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        scores=_joined(scores),
        n_total=image.n_total,
        score_s=scored - started,
        select_s=done - scored,
        pieces=tuple(pruned),
        policy=cfg.positions,
    )


def _counts(image: ImageEmbedding, cfg: PruneConfig) -> list[int]:
    """How many tokens of each piece are kept: of all that the picture has, and no more than left the encoder."""
    n_total = image.n_total
    counts = share([piece.n_total for piece in image.pieces], cfg.count(n_total))
    if cfg.count_early(n_total) < n_total and image.n_tokens == n_total:
        raise ConfigError(
            f"encoder_keep: expected an image that was encoded with it, got one with all its {n_total} tokens; pass "
            "the same config to encode(image, prune), or use encoder_keep=1"
        )
    for piece, count in zip(image.pieces, counts, strict=True):
        if count > piece.n_tokens:
            raise ConfigError(
                f"n_keep: expected at most the {piece.n_tokens} tokens that the encoder left, got {count}; encode the "
                "image with a larger encoder_keep, or keep fewer"
            )
    return counts


def _prune_piece(
    piece: Piece,
    rows: FloatArray,
    tokens: FloatArray,
    scores: Scores,
    cfg: PruneConfig,
    n_keep: int,
    n_threads: int,
) -> PrunedPiece:
    """`rows`: all of the piece, (n_rows, n_embd); `tokens`: main planes of its tokens, (n_tok, n_embd / n_planes)."""
    merge = cfg.merge == "average" and n_keep < piece.n_tokens
    table = cosines(tokens, n_threads=n_threads) if merge or needs_cosines(cfg.select) else None
    indices = select_by(scores.total, table, n_keep, cfg.select, cfg.seed)
    if n_keep == piece.n_tokens:  # all tokens: the very same rows, not a copy of them
        return PrunedPiece(rows, indices)
    kept_rows = piece.rows_of(indices)
    kept = np.ascontiguousarray(rows[kept_rows])
    if merge and table is not None:
        whole = np.ascontiguousarray(rows[piece.token_rows(range(piece.n_tokens))])
        kept[np.isin(kept_rows, piece.token_rows(indices))] = merge_average(whole, table, indices)
    return PrunedPiece(kept, indices)


def _positions(piece: Piece, indices: IndexArray, places: bool) -> IndexArray:
    if places:
        line, column = np.divmod(piece.numbers(indices), np.int32(piece.n_columns))
        return np.stack([np.zeros_like(indices), line, column], axis=1)
    return np.searchsorted(piece.rows_of(indices), piece.token_rows(indices)).astype(np.int32)
