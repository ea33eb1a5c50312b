"""Where the patches of an encoder lie in a picture, and the picture with its dropped patches dimmed.

The place is what the native library noted while it brought the picture to its size, whatever the family does
(native/src/families/letterbox.cpp). The padding's colour and the filter are those that clip.cpp sets for LLaVA's
projectors: CLIP's mean colour, bicubic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from qap_gguf.errors import UnsupportedError
from qap_gguf.vision.images import Pixels
from qap_gguf.vision.tiles import Content

if TYPE_CHECKING:
    from qap_gguf.vision.embedding import ImageEmbedding

PAD_COLOUR = (122, 116, 104)  # clip.cpp, image_pad_color: CLIP's mean colour


class Box(NamedTuple):
    """A rectangle in pixels, from the top left corner."""

    left: int
    top: int
    width: int
    height: int


def is_grid(grid: tuple[int, int]) -> bool:
    """Whether tokens in rows and columns have a known place; those of tiles stand in one line."""
    return grid[0] > 1 or 0 < grid[1] <= 3


def check_grid(image: ImageEmbedding) -> None:
    """The tokens of `image` have a known place in the picture.

    Raises:
        UnsupportedError: they do not: the picture was cut into tiles, or the encoder's tokens have none.
    """
    rows, columns = image.grid
    if rows * columns != image.n_tokens or not is_grid(image.grid):
        raise UnsupportedError(
            f"plot: expected a grid of patches, got {rows} x {columns} for {image.n_tokens} tokens; "
            "this encoder's tokens have no known place in the picture"
        )


def place(content: Content | None, grid: tuple[int, int], canvas: tuple[int, int]) -> Box:
    """Where the encoder puts a picture on its canvas, in pixels of a drawing of that canvas; the rest is padding.

    Args:
        content: where it lies on the grid of tokens, see :attr:`qap_gguf.ImageEmbedding.content`; None: on all of it.
        grid: (rows, columns) of the tokens.
        canvas: (width, height) of the drawing.

    Example:
        >>> place((0.0, 3.0, 24.0, 18.0), (24, 24), (336, 336))
        Box(left=0, top=42, width=336, height=252)
    """
    if content is None:
        return Box(0, 0, *canvas)
    across, down = canvas[0] / grid[1], canvas[1] / grid[0]
    left, top = round(content[0] * across), round(content[1] * down)
    right, bottom = round((content[0] + content[2]) * across), round((content[1] + content[3]) * down)
    return Box(left, top, max(1, right - left), max(1, bottom - top))


def letterbox(pixels: Pixels, canvas: tuple[int, int], box: Box) -> Pixels:
    """The picture as the encoder sees it, uint8 (height, width, 3) of `canvas` = (width, height): scaled and padded.

    Args:
        pixels: uint8 (h, w, 3).
        canvas: (width, height) of the result.
        box: where the picture lies on it, see :func:`place`.

    Example:
        >>> letterbox(np.zeros((10, 20, 3), np.uint8), (40, 40), Box(0, 10, 40, 20))[[0, 20], 0].tolist()
        [[122, 116, 104], [0, 0, 0]]
    """
    if box == (0, 0, pixels.shape[1], pixels.shape[0]) and box[2:] == canvas:
        return pixels
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
