"""Several selections of one picture side by side, each with its words: what `qap-gguf compare --png` draws."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qap_gguf.arguments import IndexArray
from qap_gguf.errors import ConfigError
from qap_gguf.plotting.plot import require_matplotlib
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.images import Pixels
from qap_gguf.vision.overlay import check_grid, dim_dropped, letterbox, place

_SIDE, _ACROSS, _MARGIN, _WORDS, _TITLE = 300, 5, 16, 54, 52
_FAINT = "#6b6b6b"


def sheet(
    pixels: Pixels,
    image: ImageEmbedding,
    rows: Sequence[tuple[IndexArray | Sequence[int] | None, str]],
    *,
    title: str = "",
) -> Image.Image:
    """Draw a picture once for each selection: kept patches clear, dropped ones dimmed, padding hatched.

    Args:
        pixels: what was encoded, uint8 (height, width, 3).
        image: its embedding.
        rows: numbers of the kept tokens (None: all of them), and the words under the picture. What follows a line break
            stands on the second line, fainter.
        title: of the whole.

    Returns:
        An RGB image of up to five panels in a line.

    Raises:
        UnsupportedError: matplotlib is not installed, or the place of the tokens in the picture is not known.
        ConfigError: no rows.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.plotting.sheet import sheet
        >>> from qap_gguf.vision.images import load_image
        >>> pixels = load_image(qap.packaged_model().sample)
        >>> with qap.VisionModel() as vlm:
        ...     image = vlm.encode(pixels)
        ...     kept = vlm.prune(image, qap.PruneConfig(n_keep=36)).indices
        >>> sheet(pixels, image, [(None, "all"), (kept, "K = 36")]).size
        (648, 422)
    """
    require_matplotlib()
    if not rows:
        raise ConfigError("rows: expected at least one selection, got none; pass some")
    check_grid(image)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(_ACROSS, len(rows))
    down = -(-len(rows) // across)
    height = round(_SIDE * image.grid[0] / image.grid[1])
    page = (
        across * (_SIDE + _MARGIN) + _MARGIN,
        _TITLE + down * (height + _WORDS) + _MARGIN,
    )
    figure = Figure(figsize=(page[0] / 72, page[1] / 72), dpi=72, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(
        _MARGIN / page[0], 1 - 34 / page[1], textwrap.shorten(title, 90), fontsize=20, weight="bold", parse_math=False
    )
    shown = letterbox(pixels, (_SIDE, height), place(image.content, image.grid, (_SIDE, height)))
    for number, (kept, words) in enumerate(rows):
        left = _MARGIN + (number % across) * (_SIDE + _MARGIN)
        top = _TITLE + (number // across) * (height + _WORDS)
        box = (left / page[0], 1 - (top + height) / page[1], _SIDE / page[0], height / page[1])
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.imshow(
            shown if kept is None else dim_dropped(shown, image.grid, kept, image.padding),
            aspect="auto",
            interpolation="nearest",
        )
        first, _, second = words.partition("\n")
        lines = textwrap.wrap(" ".join(first.split()), 34)
        room = 1 if second else 2
        if len(lines) > room:
            lines = [*lines[: room - 1], textwrap.shorten(" ".join(lines[room - 1 :]), 34, placeholder=" ...")]
        for line, (text, colour) in enumerate([*((text, "black") for text in lines), (second, _FAINT)]):
            at = (left / page[0], 1 - (top + height + 8 + 22 * line) / page[1])
            figure.text(*at, text, fontsize=15, color=colour, va="top", parse_math=False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
