"""Tables of an evaluation: as Markdown for a README, as CSV, and as rows for any other renderer."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from qap_gguf.eval.interaction import Interaction
from qap_gguf.eval.stats import RESAMPLES, Accuracy, Difference, Summary

#: Baselines in the order of the columns; a column stands in a table where some row has it.
_VERSUS: Final = (
    "dense",
    "qap",
    "dpp",
    "semantic",
    "dpp-semantic",
    "coverage-semantic",
    "dpp-flat",
    "pool",
    "resize",
    "random",
)

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Evaluation:
    """Summaries and what they were made from.

    Attributes:
        summaries: one for each setup and variant.
        n_questions, n_pictures: what was asked about.
        seed: seed of the bootstrap.
        interactions: how gains depend on the setup; () where there is one.
    """

    summaries: Sequence[Summary]
    n_questions: int
    n_pictures: int
    seed: int = 0
    interactions: Sequence[Interaction] = ()

    @property
    def note(self) -> str:
        """How to read the intervals, in one sentence."""
        return (
            f"{self.n_questions} questions about {self.n_pictures} pictures. 95 % intervals: bootstrap over pictures "
            f"({RESAMPLES} resamples, seed {self.seed}), because the questions of one picture are not independent; "
            "differences are paired."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "n_questions": self.n_questions,
            "n_pictures": self.n_pictures,
            "interval": {"level": 0.95, "method": "bootstrap over pictures", "resamples": RESAMPLES, "seed": self.seed},
            "results": [summary.to_dict() for summary in self.summaries],
            "interactions": [interaction.to_dict() for interaction in self.interactions],
        }

    def main_table(self) -> Table:
        """Return (header, rows): one row for each setup and variant."""
        named = self._setup_names()
        versus = [name for name in _VERSUS if any(name in summary.versus for summary in self.summaries)]
        rows = [
            (*_names(summary, named), f"{summary.n_kept:.4g}", *_numbers(summary),
             *(_versus(summary.versus.get(name)) for name in versus), f"{summary.prefill_ms:.1f}")
            for summary in self.summaries
        ]  # fmt: skip
        columns = [f"vs {name}, points" for name in versus]
        return ("method", *named, "K", "tokens", "right", "accuracy %", "95 % interval", *columns, "prefill ms"), rows

    def kind_table(self) -> Table:
        """Return (header, rows): accuracy and counts of each setup and variant for each kind of question."""
        named = self._setup_names()
        kinds = list(self.summaries[0].by_kind) if self.summaries else []
        rows = [
            (*_names(summary, named), *(f"{_percent(a.value)} ({_count(a)})" for a in summary.by_kind.values()))
            for summary in self.summaries
        ]
        return ("method", *named, "K", *kinds), rows

    def yes_no_table(self) -> Table:
        """Return (header, rows): precision, recall and F1 of "yes", as POPE has them; no rows where none is asked."""
        named = self._setup_names()
        rows = [
            (*_names(s, named), str(s.yes_no.n),
             *(_percent(x) for x in (s.yes_no.precision, s.yes_no.recall, s.yes_no.f1, s.yes_no.said_yes)))
            for s in self.summaries
            if s.yes_no is not None
        ]  # fmt: skip
        return ("method", *named, "K", "questions", "precision %", "recall %", "F1 %", "said yes %"), rows

    def interaction_table(self) -> Table:
        """Return (header, rows): gains minus the same gains under the first setup; no rows where there is one setup."""
        named = self._setup_names()
        labels = list(dict.fromkeys(label for found in self.interactions for label in found.by_budget))
        rows = [
            (found.method, found.versus, *(getattr(found.setup, name) for name in named),
             *(_versus(found.by_budget.get(label)) for label in labels), _versus(found.mean))
            for found in self.interactions
        ]  # fmt: skip
        return ("method", "versus", *named, *(f"K = {label}" for label in labels), "mean"), rows

    @property
    def interaction_note(self) -> str:
        """What the table of interactions shows, in one sentence."""
        setup = self.interactions[0].reference
        named = " ".join(part for part in (setup.model, setup.kv and f"KV {setup.kv}") if part)
        return f"Points that a method gains over another, minus the points that it gains with {named}:"

    def csv(self) -> str:
        """Return the numbers behind the tables as CSV, one line for each setup and variant."""
        kinds = list(self.summaries[0].by_kind) if self.summaries else []
        flat = [_flat(summary, kinds) for summary in self.summaries]
        out = io.StringIO()
        writer = csv.DictWriter(out, list(flat[0]) if flat else ["model"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue()

    def _setup_names(self) -> tuple[str, ...]:
        """Columns that tell setups apart: those that hold more than one thing."""
        setups = {summary.setup for summary in self.summaries}
        return tuple(name for name in ("model", "kv") if len({getattr(setup, name) for setup in setups}) > 1)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _count(accuracy: Accuracy) -> str:
    """Right of all; one digit after the point where repetitions were averaged."""
    n_right = accuracy.n_right
    shown = f"{n_right:.0f}" if abs(n_right - round(n_right)) < 1e-6 else f"{n_right:.1f}"
    return f"{shown}/{accuracy.n_total}"


def _range(low: float | None, high: float | None, sign: str = "") -> str:
    if low is None or high is None:
        return "- (one picture)"
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _names(summary: Summary, setup_names: Sequence[str]) -> tuple[str, ...]:
    budget = summary.variant.budget
    setup = (getattr(summary.setup, name) for name in setup_names)
    return summary.variant.label, *setup, "all" if budget is None else budget.label


def _numbers(summary: Summary) -> tuple[str, ...]:
    accuracy = summary.accuracy
    return _count(accuracy), _percent(accuracy.value), _range(accuracy.low, accuracy.high)


def _versus(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    value, low, high = difference
    return f"{100 * value:+.1f}" if low is None else f"{100 * value:+.1f} ({_range(low, high, '+')})"


def _flat(summary: Summary, kinds: Sequence[str]) -> dict[str, Any]:
    plain = summary.to_dict()
    row = {name: plain[name] for name in ("model", "kv", "method", "settings", "n_keep", "keep_ratio", "n_kept")}
    row |= {name: plain[name] for name in ("n_right", "n_total", "accuracy", "low", "high")}
    for name in _VERSUS:
        value, low, high = summary.versus.get(name, (None, None, None))
        row |= {f"vs_{name}": value, f"vs_{name}_low": low, f"vs_{name}_high": high}
    row |= {f"accuracy_{kind}": summary.by_kind[kind].value for kind in kinds}
    return row | {"prefill_ms": summary.prefill_ms}


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
