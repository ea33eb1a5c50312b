"""The order of the rows of a q or k projection within each head.

libllama's Llama rotates neighbours, rows 2j and 2j + 1; its M-RoPE architectures rotate row j together with row
j + head_dim / 2. Rows move whole, so the same works for every type of weights, quantized ones too.
"""

from __future__ import annotations

import numpy as np

__all__ = ["halves", "pairs"]


def halves(data: bytes, head_dim: int, n_rows: int) -> bytes:
    """From neighbours to halves: the even rows of each head first, then its odd ones.

    Args:
        data: whole heads, `n_rows` rows of equal size.
        head_dim: rows of a head, even.
        n_rows: a multiple of `head_dim`.

    Example:
        >>> halves(b"aAbBcCdD", 4, 8)
        b'abABcdCD'
    """
    return _turn(data, (n_rows // head_dim, head_dim // 2, 2))


def pairs(data: bytes, head_dim: int, n_rows: int) -> bytes:
    """From halves back to neighbours.

    Example:
        >>> pairs(b"abABcdCD", 4, 8)
        b'aAbBcCdD'
    """
    return _turn(data, (n_rows // head_dim, 2, head_dim // 2))


def _turn(data: bytes, shape: tuple[int, int, int]) -> bytes:
    n_rows = shape[0] * shape[1] * shape[2]
    rows = np.frombuffer(data, np.uint8).reshape(*shape, len(data) // n_rows)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).tobytes()
