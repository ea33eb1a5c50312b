"""Prune an encoded image: the native pruner (native/src/prune.cpp), piece by piece, and positions of the kept rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qap_gguf import _core
from qap_gguf.arguments import FloatArray, IndexArray
from qap_gguf.config import LEVELS, PruneConfig
from qap_gguf.defaults import check_config, check_weights, to_params
from qap_gguf.errors import ArrayError, ConfigError, UnsupportedError
from qap_gguf.pruning.relevance import Signals
from qap_gguf.pruning.score import Scores
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.tiles import Content, Piece, share


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
        indices: numbers of the kept tokens in the image, int32 (k,), ascending; none is padding or was dropped early.
        positions: their positions relative to the start of their piece: int32 (k,), without gaps or, for relabelled
            models, among all rows of the piece; for M-RoPE models that keep places int32 (k, 3), (time, row, column).
        scores: the scores of all tokens.
        n_total: tokens of the image before pruning, padding among them.
        score_s: seconds for the scores.
        select_s: seconds for selection and gathering.
        pieces: the same, piece by piece.
        policy: what was asked for the positions, a name of ``PruneConfig.positions``.
        thumbnail: the picture as a small JPEG file, see :class:`~qap_gguf.ImageEmbedding`.
        content: where it lies on the grid of tokens, see :attr:`~qap_gguf.ImageEmbedding.content`; None: on all of it.
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
    thumbnail: npt.NDArray[np.uint8] | None = None
    content: Content | None = None

    def __repr__(self) -> str:
        return f"PrunedImage({len(self.indices)} of {self.n_total} tokens kept, alpha {self.scores.alpha:.3g})"

    def _repr_png_(self) -> bytes | None:
        """For notebooks: the picture, dropped patches dimmed; nothing where it or their place is not known."""
        from qap_gguf.vision.notebook import picture_png
        from qap_gguf.vision.overlay import is_grid

        grid = self.scores.grid
        if self.thumbnail is None or grid is None or not is_grid(grid):
            return None
        return picture_png(self.thumbnail, grid, self.content, self.indices, self.scores.dropped)

    def _repr_html_(self) -> str | None:
        from qap_gguf.vision.notebook import as_html

        return as_html(self._repr_png_(), repr(self))


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A piece of an image, all of its rows (n_rows, n_embd), what relevance of its tokens is made of, and of what an
    early drop took the scores (n_dropped,) and cosines (n_left, n_dropped)."""

    piece: Piece
    rows: FloatArray
    attention: FloatArray | None
    received: FloatArray | None
    prompt: FloatArray | None
    dropped_total: FloatArray | None = None
    dropped_near: FloatArray | None = None


def _inputs(image: ImageEmbedding, signals: Signals, signal: str) -> list[_Inputs]:
    noted = (signals.attention, signals.received, signals.of_prompt(signal))
    found, row, token = [], 0, 0
    for piece, (total, near) in zip(image.pieces, _dropped(image), strict=True):
        rows, span = image.features[row : row + piece.n_rows], slice(token, token + piece.n_tokens)
        attention, received, prompt = (None if whole is None else whole[span] for whole in noted)
        found.append(_Inputs(piece, rows, attention, received, prompt, total, near))
        row, token = row + piece.n_rows, token + piece.n_tokens
    return found


def _dropped(image: ImageEmbedding) -> list[tuple[FloatArray | None, FloatArray | None]]:
    """Of each piece the scores (n_dropped,) and cosines (n_left, n_dropped) of what an early drop took, or None."""
    if image.dropped_total is None or image.dropped_near is None:
        return [(None, None)] * len(image.pieces)
    found: list[tuple[FloatArray | None, FloatArray | None]] = []
    first = cell = 0
    for piece in image.pieces:
        n_dropped = len(piece.dropped_real)
        last, end = first + n_dropped, cell + n_dropped * piece.n_left
        near = image.dropped_near[cell:end].reshape(piece.n_left, n_dropped)
        found.append((image.dropped_total[first:last], near) if n_dropped else (None, None))
        first, cell = last, end
    return found


def _prune(
    image: ImageEmbedding,
    signals: Signals,
    cfg: PruneConfig,
    counts: Sequence[int],
    n_threads: int,
    channel_weights: FloatArray | None,
) -> list[dict[str, Any]]:
    """What native/src/prune.cpp makes of each piece, which is scored by itself; `counts`: its K, 0 for scores only."""
    check_weights(cfg, channel_weights is not None)
    signal, params = signals.pick(cfg), to_params(cfg)
    try:
        return [
            _core.prune(
                rows=part.rows,
                n_planes=image.n_planes,
                special=list(part.piece.special),
                padding=list(part.piece.left_out),
                attention=part.attention,
                received=part.received,
                prompt=part.prompt,
                prompt_semantic=signal,
                params=params,
                n_keep=n_keep,
                device=None,
                n_threads=n_threads,
                channel_weights=channel_weights if cfg.error == "model" else None,
                dropped_total=part.dropped_total,
                dropped_near=part.dropped_near,
            )
            for part, n_keep in zip(_inputs(image, signals, signal), counts, strict=True)
        ]
    except ValueError as err:
        raise ArrayError(str(err)) from err


def _joined(image: ImageEmbedding, found: Sequence[dict[str, Any]]) -> Scores:
    names = ("error", "outlier", "sensitivity", "semantic", "total")
    arrays = {name: np.concatenate([part[name] for part in found]) for name in names}
    alphas = [float(part["alpha"]) for part in found]
    weights = [piece.n_left for piece in image.pieces]
    alpha = alphas[0] if len(alphas) == 1 else float(np.average(alphas, weights=weights))
    padding = image.padding if image.n_real < image.n_tokens else None
    dropped = None if image.kept_early is None else image.dropped
    return Scores(**arrays, alpha=alpha, padding=padding, dropped=dropped, grid=image.grid)


def score_image(
    image: ImageEmbedding, signals: Signals, cfg: PruneConfig, n_threads: int, channel_weights: FloatArray | None = None
) -> Scores:
    """Scores of all tokens of an image, each piece by itself; alpha is the mean over the pieces.

    Raises:
        UnsupportedError: `cfg` asks for a signal that this image does not have, or for weights that are None.
    """
    check_config(cfg)
    return _joined(image, _prune(image, signals, cfg, [0] * len(image.pieces), n_threads, channel_weights))


def _check_early(image: ImageEmbedding, cfg: PruneConfig) -> None:
    """The encoder left out of `image` what `cfg` asks for; where it did, pruning need not ask for it again.

    Raises:
        ConfigError: it did not.
    """
    for name in LEVELS:
        asked, found = getattr(cfg, name), getattr(image, name)
        if asked is not None and asked != found:
            raise ConfigError(
                f"{name}: expected an image that was encoded with {asked}, got one with {found}; pass the same config "
                f"to encode(image, prune), or use {name}=None"
            )
    if cfg.encoder_keep == 1:
        return
    expected = sum(cfg.count_early(piece.n_real) for piece in image.pieces if piece.n_left)
    if image.n_left != expected:
        raise ConfigError(
            f"encoder_keep: expected an image that was encoded with it, {expected} of its {image.n_real} tokens left, "
            f"got {image.n_left}; pass the same config to encode(image, prune), or use encoder_keep=1"
        )


def check_positions(cfg: PruneConfig, places: str) -> None:
    """`cfg` asks for positions that the language model has; `places`: see :attr:`ImageEncoder.places`.

    Raises:
        UnsupportedError: gaps, for a model with 1-D positions.
    """
    if cfg.positions == "keep" and places == "none":
        raise UnsupportedError(
            "positions: expected a language model that may keep them, got one with 1-D positions; relabel its file "
            "with qap-gguf convert --keep-positions MODEL OUT, or use compact or auto"
        )


def prune_image(
    image: ImageEmbedding,
    signals: Signals,
    cfg: PruneConfig,
    n_threads: int,
    *,
    places: str = "none",
    channel_weights: FloatArray | None = None,
) -> PrunedImage:
    """Keep the tokens of an image that score best: K of those that are no padding, or all of these if there are fewer;
    after an early drop those that it left.

    Args:
        image: all its tokens.
        signals: what relevance can be made of; its features are ``image.tokens``.
        cfg: how to prune.
        n_threads: CPU threads.
        places: what a kept token's own place is: "none", "grid" or "index", see :attr:`ImageEncoder.places`.
        channel_weights: for error "model", see :attr:`ImageEncoder.channel_weights`.

    Raises:
        ArrayError: features that are not finite, or above 1e30.
        ConfigError: `cfg` asks for an early drop that the image was not encoded with.
        UnsupportedError: `cfg` asks for a signal, for positions or for weights that the model does not have.
    """
    check_config(cfg)
    check_positions(cfg, places)
    _check_early(image, cfg)
    counts = share([piece.n_left for piece in image.pieces], min(cfg.count(image.n_real), image.n_left))
    found = _prune(image, signals, cfg, counts, n_threads, channel_weights)
    pieces = tuple(PrunedPiece(part["rows"], part["indices"]) for part in found)
    indices, positions, first = [], [], 0
    for piece, cut in zip(image.pieces, pieces, strict=True):
        indices.append(cut.indices + first)
        positions.append(_positions(piece, cut.indices, "none" if cfg.positions == "compact" else places))
        first += piece.n_tokens
    return PrunedImage(
        features=pieces[0].features if len(pieces) == 1 else np.concatenate([cut.features for cut in pieces]),
        indices=np.concatenate(indices).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        scores=_joined(image, found),
        n_total=image.n_tokens,
        score_s=sum(part["score_s"] for part in found),
        select_s=sum(part["select_s"] for part in found),
        pieces=pieces,
        policy=cfg.positions,
        thumbnail=image.thumbnail,
        content=image.content,
    )


def _positions(piece: Piece, indices: IndexArray, places: str) -> IndexArray:
    if places == "index":
        return piece.token_rows(indices).astype(np.int32)
    if places == "grid":
        line, column = np.divmod(indices, np.int32(piece.n_columns))
        time = piece.token_rows(indices) if piece.special else np.zeros_like(indices)  # HunyuanVL counts rows there
        return np.stack([time, line, column], axis=1)
    return np.searchsorted(piece.rows_of(indices), piece.token_rows(indices)).astype(np.int32)
