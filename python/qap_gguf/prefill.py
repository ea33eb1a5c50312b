"""A tokenized prompt into the KV cache: text tokens and kept image rows, in their order.

llama-cpp-python notes the tokens of its KV cache in ``Llama.input_ids``. An image has no token ids, so its positions
get negative numbers that are made from what is in the cache there: the rows and their positions. No text has such
numbers, and no other image; hence whoever compares ``input_ids`` with a prompt finds equal what is equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qap_gguf import _core
from qap_gguf.encoder import ImageEncoder
from qap_gguf.language import LanguageModel
from qap_gguf.score import FloatArray, IndexArray

IdArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ImageRows:
    """What the language model gets of an image.

    Attributes:
        features: the rows, float32 (k, n_embd).
        indices: their numbers in the image, int32 (k,), ascending; None where it is all of them.
    """

    features: FloatArray
    indices: IndexArray | None


def image_ids(rows: ImageRows, n_pos: int) -> IdArray:
    """Numbers for the positions of an image, int32 (n_pos,), all negative, made from its rows and their places.

    Example:
        >>> rows = ImageRows(np.ones((4, 8), np.float32), None)
        >>> ids = image_ids(rows, 4)
        >>> bool((ids < 0).all()), bool((ids == image_ids(rows, 4)).all())
        (True, True)
    """
    digest = hashlib.blake2b(np.ascontiguousarray(rows.features).data)
    if rows.indices is not None:
        digest.update(np.ascontiguousarray(rows.indices).data)
    digest.update(f"{rows.features.shape} {n_pos}".encode())
    stream = hashlib.shake_128(digest.digest()).digest(4 * n_pos)
    return np.frombuffer(stream, dtype=np.int32) | np.int32(-(2**31))


def fill(
    language: LanguageModel,
    encoder: ImageEncoder,
    chunks: Sequence[_core.Chunk],
    images: Sequence[ImageRows],
    n_batch: int,
) -> None:
    """Put a prompt into the KV cache, which is emptied first.

    Args:
        language: the language model.
        encoder: what `chunks` came from.
        chunks: text and images, in order.
        images: rows for each image chunk.
        n_batch: tokens of a batch.

    Raises:
        NativeError: libllama refuses a batch.
    """
    language.reset()
    waiting: Iterator[ImageRows] = iter(images)
    for chunk in chunks:
        if not chunk.is_image:
            language.prefill(chunk.tokens)
            continue
        rows, start = next(waiting), language.n_past
        encoder.prefill(chunk, rows.features, rows.indices, n_batch)
        language.note(start, image_ids(rows, language.n_past - start))
