"""What is known to be in the KV cache of a language model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    pass

IdArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Done:
    """A step that is in the KV cache.

    Attributes:
        key: what it was: tokens of text, or the digest of an image.
        ids: what stands in ``input_ids`` for it.
        start: its first position.
        surplus: cells in use beyond the positions in use, after it.
    """

    key: tuple[int, ...] | bytes
    ids: IdArray
    start: int
    surplus: int


@dataclass
class KvRecord:
    """The steps of the last prompt that went into a KV cache; one record for each Llama, whoever uses it.

    Attributes:
        steps: in the order of the prompt.
        surplus: cells in use beyond the positions in use: an image has fewer positions than cells with M-RoPE, and
            more (surplus is negative) where gaps are left between its kept tokens.
    """

    steps: list[Done] = field(default_factory=list)
    surplus: int = 0

    def forget(self) -> None:
        """Nothing is known about the cache any more."""
        self.steps.clear()
        self.surplus = 0


def image_ids(digest: bytes, n_pos: int) -> IdArray:
    """Numbers for the positions of an image, int32 (n_pos,), all negative.

    Example:
        >>> ids = image_ids(b"what the image is", 4)
        >>> bool((ids < 0).all()), bool((ids == image_ids(b"what the image is", 4)).all())
        (True, True)
    """
    stream = hashlib.shake_128(digest).digest(4 * n_pos)
    return np.frombuffer(stream, dtype=np.int32) | np.int32(-(2**31))
