"""From outcomes to accuracies with intervals.

The questions of one picture are not independent: the same kept tokens answer all of them. So the 95 % interval comes
from a bootstrap over pictures (Efron 1979; percentile method), not over questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qap_gguf.eval.methods import Variant

if TYPE_CHECKING:
    from qap_gguf.eval.runner import Outcome

RESAMPLES: Final = 2000


@dataclass(frozen=True)
class Accuracy:
    """Right answers of all questions; ``n_right`` has a fraction where repetitions were averaged.

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
class Summary:
    """One variant's results.

    Attributes:
        variant: what was measured.
        n_kept: image tokens that the language model read, mean over the questions.
        accuracy: of all questions.
        by_kind: of each kind of question, in alphabetical order.
        difference: accuracy minus that of dense, and its 95 % interval, from the same resampled pictures; None for
            dense itself and where dense was not measured.
        prefill_ms: median time of the prefill in ms.
    """

    variant: Variant
    n_kept: float
    accuracy: Accuracy
    by_kind: dict[str, Accuracy]
    difference: tuple[float, float | None, float | None] | None
    prefill_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        budget = self.variant.budget
        names = ("value", "low", "high")
        return {
            "method": self.variant.method,
            "n_keep": None if budget is None else budget.n_keep,
            "keep_ratio": None if budget is None else budget.keep_ratio,
            "n_kept": self.n_kept,
            **self.accuracy.to_dict(),
            "by_kind": {kind: accuracy.to_dict() for kind, accuracy in self.by_kind.items()},
            "difference_to_dense": None if self.difference is None else dict(zip(names, self.difference, strict=True)),
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


def summarise(outcomes: Sequence[Outcome], seed: int = 0, resamples: int = RESAMPLES) -> list[Summary]:
    """Summarise the outcomes of :func:`qap_gguf.eval.evaluate`, one summary for each variant, in their order.

    Args:
        outcomes: at least one.
        seed: seed of the bootstrap.
        resamples: resampled sets of pictures, at least 1.
    """
    pictures = {image: i for i, image in enumerate(dict.fromkeys(outcome.question.image for outcome in outcomes))}
    kinds = sorted({outcome.question.kind for outcome in outcomes})
    weights = bootstrap_weights(len(pictures), seed, resamples)

    def tally(rows: Sequence[Outcome]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Right answers and questions for each picture, both of shape (n_pictures,)."""
        right, total = np.zeros(len(pictures)), np.zeros(len(pictures))
        for row in rows:
            right[pictures[row.question.image]] += row.share_right
            total[pictures[row.question.image]] += 1
        return right, total

    by_variant: dict[Variant, list[Outcome]] = {}
    for outcome in outcomes:
        by_variant.setdefault(outcome.variant, []).append(outcome)
    dense = next((tally(rows) for variant, rows in by_variant.items() if variant.method == "dense"), None)

    summaries = []
    for variant, rows in by_variant.items():
        right, total = tally(rows)
        accuracy = _accuracy(right, total, weights)
        difference: tuple[float, float | None, float | None] | None = None
        if dense is not None and variant.method != "dense":
            gain = accuracy.value - float(dense[0].sum() / dense[1].sum())
            if accuracy.low is None:
                difference = (gain, None, None)
            else:
                difference = (gain, *_interval(_resampled(right, total, weights) - _resampled(*dense, weights)))
        by_kind = {
            kind: _accuracy(*tally([row for row in rows if row.question.kind == kind]), weights) for kind in kinds
        }
        n_kept = float(np.mean([row.n_kept for row in rows]))
        prefill = 1000 * float(np.median([second for row in rows for second in row.prefill_s]))
        summaries.append(Summary(variant, n_kept, accuracy, by_kind, difference, prefill))
    return summaries
