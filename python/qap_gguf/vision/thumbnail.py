"""A small copy of a picture that goes with its embedding, so that a notebook can show what was encoded."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from qap_gguf.vision.images import Pixels

SIDE = 320  # pixels, of the longer side
_QUALITY = 80
#: Bytes of the largest that is ever made, and more.
MAX_BYTES = 1 << 18


def thumbnail(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """The picture as a JPEG file of at most 320 pixels a side, uint8 (n_bytes,).

    Example:
        >>> import numpy as np
        >>> small = thumbnail(np.zeros((1000, 500, 3), np.uint8))
        >>> read_thumbnail(small).shape
        (320, 160, 3)
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(pixels)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def read_thumbnail(data: npt.NDArray[np.uint8]) -> Pixels:
    """The pixels of a thumbnail, uint8 (h, w, 3)."""
    with Image.open(io.BytesIO(data.tobytes()), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
