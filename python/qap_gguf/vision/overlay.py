"""Where the patches of an encoder lie in a picture, and the picture with its dropped patches dimmed.

The place follows upstream's ``img_tool::resize`` with ``PAD_CEIL`` (tools/mtmd/mtmd-image.cpp) and the colour and
filter that clip.cpp sets for LLaVA's projectors: scaled to fit, centred, padded with CLIP's mean colour, bicubic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from qap_gguf.vision.images import Pixels

PAD_COLOUR = (122, 116, 104)  # clip.cpp, image_pad_color: CLIP's mean colour


class Box(NamedTuple):
    """A rectangle in pixels, from the top left corner."""

    left: int
    top: int
    width: int
    height: int


def place(size: tuple[int, int], canvas: tuple[int, int]) -> Box:
    """Where the encoder puts a picture on its canvas: as large as fits, centred; the rest is padding.

    Args:
        size: (width, height) of the picture.
        canvas: (width, height) of what the encoder sees, a square for LLaVA.

    Example:
        >>> place((640, 480), (336, 336))
        Box(left=0, top=42, width=336, height=252)
    """
    # upstream computes in float32 and rounds up: the same rounding here, or an edge may be off by a pixel
    scale = min(np.float32(canvas[0]) / np.float32(size[0]), np.float32(canvas[1]) / np.float32(size[1]))
    width = min(math.ceil(np.float32(size[0]) * scale), canvas[0])
    height = min(math.ceil(np.float32(size[1]) * scale), canvas[1])
    return Box((canvas[0] - width) // 2, (canvas[1] - height) // 2, width, height)


def letterbox(pixels: Pixels, canvas: tuple[int, int]) -> Pixels:
    """The picture as the encoder sees it, uint8 (height, width, 3) of `canvas` = (width, height): scaled and padded.

    Args:
        pixels: uint8 (h, w, 3).
        canvas: (width, height) of the result.

    Example:
        >>> letterbox(np.zeros((10, 20, 3), np.uint8), (40, 40))[[0, 20], 0].tolist()
        [[122, 116, 104], [0, 0, 0]]
    """
    if (pixels.shape[1], pixels.shape[0]) == canvas:
        return pixels
    box = place((pixels.shape[1], pixels.shape[0]), canvas)
    page = Image.new("RGB", canvas, PAD_COLOUR)
    page.paste(Image.fromarray(pixels).resize((box.width, box.height), Image.Resampling.BICUBIC), (box.left, box.top))
    return np.asarray(page, dtype=np.uint8)


def dim_dropped(
    canvas: Pixels,
    grid: tuple[int, int],
    indices: npt.ArrayLike,
    padding: npt.NDArray[np.bool_] | None = None,
    early: npt.NDArray[np.bool_] | None = None,
) -> Pixels:
    """A copy of what the encoder sees: kept patches unchanged, dropped ones grey and dark, padding hatched.

    Args:
        canvas: uint8 (h, w, 3), see :func:`letterbox`.
        grid: (rows, columns) of the patches that cover it.
        indices: numbers of the kept patches, row by row.
        padding: which patches are padding, bool (rows * columns,); None: no patch is.
        early: which patches were dropped inside the encoder, likewise: these are darker still.

    Example:
        >>> dim_dropped(np.full((2, 4, 3), 200, np.uint8), (1, 2), [1])[0, :, 0].tolist()
        [94, 94, 200, 200]
    """
    rows = np.arange(canvas.shape[0]) * grid[0] // canvas.shape[0]
    columns = np.arange(canvas.shape[1]) * grid[1] // canvas.shape[1]
    kept = kept_map(grid, indices)[np.ix_(rows, columns)]
    grey = canvas @ np.array([0.299, 0.587, 0.114]) * 0.42 + 10.0  # still to be made out, never mistaken for kept
    if early is not None:
        grey = np.where(np.asarray(early).reshape(grid)[np.ix_(rows, columns)], grey * 0.45, grey)
    shown = np.where(kept[..., None], canvas, np.round(grey).astype(np.uint8)[..., None])
    if padding is not None:
        hatched = np.asarray(padding).reshape(grid)[np.ix_(rows, columns)] & ~kept
        width = max(2, canvas.shape[1] // (4 * grid[1]))  # of a stripe: a quarter of a patch
        stripes = np.add.outer(np.arange(canvas.shape[0]), np.arange(canvas.shape[1])) // width % 2
        shown[hatched] = np.where(stripes[hatched], 176, 208)[:, None]
    return shown


def kept_map(grid: tuple[int, int], indices: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which patches are kept, bool (rows, columns)."""
    kept = np.zeros(grid[0] * grid[1], dtype=bool)
    kept[np.asarray(indices)] = True
    return kept.reshape(grid)


def edges(kept: npt.NDArray[np.bool_]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Lines ((x0, y0), (x1, y1)) between kept and dropped patches, in units of patches from the top left corner."""
    framed = np.pad(kept, 1)
    across = [((x, y), (x + 1, y)) for y, x in np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1]).tolist()]
    down = [((x, y), (x, y + 1)) for y, x in np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1]).tolist()]
    return across + down
