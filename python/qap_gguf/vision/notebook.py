"""What a notebook shows of an image, of its kept tokens and of its scores: small PNG files, made by Pillow alone.

:func:`qap_gguf.plot` draws more, with matplotlib.
"""

from __future__ import annotations

import base64
import html
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from qap_gguf.arguments import FloatArray, IndexArray
from qap_gguf.vision.images import Pixels
from qap_gguf.vision.overlay import dim_dropped, is_grid, letterbox, place
from qap_gguf.vision.thumbnail import read_thumbnail
from qap_gguf.vision.tiles import Content

_SIDE = 360  # pixels, about, of the longer side
#: Dark to bright, as viridis: even in lightness.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32)


def picture_png(
    thumbnail: npt.NDArray[np.uint8],
    grid: tuple[int, int],
    content: Content | None,
    indices: IndexArray | None,
    early: npt.NDArray[np.bool_] | None = None,
) -> bytes:
    """The picture as the encoder sees it, with dropped patches dimmed where `indices` says which are kept.

    `content` says where it lies on the grid, in tokens (None: on all of it), `early` which patches were dropped inside
    the encoder: these are darker still.
    """
    pixels = read_thumbnail(thumbnail)
    if is_grid(grid):
        patch = max(1, _SIDE // max(grid))
        canvas = (patch * grid[1], patch * grid[0])
        pixels = letterbox(pixels, canvas, place(content, grid, canvas))
        if indices is not None:
            pixels = dim_dropped(pixels, grid, indices, early=early)
    return _png(pixels)


def scores_png(values: FloatArray, grid: tuple[int, int]) -> bytes:
    """A map of numbers, one for each patch: the smallest dark, the largest bright."""
    low, high = float(values.min()), float(values.max())
    part = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    at = np.linspace(0.0, 1.0, len(_COLOURS))
    colours = np.stack([np.interp(part, at, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    patch = max(1, _SIDE // max(grid))
    cells = colours.reshape(*grid, 3).round().astype(np.uint8)
    return _png(cells.repeat(patch, axis=0).repeat(patch, axis=1))


def as_html(png: bytes | None, words: str) -> str | None:
    """A picture with a line of words under it; None where there is no picture."""
    if png is None:
        return None
    data, text = base64.b64encode(png).decode(), html.escape(words, quote=True)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
