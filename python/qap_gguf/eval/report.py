"""Tables of an evaluation: as Markdown for a README, and as rows for any other renderer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from qap_gguf.eval.stats import RESAMPLES, Accuracy, Summary

_HEADER: Final = ("method", "K", "tokens", "right", "accuracy %", "95 % interval", "vs dense, points", "prefill ms")

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Evaluation:
    """Summaries and what they were made from.

    Attributes:
        summaries: one for each variant.
        n_questions, n_pictures: what was asked about.
        seed: seed of the bootstrap.
    """

    summaries: Sequence[Summary]
    n_questions: int
    n_pictures: int
    seed: int = 0

    @property
    def note(self) -> str:
        """How to read the intervals, in one sentence."""
        return (
            f"{self.n_questions} questions about {self.n_pictures} pictures. 95 % intervals: bootstrap over pictures "
            f"({RESAMPLES} resamples, seed {self.seed}), because the questions of one picture are not independent."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "n_questions": self.n_questions,
            "n_pictures": self.n_pictures,
            "interval": {"level": 0.95, "method": "bootstrap over pictures", "resamples": RESAMPLES, "seed": self.seed},
            "results": [summary.to_dict() for summary in self.summaries],
        }

    def main_table(self) -> Table:
        """Return (header, rows): one row for each variant."""
        return _HEADER, [_row(summary) for summary in self.summaries]

    def kind_table(self) -> Table:
        """Return (header, rows): accuracy and counts of each variant for each kind of question."""
        kinds = list(self.summaries[0].by_kind) if self.summaries else []
        rows = [
            (*_names(summary), *(f"{_percent(a.value)} ({_count(a)})" for a in summary.by_kind.values()))
            for summary in self.summaries
        ]
        return ("method", "K", *kinds), rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _count(accuracy: Accuracy) -> str:
    """Right of all; one digit behind the point where repetitions were averaged."""
    n_right = accuracy.n_right
    shown = f"{n_right:.0f}" if abs(n_right - round(n_right)) < 1e-6 else f"{n_right:.1f}"
    return f"{shown}/{accuracy.n_total}"


def _range(low: float | None, high: float | None, sign: str = "") -> str:
    if low is None or high is None:
        return "- (one picture)"
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _names(summary: Summary) -> tuple[str, str]:
    budget = summary.variant.budget
    return summary.variant.method, "all" if budget is None else budget.label


def _row(summary: Summary) -> tuple[str, ...]:
    accuracy = summary.accuracy
    versus = "-"
    if summary.difference is not None:
        value, low, high = summary.difference
        versus = f"{100 * value:+.1f}" if low is None else f"{100 * value:+.1f} ({_range(low, high, '+')})"
    return (
        *_names(summary),
        f"{summary.n_kept:.4g}",
        _count(accuracy),
        _percent(accuracy.value),
        _range(accuracy.low, accuracy.high),
        versus,
        f"{summary.prefill_ms:.1f}",
    )


def markdown(table: Table) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right.

    Example:
        >>> print(markdown((("method", "K"), [("qap", "18")])))
        | method |  K |
        |:-------|---:|
        | qap    | 18 |
    """
    header, rows = table
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]
    widths[1:] = [max(2, *(len(row[i]) for row in (header, *rows))) for i in range(1, len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|:" + "-" * (widths[0] + 1) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:])
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
