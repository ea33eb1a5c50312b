"""Tokens of an image, all of them and those that are kept, and the way from one to the other.

The steps are those of docs/method.md: scores over all tokens, selection of exactly K, gathering of the kept rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qap_gguf import _core
from qap_gguf.arguments import FloatArray, IndexArray, check_array
from qap_gguf.errors import ArrayError, ImageError
from qap_gguf.vision.tiles import Content, Piece, piece_of

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """All tokens of one encoded image, those that are padding among them.

    Where the encoder left tokens out (``PruneConfig.drops_early``), their rows, signals and hidden rows are zeros.

    Attributes:
        features: the rows that the language model gets, float32 (n_rows, n_embd): tokens and special rows of all
            pieces, one after another. DeepStack models have their planes side by side in a row.
        grid: (rows, columns) of the tokens in the picture; (1, n_tok) where it was cut into tiles.
        attention: class-token attention, mean over heads, float32 (n_tok,); None where the encoder has none.
        size: (width, height) of the picture in pixels.
        seconds: wall-clock time of the encode.
        received: attention received, mean over heads, queries and the patches of a token, float32 (n_tok,), or None.
        hidden: input of the projector, float32 (n_tok, n_hidden); only for models with a CLIP text tower, else None.
        bytes_read: what the encode copied from the device to the host: the arrays above.
        pieces: the tiles of the picture, or the whole of it.
        n_planes: planes of a row; the first is what scores look at.
        thumbnail: the picture as a small JPEG file, uint8 (n_bytes,), which notebooks show; None where it is not known.
        skip_flat_tiles, duplicates: those of the PruneConfig that it was encoded with.
        dropped_total: scores of the tokens that an early drop took, float32 (n_dropped,), piece by piece; None where it
            took none, or where a piece has more than 4096 tokens.
        dropped_near: cosines of the tokens that it left with these, inside the encoder: of each piece the table
            (n_left, n_dropped), one after another, float32 (n,); None where `dropped_total` is.
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
    thumbnail: npt.NDArray[np.uint8] | None = None
    skip_flat_tiles: int | None = None
    duplicates: int | None = None
    dropped_total: FloatArray | None = None
    dropped_near: FloatArray | None = None

    def __post_init__(self) -> None:
        if not self.pieces:
            object.__setattr__(self, "pieces", (Piece(int(self.features.shape[0]), self.grid[1]),))

    def __repr__(self) -> str:
        rows, columns = self.grid
        return (
            f"ImageEmbedding({self.n_tokens} tokens ({rows} x {columns}) of {self.features.shape[-1]} numbers, "
            f"picture of {self.size[0]} x {self.size[1]} pixels)"
        )

    def _repr_png_(self) -> bytes | None:
        """For notebooks: the picture; nothing where it is not known."""
        from qap_gguf.vision.notebook import picture_png

        return None if self.thumbnail is None else picture_png(self.thumbnail, self.grid, self.content, None)

    def _repr_html_(self) -> str | None:
        from qap_gguf.vision.notebook import as_html

        return as_html(self._repr_png_(), repr(self))

    @property
    def n_tokens(self) -> int:
        """Tokens that the encoder gave, padding among them; special rows do not count."""
        return sum(piece.n_tokens for piece in self.pieces)

    @property
    def n_real(self) -> int:
        """Tokens that are no padding: those of which K are kept."""
        return sum(piece.n_real for piece in self.pieces)

    @property
    def n_left(self) -> int:
        """Tokens that can be kept: those that are no padding, and that the encoder did not leave out."""
        return sum(piece.n_left for piece in self.pieces)

    @cached_property
    def dropped(self) -> BoolArray:
        """Which tokens the encoder dropped early or left out from the start, bool (n_tok,)."""
        return self._mask([piece.dropped for piece in self.pieces])

    @property
    def kept_early(self) -> IndexArray | None:
        """Numbers of the tokens that the encoder did not leave out, int32 (n,), ascending; None where it took all."""
        return np.flatnonzero(~self.dropped).astype(np.int32) if any(p.dropped for p in self.pieces) else None

    @cached_property
    def padding(self) -> BoolArray:
        """Which tokens lie wholly in the padding of a letterboxed picture, bool (n_tok,).

        Pruning drops them all, whatever K is; without pruning the language model reads them, as it did in training.
        """
        return self._mask([piece.padding for piece in self.pieces])

    @property
    def content(self) -> Content:
        """Where the picture lies on the grid: (left, top, width, height) in tokens, from its top left corner.

        The encoder's own resize says it. All of the grid, where the picture was stretched to it, or nothing is known.
        """
        found = self.pieces[0].content if len(self.pieces) == 1 else None
        return (0.0, 0.0, float(self.grid[1]), float(self.grid[0])) if found is None else found

    def _mask(self, numbers: Sequence[tuple[int, ...]]) -> BoolArray:
        """True for tokens of these numbers in each piece."""
        mask = np.zeros(self.n_tokens, dtype=np.bool_)
        start = 0
        for piece, chosen in zip(self.pieces, numbers, strict=True):
            mask[start + np.asarray(chosen, np.int64)] = True
            start += piece.n_tokens
        return mask

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
    thumbnail: npt.NDArray[np.uint8] | None = None,
    *,
    skip_flat_tiles: int | None = None,
    duplicates: int | None = None,
) -> ImageEmbedding:
    """The embedding of an image from what the encodes of its pieces gave; no report: a model that cannot be pruned."""
    pieces = tuple(piece_of(int(rows.shape[0]), report) for rows, report in zip(features, reports, strict=True))
    n_tokens, columns = sum(piece.n_tokens for piece in pieces), pieces[0].n_columns
    whole = len(pieces) == 1 and columns > 0 and n_tokens % columns == 0
    signals: dict[str, FloatArray | None] = {}
    for name in ("attention", "received", "hidden"):
        parts = [None if report is None else report.get(name) for report in reports]
        found = [part for part in parts if part is not None]
        if found:  # a flat tile, which was not encoded, has none
            flat = [piece.n_left == 0 for piece in pieces]
            parts = [
                np.zeros((piece.n_tokens, *found[0].shape[1:]), np.float32) if part is None and is_flat else part
                for part, piece, is_flat in zip(parts, pieces, flat, strict=True)
            ]
        complete = [part for part in parts if part is not None]
        signals[name] = np.concatenate(complete) if found and len(complete) == len(parts) else None
    signals |= _dropped(pieces, reports)
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
        thumbnail=thumbnail,
        skip_flat_tiles=skip_flat_tiles,
        duplicates=duplicates,
        **signals,
    )


def _dropped(pieces: Sequence[Piece], reports: Sequence[dict[str, Any] | None]) -> dict[str, FloatArray | None]:
    """Scores and cosines of what an early drop took, of all pieces or, where one lacks them, of none."""
    totals, tables = [], []
    for piece, report in zip(pieces, reports, strict=True):
        if not piece.dropped_real:
            continue
        if report is None or report["early_near"] is None:
            return {}
        totals.append(report["early_total"][list(piece.dropped_real)])
        tables.append(report["early_near"].reshape(-1))
    return {"dropped_total": np.concatenate(totals), "dropped_near": np.concatenate(tables)} if totals else {}


def is_usable(features: FloatArray) -> bool:
    """Whether all numbers are finite and small enough for their squares to be.

    Example:
        >>> import numpy as np
        >>> [is_usable(np.float32([[1.0, x]])) for x in (2.0, np.nan, -np.inf, 3e38)]
        [True, False, False, False]
    """
    low, high = float(features.min()), float(features.max())  # NaN where there is one
    return low >= -_core.MAX_MAGNITUDE and high <= _core.MAX_MAGNITUDE


def check_embedding(image: ImageEmbedding, n_embd: int) -> None:
    """`image` has the width that the language model reads.

    Raises:
        ArrayError: its features are not float32 (n_rows, n_embd) in C order, not finite or beyond 1e30.
        ImageError: it was encoded by another model, or has other rows than its pieces.
    """
    check_array("features", image.features, 2)
    if not is_usable(image.features):
        raise ArrayError("features: expected finite numbers up to 1e30, got others; encode the picture anew")
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
