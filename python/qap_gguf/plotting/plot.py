"""A picture of what was kept, and why: the image with the dropped patches dimmed, beside maps of the scores.

The scores are those of docs/method.md; where a patch lies in the picture is in overlay.py. Matplotlib draws (extra
``plot``); it is imported only when something is drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from qap_gguf.arguments import FloatArray, IndexArray
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ArrayError, ConfigError, ImageError, UnsupportedError
from qap_gguf.pruning.score import Scores
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.images import ImageSource, Pixels, load_image
from qap_gguf.vision.overlay import Box, check_grid, dim_dropped, edges, kept_map, letterbox, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_WIDTH, MAX_WIDTH = 800, 8000
_COLOUR_MAP = "viridis"  # even in lightness, and safe for colour-blind readers
_EARLY_TITLE = "Total S (dot kept, grey dropped early)"
_OUTLINE, _INK, _FAINT = "#ffe9a8", "#1c1c1c", "#6b6b6b"

# Lengths in pixels of a page that is 1600 wide; other widths scale them.
_PAGE, _MARGIN, _GAP, _HEADER, _TITLE, _TICKS = 1600, 36, 40, 106, 36, 28
_BAR_GAP, _BAR, _BAR_LABELS = 8, 14, 58


def require_matplotlib() -> None:
    """Check that pictures can be drawn, before anything slow happens.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib.style  # noqa: F401
    except ImportError as err:
        raise UnsupportedError(
            "plot: expected matplotlib, which cannot be imported; run pip install matplotlib"
        ) from err


def plot(
    picture: ImageSource,
    image: ImageEmbedding,
    scores: Scores,
    indices: IndexArray | Sequence[int],
    *,
    cfg: PruneConfig | None = None,
    title: str | None = None,
    width: int = 1600,
) -> Image.Image:
    """Draw what was kept, and why: the picture with dropped patches dimmed, beside maps of the scores.

    The picture is shown as the encoder sees it: scaled and padded to the patch grid. Each map has a scale of its own.
    What the encoder dropped early is darkest in the picture and grey in the maps.

    Args:
        picture: what was encoded: a path, the bytes of an image file, a Pillow image, or a uint8 array (h, w, 3).
        image: from ``VisionModel.encode``.
        scores: from ``VisionModel.prune(...).scores`` or ``VisionModel.score``.
        indices: numbers of the kept tokens, (k,).
        cfg: the settings that gave them, for the header and the titles; None leaves those words out.
        title: of the picture, such as its file's name; it stands before how many are kept, up to 40 characters of it.
        width: of the result in pixels, 800..8000; the height follows from the grid.

    Returns:
        An RGB image.

    Raises:
        UnsupportedError: matplotlib is not installed, or the place of the tokens in the picture is not known.
        ArrayError: scores or indices that do not belong to `image`.
        ImageError: another picture than the one that was encoded.
        ConfigError: a `width` outside its range.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.plotting.plot import plot
        >>> sample, cfg = qap.packaged_model().sample, qap.PruneConfig(n_keep=36)
        >>> with qap.VisionModel() as vlm:
        ...     image = vlm.encode(sample)
        ...     cut = vlm.prune(image, cfg)
        >>> plot(sample, image, cut.scores, cut.indices, cfg=cfg).size[0]
        1600
    """
    require_matplotlib()
    if isinstance(width, bool) or not isinstance(width, int) or not MIN_WIDTH <= width <= MAX_WIDTH:
        raise ConfigError(f"width: expected {MIN_WIDTH}..{MAX_WIDTH} pixels, got {width!r}; choose one in that range")
    check_grid(image)
    chosen = _check_indices(indices, image.n_tokens)
    for name in ("error", "outlier", "semantic", "total"):
        shape = getattr(scores, name).shape
        if shape != (image.n_tokens,):
            raise ArrayError(f"scores.{name}: expected ({image.n_tokens},), got {shape}; pass the scores of this image")
    pixels = load_image(picture)
    if (pixels.shape[1], pixels.shape[0]) != tuple(image.size):
        raise ImageError(
            f"picture: expected the one that was encoded, {image.size[0]} x {image.size[1]} pixels, "
            f"got {pixels.shape[1]} x {pixels.shape[0]}; pass that one"
        )
    return _draw(pixels, image, scores, chosen, cfg, title, width)


def _check_indices(indices: IndexArray | Sequence[int], n_tokens: int) -> IndexArray:
    found = np.asarray(indices)
    if found.ndim != 1 or found.size == 0 or not np.issubdtype(found.dtype, np.integer):
        raise ArrayError(
            f"indices: expected integers of shape (k,), got {found.dtype} {found.shape}; pass the kept ones"
        )
    if found.min() < 0 or found.max() >= n_tokens or len(np.unique(found)) != found.size:
        raise ArrayError(f"indices: expected each of 0..{n_tokens - 1} at most once, got others; pass the kept ones")
    return found.astype(np.int32)


def _headline(n_kept: int, n_tokens: int, scores: Scores, cfg: PruneConfig | None) -> tuple[str, str]:
    """How many are kept, and by which method."""
    words = [f"K = {n_kept}", f"alpha = {scores.alpha:.3g}"]
    if cfg is not None:
        words[1] += " (dynamic)" if cfg.alpha == "dynamic" else ""
        words.insert(1, f"select = {cfg.select}")
        words += [f"error = {cfg.error} in groups of {cfg.group_size}", f"outlier = {cfg.outlier}"]
        words.append(f"semantic = {cfg.semantic}")
    return f"{n_kept} of {n_tokens} image tokens kept ({100 * n_kept / n_tokens:.1f} %)", "   ".join(words)


def _shorten(title: str | None) -> str:
    """A title of at most 40 characters in one line, and a colon; a file name may hold anything."""
    words = " ".join((title or "").encode("utf-8", "replace").decode().split())
    return f"{words if len(words) <= 40 else words[:37] + '...'}: " if words else ""


class _Page:
    """A matplotlib figure on which everything is placed in pixels, from the top left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height, self.unit = width, height, width / _PAGE
        # 72 dots per inch: a font size is a number of pixels
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="white")
        self.canvas: Any = FigureCanvasAgg(self.figure)

    def axes(self, box: Box) -> Axes:
        left, bottom = box.left / self.width, 1 - (box.top + box.height) / self.height
        return self.figure.add_axes((left, bottom, box.width / self.width, box.height / self.height))

    def text(self, left: float, top: float, words: str, size: float, **style: Any) -> None:
        """Words with their baseline at `top`; `size` is that of a page of 1600 pixels."""
        self.figure.text(
            left / self.width, 1 - top / self.height, words, fontsize=size * self.unit, parse_math=False, **style
        )

    def image(self) -> Image.Image:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a title in a script that the font lacks: boxes will do
            self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def _draw(
    pixels: Pixels,
    image: ImageEmbedding,
    scores: Scores,
    indices: IndexArray,
    cfg: PruneConfig | None,
    title: str | None,
    width: int,
) -> Image.Image:
    import matplotlib.style

    rows, columns = image.grid
    unit, shape = width / _PAGE, rows / columns
    # Two maps and their titles are as high as the picture, and everything is as wide as the page.
    between = (_TITLE + 22) * unit
    room = width - (2 * _MARGIN + _TICKS + 2 * _GAP + 2 * (_BAR_GAP + _BAR + _BAR_LABELS) - 24) * unit
    map_width = max((room - between / shape) / 4, 0.1 * width)
    # whole pixels for a patch: edges stay sharp; a tall grid must not become an endless page
    patch = max(1, min(int((room - 2 * map_width) / columns), int(0.75 * width / rows)))
    canvas = (patch * columns, patch * rows)
    map_width = min(map_width, max((canvas[0] - between / shape) / 2, 0.1 * width))
    map_height = map_width * shape
    top = round((_HEADER + _TITLE) * unit)
    block = max(canvas[1], round(2 * map_height + between))
    page_height = top + block + round((_TICKS + _MARGIN - 8) * unit)

    with matplotlib.style.context("default"):  # a user's own style would break the layout
        page = _Page(width, page_height)
        left = round((_MARGIN + _TICKS) * unit)
        headline, method = _headline(len(indices), image.n_real, scores, cfg)
        page.text(_MARGIN * unit, 50 * unit, _shorten(title) + headline, 30, weight="bold", color=_INK)
        page.text(_MARGIN * unit, 84 * unit, method, 18.5, color=_FAINT)
        _draw_picture(page, Box(left, top, *canvas), pixels, image, indices)
        first = left + canvas[0] + round(_GAP * unit)
        step = round(map_width + (_BAR_GAP + _BAR + _BAR_LABELS + _GAP - 24) * unit)
        for number, (name, values) in enumerate(_panels(scores, cfg)):
            box = Box(
                first + step * (number % 2),
                top + round((map_height + between) * (number // 2)),
                round(map_width),
                round(map_height),
            )
            marked = indices if number == 3 else None
            unscored = image.padding | image.dropped
            shown = None if values is None else np.where(unscored, np.nan, values).reshape(image.grid)
            _draw_map(page, box, name, shown, marked)
        return page.image()


def _panels(scores: Scores, cfg: PruneConfig | None) -> list[tuple[str, FloatArray | None]]:
    """Title and values of each map; None where there is no signal."""
    semantic = scores.semantic if scores.semantic.any() else None
    return [
        ("Quantization error E" if cfg is None else f"Quantization error E, {cfg.error}", scores.error),
        ("Outlier magnitude R" if cfg is None else f"Outlier magnitude R, {cfg.outlier}", scores.outlier),
        ("Semantic relevance P", semantic),
        ("Total score S (dot = kept)" if scores.dropped is None else _EARLY_TITLE, scores.total),
    ]


def _draw_picture(page: _Page, box: Box, pixels: Pixels, image: ImageEmbedding, indices: IndexArray) -> None:
    from matplotlib.collections import LineCollection

    grid = image.grid
    content = place(image.content, grid, (box.width, box.height))
    canvas = letterbox(pixels, (box.width, box.height), content)
    padded = content.width < box.width or content.height < box.height
    hatched = ", padding hatched" if image.padding.any() else " (picture padded)" if padded else ""
    early = " (darkest: inside the encoder)" if image.dropped.any() else ""
    words = f"Kept patches clear, dropped dimmed{early}{hatched}"
    page.text(box.left, box.top - 12 * page.unit, words, 19, color=_INK)
    axes = page.axes(box)
    axes.imshow(
        dim_dropped(canvas, grid, indices, image.padding, image.dropped),
        extent=(0, grid[1], grid[0], 0),
        aspect="auto",
        interpolation="nearest",
    )
    for colour, line in (("black", 4.0), (_OUTLINE, 2.0)):  # light with a dark rim: seen on any background
        # no antialiasing: lines that overlap at their ends would leave brighter spots there
        lines = LineCollection(
            edges(kept_map(grid, indices)), colors=colour, linewidths=line * page.unit, antialiaseds=False
        )
        lines.set_capstyle("projecting")
        lines.set_clip_on(False)
        axes.add_collection(lines, autolim=False)
    every = next(n for n in (1, 2, 4, 5, 10, 20, 50, 100, 10**6) if max(grid) / n <= 14)
    for axis, count in ((axes.xaxis, grid[1]), (axes.yaxis, grid[0])):
        axis.set_ticks(
            [i + 0.5 for i in range(0, count, every)], [str(i + 1) for i in range(0, count, every)]
        )  # from 1, as people ask
    axes.tick_params(length=0, pad=5 * page.unit, labelsize=14 * page.unit, labelcolor=_FAINT)
    axes.spines[:].set_visible(False)


def _draw_map(page: _Page, box: Box, name: str, values: FloatArray | None, marked: IndexArray | None) -> None:
    from matplotlib.ticker import MaxNLocator

    page.text(box.left, box.top - 12 * page.unit, name, 19, color=_INK)
    axes = page.axes(box)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#999999")
    axes.spines[:].set_linewidth(0.8 * page.unit)
    axes.set_facecolor("#efefef")  # seen where there is no signal, and where tokens are padding
    if values is None:
        axes.text(
            0.5, 0.5, "no signal", transform=axes.transAxes, ha="center", va="center", color=_FAINT,
            fontsize=22 * page.unit,
        )  # fmt: skip
        return
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    flat = low == high
    # a constant gets the middle of the map, and a scale with its one number
    limits = (low - 1, low + 1) if flat else (low, high)
    shown = axes.imshow(
        values, cmap=_COLOUR_MAP, vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="auto"
    )
    bar = page.axes(
        Box(box.left + box.width + round(_BAR_GAP * page.unit), box.top, round(_BAR * page.unit), box.height)
    )
    ticks = [low] if flat else MaxNLocator(max(1, min(5, int(box.height / (45 * page.unit)))))
    scale: Any = page.figure.colorbar(shown, cax=bar, ticks=ticks, format="%.4g")
    scale.outline.set_linewidth(0.8 * page.unit)
    bar.tick_params(labelsize=15 * page.unit, labelcolor=_INK, length=4 * page.unit, pad=4 * page.unit)
    if marked is not None:
        size = max(2.0, 0.3 * min(box.width / values.shape[1], box.height / values.shape[0]))
        axes.plot(
            marked % values.shape[1], marked // values.shape[1], "o", markersize=size, markerfacecolor="white",
            markeredgecolor="black", markeredgewidth=max(0.6, size / 6), linestyle="none",
        )  # fmt: skip
