"""Tokens of an image, all of them and those that are kept, and the way from one to the other.

The steps are those of docs/method.md: scores over all tokens, selection of exactly K, gathering of the kept rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qap_gguf.arguments import FloatArray, IndexArray, check_array
from qap_gguf.errors import ImageError
from qap_gguf.vision.tiles import Piece, piece_of


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """The tokens of one encoded image: all of them, or those that an early drop left (``PruneConfig.encoder_keep``).

    Attributes:
        features: the rows that the language model gets, float32 (n_rows, n_embd): tokens and special rows of all
            pieces, one behind another. DeepStack models have their planes side by side in a row.
        grid: (rows, columns) of all tokens in the picture; (1, n_total) where it was cut into tiles.
        attention: class-token attention, mean over heads, float32 (n_tok,); None where the encoder has none.
        size: (width, height) of the picture in pixels.
        seconds: wall-clock time of the encode.
        received: attention received, mean over heads, queries and the patches of a token, float32 (n_tok,), or None.
        hidden: input of the projector, float32 (n_tok, n_hidden); only for models with a CLIP text tower, else None.
        bytes_read: what the encode copied from the device to the host: the arrays above.
        pieces: the tiles of the picture, or the whole of it.
        n_planes: planes of a row; the first is what scores look at.
    """

    features: FloatArray
    grid: tuple[int, int]
    attention: FloatArray | None
    size: tuple[int, int]
    seconds: float
    received: FloatArray | None = None
    hidden: FloatArray | None = None
    bytes_read: int = 0
    pieces: tuple[Piece, ...] = ()
    n_planes: int = 1

    def __post_init__(self) -> None:
        if not self.pieces:
            object.__setattr__(self, "pieces", (Piece(int(self.features.shape[0]), self.grid[1]),))

    @property
    def n_tokens(self) -> int:
        """Tokens that left the encoder; special rows do not count."""
        return sum(piece.n_tokens for piece in self.pieces)

    @property
    def n_total(self) -> int:
        """Tokens of the image, those that the encoder dropped early among them."""
        return sum(piece.n_total for piece in self.pieces)

    @cached_property
    def kept_early(self) -> IndexArray | None:
        """Numbers of the tokens among all of the image's, int32 (n_tok,), ascending; None where none was dropped."""
        if self.n_tokens == self.n_total:
            return None
        starts = np.cumsum([0, *(piece.n_total for piece in self.pieces)])[:-1]
        parts = zip(self.pieces, starts, strict=True)
        numbers = [piece.numbers(range(piece.n_tokens)) + start for piece, start in parts]
        return np.concatenate(numbers).astype(np.int32)

    @property
    def n_rows(self) -> int:
        """Rows of the image before pruning."""
        return int(self.features.shape[0])

    @cached_property
    def tokens(self) -> FloatArray:
        """What scores look at: the main plane of every token, float32 (n_tok, n_embd / n_planes)."""
        if self.n_planes == 1 and self.n_rows == self.n_tokens:
            return self.features
        width = self.features.shape[1] // self.n_planes
        rows = [piece.token_rows(range(piece.n_tokens)) for piece in self.pieces]
        starts = np.cumsum([0, *(piece.n_rows for piece in self.pieces)])[:-1]
        chosen = np.concatenate([start + part for start, part in zip(starts, rows, strict=True)])
        return np.ascontiguousarray(self.features[chosen, :width])


def embedding_of(
    features: Sequence[FloatArray],
    reports: Sequence[dict[str, Any] | None],
    size: tuple[int, int],
    seconds: float,
    n_planes: int = 1,
) -> ImageEmbedding:
    """The embedding of an image from what the encodes of its pieces gave; no report: a model that cannot be pruned."""
    pieces = tuple(piece_of(int(rows.shape[0]), report) for rows, report in zip(features, reports, strict=True))
    n_tokens, columns = sum(piece.n_total for piece in pieces), pieces[0].n_columns
    whole = len(pieces) == 1 and columns > 0 and n_tokens % columns == 0
    signals: dict[str, FloatArray | None] = {}
    for name in ("attention", "received", "hidden"):
        parts = [None if report is None else report.get(name) for report in reports]
        found = [part for part in parts if part is not None]
        signals[name] = np.concatenate(found) if len(found) == len(parts) else None
    both = zip(features, reports, strict=True)
    n_bytes = [int((report or {}).get("bytes_read", rows.nbytes)) for rows, report in both]  # no report: all rows
    return ImageEmbedding(
        features=features[0] if len(features) == 1 else np.concatenate(features),
        grid=(n_tokens // columns, columns) if whole else (1, n_tokens),
        size=size,
        seconds=seconds,
        bytes_read=sum(n_bytes),
        pieces=pieces,
        n_planes=n_planes,
        **signals,
    )


def check_embedding(image: ImageEmbedding, n_embd: int) -> None:
    """`image` has the width that the language model reads.

    Raises:
        ArrayError: its features are not float32 (n_rows, n_embd) in C order.
        ImageError: it was encoded by another model, or has other rows than its pieces.
    """
    check_array("features", image.features, 2)
    if image.features.shape[1] != n_embd:
        raise ImageError(
            f"image: expected {n_embd} numbers a token, got {image.features.shape[1]}; encode it with this VisionModel"
        )
    check_rows(image)


def check_rows(image: ImageEmbedding) -> None:
    """`image` has the rows that its pieces speak of.

    Raises:
        ImageError: it has other rows.
    """
    expected = sum(piece.n_rows for piece in image.pieces)
    if image.n_rows != expected:
        raise ImageError(f"image: expected {expected} rows, got {image.n_rows}; replace features and pieces together")
