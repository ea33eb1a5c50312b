"""The pieces of an encoded image: one for most models, one for each tile where the model cuts a picture.

A row of a piece is a token, or a special row: the [IMG_BREAK] that Pixtral has behind each line of tokens, the end of a
line of LLaVA-NeXT's grid. Special rows are kept always and do not count as tokens (native/src/qap-plan.h has the same
rules).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qap_gguf import _core
from qap_gguf.arguments import IndexArray
from qap_gguf.errors import ConfigError


@dataclass(frozen=True)
class Piece:
    """One piece of an image, as the encoder gives it.

    Attributes:
        n_tokens: tokens that left the encoder, which can be dropped.
        n_columns: tokens in a line of the picture; 0 where the piece is several views of it (LLaVA-NeXT).
        special: numbers of the special rows among all rows, ascending.
        early: numbers of the tokens among all of the picture's, ascending; None where the encoder dropped none early.
        n_early_dropped: how many it dropped.

    Example:
        >>> piece = Piece(n_tokens=6, n_columns=3, special=(3,))
        >>> piece.n_rows, piece.rows_of([0, 4]).tolist()
        (7, [0, 3, 5])
    """

    n_tokens: int
    n_columns: int
    special: tuple[int, ...] = ()
    early: tuple[int, ...] | None = None
    n_early_dropped: int = 0

    @property
    def n_total(self) -> int:
        """Tokens of the piece, those that the encoder dropped among them."""
        return self.n_tokens + self.n_early_dropped

    def numbers(self, indices: Sequence[int] | IndexArray) -> IndexArray:
        """Numbers among all tokens of the picture, of tokens that left the encoder, int32 (k,)."""
        found = np.asarray(indices, dtype=np.int32)
        return found if self.early is None else np.asarray(self.early, dtype=np.int32)[found]

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
        rows = self.token_rows(indices)
        return np.union1d(rows, np.array(self.special, np.int32)).astype(np.int32) if self.special else rows


def piece_of(n_rows: int, report: dict[str, Any] | None) -> Piece:
    """The piece that an encode's report tells of; without one (a model that cannot be pruned) all rows are tokens."""
    if report is None:
        side = int(n_rows**0.5 + 0.5)
        return Piece(n_rows, side if side * side == n_rows else n_rows)
    n_total, columns, special = int(report["n_total"]), int(report["n_columns"]), tuple(report["special"].tolist())
    early = report.get("early")
    if early is None:
        return Piece(n_total, columns, special)
    whole = Piece(n_total, columns, special)
    left = tuple(np.searchsorted(whole.rows_of(early), special).tolist())
    return Piece(len(early), columns, left, tuple(early.tolist()), n_total - len(early))


def share(sizes: Sequence[int], n_keep: int) -> list[int]:
    """K shared among pieces in proportion to their tokens: largest remainder, at least one token each.

    Args:
        sizes: tokens of each piece.
        n_keep: K.

    Raises:
        ConfigError: K is less than one token for each piece.

    Example:
        >>> share([16, 16, 4], 9)
        [4, 4, 1]
    """
    try:
        return _core.share(list(sizes), n_keep)
    except ValueError as err:
        raise ConfigError(f"{err}; keep more tokens") from err
