"""What is known to be in the KV cache of a language model."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, eq=False)
class RecurrentState:
    """What the layers of a model held that keep one state for all tokens before.

    Attributes:
        data: as libllama wrote it.
        n_past: the position after the last token in it.
    """

    data: ctypes.Array[ctypes.c_uint8]
    n_past: int


@dataclass
class KvRecord:
    """The steps of the last prompt that went into a KV cache; one record for each Llama, whoever uses it.

    Attributes:
        steps: in the order of the prompt.
        state: of a model with recurrent layers after some of the steps, the only place that it can go back to.
        surplus: cells in use beyond the positions in use: an image has fewer positions than cells with M-RoPE, and
            more (surplus is negative) where gaps are left between its kept tokens.
    """

    steps: list[Done] = field(default_factory=list)
    state: RecurrentState | None = None
    surplus: int = 0

    def forget(self) -> None:
        """Nothing is known about the cache any more."""
        self.steps.clear()
        self.state = None
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
