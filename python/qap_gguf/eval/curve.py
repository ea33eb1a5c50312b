"""A plot of accuracy against K: one line for each method, one panel for each language model and KV cache type.

Matplotlib draws (extra ``plot``); it is imported only here, and only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qap_gguf.errors import ConfigError
from qap_gguf.eval.report import Evaluation
from qap_gguf.eval.stats import Summary
from qap_gguf.files.atomic import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart, and marks for those who print in grey.
_COLOURS: Final = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#44AA99",
    "#999933",
    "#8d8d8d",
    "#4b5fd6",
    "#7a3e10",
)
_MARKS: Final = "osD^vPX*<>ph"
_SPREAD: Final = 0.06  # in powers of two: lines stand beside each other, or their intervals could not be told apart
_INK, _GRID = "#1c1c1c", "#e4e4e4"


def _label(summary: Summary) -> str:
    return " ".join(part for part in (summary.setup.model, summary.setup.kv and f"KV {summary.setup.kv}") if part)


def _series(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Pruned summaries by the label of their method, by rising K."""
    found: dict[str, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda s: s.n_kept):
        if summary.variant.method != "dense":
            found.setdefault(summary.variant.label, []).append(summary)
    return found


def _draw(axes: Any, summaries: Sequence[Summary], styles: dict[str, tuple[str, str, float]]) -> None:
    for name, points in _series(summaries).items():
        colour, mark, shift = styles[name]
        x = [point.n_kept * 2**shift for point in points]
        y = [100 * point.accuracy.value for point in points]
        axes.plot(x, y, color=colour, marker=mark, markersize=4.5, linewidth=1.4, label=name)
        known = [
            (at, 100 * point.accuracy.low, 100 * point.accuracy.high)
            for at, point in zip(x, points, strict=True)
            if point.accuracy.low is not None and point.accuracy.high is not None
        ]
        if known:
            axes.vlines(*zip(*known, strict=True), color=colour, linewidth=1.0, alpha=0.6)
    for dense in (summary for summary in summaries if summary.variant.method == "dense"):
        value = 100 * dense.accuracy.value
        axes.axhline(value, color=_INK, linewidth=1.0, linestyle="--", label=f"dense ({dense.n_kept:.4g} tokens)")
        if dense.accuracy.low is not None and dense.accuracy.high is not None:
            axes.axhspan(100 * dense.accuracy.low, 100 * dense.accuracy.high, color=_INK, alpha=0.06, linewidth=0)
    ticks = sorted({round(summary.n_kept) for summary in summaries if summary.variant.method != "dense"})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(result: Evaluation, path: Path, title: str = "") -> None:
    """Write a plot of accuracy against K to `path` (png, pdf or svg), whole or not at all.

    Args:
        result: with at least one pruned variant.
        path: the picture; replaced where it is there.
        title: above the plot.

    Raises:
        ConfigError: nothing but dense was measured.
        UnsupportedError: matplotlib is not installed.
    """
    from qap_gguf.plotting.plot import require_matplotlib

    if all(summary.variant.method == "dense" for summary in result.summaries):
        raise ConfigError("a plot of accuracy against K needs a pruned method, got dense alone; add one")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Summary]] = {}
    for summary in result.summaries:
        panels.setdefault(_label(summary), []).append(summary)
    names = list(dict.fromkeys(name for summaries in panels.values() for name in _series(summaries)))
    middle = (len(names) - 1) / 2
    styles = {
        name: (_COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)], (i - middle) * _SPREAD / max(1.0, middle / 2))
        for i, name in enumerate(names)
    }
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.0 + 4.4 * columns, 0.9 + 3.4 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (label, summaries) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, summaries, styles)
        axes.set_title(label, fontsize=10, color=_INK)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("image tokens kept (K), logarithmic", fontsize=10)
    figure.supylabel("right answers, %, with 95 % intervals", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png")
