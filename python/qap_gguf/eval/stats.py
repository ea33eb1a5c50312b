"""From outcomes to accuracies with intervals.

The questions of one picture are not independent: the same kept tokens answer all of them. So the 95 % interval comes
from a bootstrap over pictures (Efron 1979; percentile method), not over questions. Differences are paired: both methods
are taken from the same resampled pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qap_gguf.eval.methods import BASELINES, Budget, Variant
from qap_gguf.eval.runner import Outcome, Setup
from qap_gguf.eval.scoring import yes_or_no

RESAMPLES: Final = 2000

#: (value, low, high); None where there is a single picture.
Difference = tuple[float, float | None, float | None]
#: (right answers, questions), both of shape (n_pictures,).
Tally = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]
Curve = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Accuracy:
    """Right answers of all questions; ``n_right`` has a fraction where repetitions were averaged or answers are soft.

    Attributes:
        n_right: right answers, 0..n_total.
        n_total: questions.
        low, high: 95 % interval of the accuracy in [0, 1]; None where there is a single picture.
    """

    n_right: float
    n_total: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float:
        """The accuracy in [0, 1]."""
        return self.n_right / self.n_total

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "accuracy": self.value,
            "n_right": self.n_right,
            "n_total": self.n_total,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True)
class YesNo:
    """How well "yes" is told from "no", as POPE reports it; each in [0, 1], 0 where nothing is to divide by.

    Attributes:
        n: questions whose right answer is yes or no.
        precision: right among the answers "yes".
        recall: found among the questions whose answer is yes.
        said_yes: part of the answers that was "yes".
    """

    n: int
    precision: float
    recall: float
    said_yes: float

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "n": self.n,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "said_yes": self.said_yes,
        }


@dataclass(frozen=True)
class Summary:
    """One variant's results under one setup.

    Attributes:
        variant: what was measured.
        setup: with which language model and KV cache.
        n_kept: image tokens that the language model read, mean over the questions.
        accuracy: of all questions.
        by_kind: of each kind of question, in alphabetical order.
        versus: accuracy minus that of a baseline of the same setup and budget ("dense" too), and its 95 % interval.
        prefill_ms: median time of the prefill in ms.
        yes_no: of the questions whose answer is yes or no; None where there are none.
    """

    variant: Variant
    setup: Setup
    n_kept: float
    accuracy: Accuracy
    by_kind: dict[str, Accuracy]
    versus: Mapping[str, Difference]
    prefill_ms: float
    yes_no: YesNo | None

    @property
    def difference(self) -> Difference | None:
        """The difference to dense; None for dense itself and where dense was not measured."""
        return self.versus.get("dense")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        budget = self.variant.budget
        names = ("value", "low", "high")
        return {
            "model": self.setup.model,
            "kv": self.setup.kv,
            "method": self.variant.method,
            "settings": self.variant.settings,
            "n_keep": None if budget is None else budget.n_keep,
            "keep_ratio": None if budget is None else budget.keep_ratio,
            "n_kept": self.n_kept,
            **self.accuracy.to_dict(),
            "by_kind": {kind: accuracy.to_dict() for kind, accuracy in self.by_kind.items()},
            "versus": {name: dict(zip(names, numbers, strict=True)) for name, numbers in self.versus.items()},
            "yes_no": None if self.yes_no is None else self.yes_no.to_dict(),
            "prefill_ms": self.prefill_ms,
            "configs": [None if config is None else config.to_dict() for config in self.variant.configs],
        }


def bootstrap_weights(n_pictures: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray[Any, Any]:
    """Return how often each picture is drawn in each resample: int64, shape (resamples, n_pictures).

    Example:
        >>> bootstrap_weights(5).sum(axis=1).tolist() == [5] * 2000
        True
    """
    rng = np.random.default_rng(seed)
    return np.asarray(rng.multinomial(n_pictures, np.full(n_pictures, 1 / n_pictures), size=resamples))


def _interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
    return float(low), float(high)


def _resampled(right: np.ndarray[Any, Any], total: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> Any:
    """Accuracy in each resample; NaN where none of the drawn pictures has such a question."""
    with np.errstate(invalid="ignore"):
        return (weights @ right) / (weights @ total)


def _accuracy(right: np.ndarray[Any, Any], total: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> Accuracy:
    low = high = None
    if int(np.count_nonzero(total)) > 1:
        low, high = _interval(_resampled(right, total, weights))
    return Accuracy(float(right.sum()), int(total.sum()), low, high)


def _yes_no(rows: Sequence[Outcome]) -> YesNo | None:
    """Over all repetitions of the questions that have one answer, yes or no."""
    pairs = [
        (yes_or_no(said), yes_or_no(row.question.answer))
        for row in rows
        if row.question.answer.strip().lower() in ("yes", "no") and not row.question.answers
        for said in row.said
    ]
    if not pairs:
        return None
    both = sum(said == right == "yes" for said, right in pairs)
    said_yes, are_yes = sum(said == "yes" for said, _ in pairs), sum(right == "yes" for _, right in pairs)
    n = len(pairs) // len(rows[0].said)
    return YesNo(n, both / said_yes if said_yes else 0.0, both / are_yes if are_yes else 0.0, said_yes / len(pairs))


class Tallies:
    """Right answers and questions for each picture, of each variant and setup, and what resampling makes of them."""

    def __init__(self, outcomes: Sequence[Outcome], seed: int, resamples: int) -> None:
        pictures = dict.fromkeys(outcome.question.image for outcome in outcomes)
        self._pictures = {image: i for i, image in enumerate(pictures)}
        self.weights = bootstrap_weights(len(pictures), seed, resamples)

    def tally(self, rows: Sequence[Outcome]) -> Tally:
        """(right, questions), both of shape (n_pictures,)."""
        right, total = np.zeros(len(self._pictures)), np.zeros(len(self._pictures))
        for row in rows:
            right[self._pictures[row.question.image]] += row.share_right
            total[self._pictures[row.question.image]] += 1
        return right, total

    def curve(self, tally: Tally) -> Curve:
        """The accuracy, and after it that of each resample: float64, shape (1 + resamples,)."""
        return np.append(tally[0].sum() / tally[1].sum(), _resampled(*tally, self.weights))

    def interval(self, curve: Curve) -> Difference:
        """(value, low, high) of what was computed from curves."""
        if len(self._pictures) < 2:
            return (float(curve[0]), None, None)
        return (float(curve[0]), *_interval(curve[1:]))

    def difference(self, mine: Tally, theirs: Tally) -> Difference:
        """Accuracy of `mine` minus that of `theirs`, and the interval, from the same resampled pictures."""
        return self.interval(self.curve(mine) - self.curve(theirs))


def summarise(outcomes: Sequence[Outcome], seed: int = 0, resamples: int = RESAMPLES) -> list[Summary]:
    """Summarise the outcomes of :func:`qap_gguf.eval.evaluate`, one summary for each setup and variant, in their order.

    Args:
        outcomes: at least one.
        seed: seed of the bootstrap.
        resamples: resampled sets of pictures, at least 1.
    """
    tallies = Tallies(outcomes, seed, resamples)
    kinds = sorted({outcome.question.kind for outcome in outcomes})
    rows_of: dict[tuple[Setup, Variant], list[Outcome]] = {}
    for outcome in outcomes:
        rows_of.setdefault((outcome.setup, outcome.variant), []).append(outcome)
    tally_of = {key: tallies.tally(rows) for key, rows in rows_of.items()}
    named: dict[tuple[Setup, str, Budget | None], Tally] = {}
    for (setup, variant), tally in tally_of.items():
        named.setdefault((setup, variant.method, variant.budget), tally)

    summaries = []
    for (setup, variant), rows in rows_of.items():
        tally = tally_of[setup, variant]
        against = {"dense": named.get((setup, "dense", None))} if variant.method != "dense" else {}
        against |= {name: named.get((setup, name, variant.budget)) for name in BASELINES.get(variant.method, ())}
        versus = {name: tallies.difference(tally, other) for name, other in against.items() if other is not None}
        by_kind = {
            kind: _accuracy(*tallies.tally([row for row in rows if row.question.kind == kind]), tallies.weights)
            for kind in kinds
        }
        n_kept = float(np.mean([row.n_kept for row in rows]))
        prefill = 1000 * float(np.median([second for row in rows for second in row.prefill_s]))
        accuracy = _accuracy(*tally, tallies.weights)
        summaries.append(Summary(variant, setup, n_kept, accuracy, by_kind, versus, prefill, _yes_no(rows)))
    return summaries
