"""The pieces of an encoded image: one for most models, one for each tile where the model cuts a picture.

A row of a piece is a token, or a special row: the [IMG_BREAK] that Pixtral has after each line of tokens, the end of a
line of LLaVA-NeXT's grid. Special rows are kept always and do not count as tokens. A token whose patches lie wholly in
the padding of a letterboxed picture is padding: pruning neither scores nor keeps it (native/src/prune.cpp), nor a token
that the encoder dropped early, whose row is zeros (native/src/early-drop.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qap_gguf import _core
from qap_gguf.arguments import IndexArray
from qap_gguf.errors import ConfigError

Content = tuple[float, float, float, float]


@dataclass(frozen=True)
class Piece:
    """One piece of an image, as the encoder gives it.

    Attributes:
        n_tokens: tokens, which can be dropped.
        n_columns: tokens in a line of the picture; 0 where the piece is several views of it (LLaVA-NeXT).
        special: numbers of the special rows among all rows, ascending.
        padding: numbers of the tokens that are padding, ascending.
        dropped: numbers of the tokens that the encoder dropped early or left out from the start, ascending; padding
            goes first. All of a flat tile's.
        content: where the picture lies on the grid of tokens: left, top, width and height, in tokens from its top left
            corner; what is beside it is padding. None where that is not known.

    Example:
        >>> piece = Piece(n_tokens=6, n_columns=3, special=(3,))
        >>> piece.n_rows, piece.rows_of([0, 4]).tolist()
        (7, [0, 3, 5])
    """

    n_tokens: int
    n_columns: int
    special: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    content: Content | None = None

    @property
    def n_real(self) -> int:
        """Tokens that are no padding: K is of these."""
        return self.n_tokens - len(self.padding)

    @property
    def left_out(self) -> tuple[int, ...]:
        """Numbers of the tokens that cannot be kept, ascending: padding, and those that were dropped early."""
        return tuple(sorted({*self.padding, *self.dropped})) if self.dropped else self.padding

    @property
    def dropped_real(self) -> tuple[int, ...]:
        """Numbers of the dropped tokens that are no padding, ascending; none where no token is left."""
        padding = set(self.padding)
        return tuple(token for token in self.dropped if token not in padding) if self.n_left else ()

    @property
    def n_left(self) -> int:
        """Tokens that can be kept."""
        return self.n_tokens - len(self.left_out)

    @property
    def n_special(self) -> int:
        """Special rows among the piece's rows."""
        return len(self.special)

    @property
    def n_rows(self) -> int:
        """Rows that the encoder gives."""
        return self.n_tokens + self.n_special

    def token_rows(self, indices: Sequence[int] | IndexArray) -> IndexArray:
        """Rows of the tokens with these numbers, int32 (k,)."""
        found = np.asarray(indices, dtype=np.int32)
        if not self.special:
            return found
        rows = np.delete(np.arange(self.n_rows, dtype=np.int32), self.special)
        return np.asarray(rows[found])

    def rows_of(self, indices: Sequence[int] | IndexArray) -> IndexArray:
        """Rows that are kept with these tokens, the special ones among them, int32, ascending."""
        return _core.kept_rows(self.n_tokens, list(self.special), np.asarray(indices, dtype=np.int32).tolist())


def piece_of(n_rows: int, report: dict[str, Any] | None) -> Piece:
    """The piece that an encode's report tells of; without one (a model that cannot be pruned) all rows are tokens."""
    if report is None:
        side = int(n_rows**0.5 + 0.5)
        return Piece(n_rows, side if side * side == n_rows else n_rows)
    n_tokens, early = int(report["n_total"]), report["early"]
    return Piece(
        n_tokens,
        int(report["n_columns"]),
        tuple(report["special"].tolist()),
        tuple(report["padding"].tolist()),
        () if early is None else tuple(np.delete(np.arange(n_tokens), early).tolist()),
        report["content"],
    )


def share(sizes: Sequence[int], n_keep: int) -> list[int]:
    """K shared among pieces in proportion to their tokens: largest remainder.

    Each gets at least one where K is enough for that, else some get none; so do pieces without tokens.

    Args:
        sizes: tokens of each piece that can be kept.
        n_keep: K, in 1..sum(sizes).

    Raises:
        ConfigError: K is outside its range.

    Example:
        >>> share([16, 16, 4], 9), share([16, 16, 4], 2)
        ([4, 4, 1], [1, 1, 0])
    """
    try:
        return _core.share(list(sizes), n_keep)
    except ValueError as err:
        raise ConfigError(str(err)) from err
