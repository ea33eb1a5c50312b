"""Does what one method gains over another depend on how the language model is quantized?

A gain on a quantized model says little by itself: the same gain may be there without quantization. So each gain is
compared with the same gain under a reference setup: a difference of differences, with a paired bootstrap interval (the
same resampled pictures for all four accuracies). The mean over the budgets is more certain than any one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qap_gguf.eval.methods import BASELINES, Budget
from qap_gguf.eval.runner import Outcome, Setup
from qap_gguf.eval.stats import RESAMPLES, Difference, Tallies

#: What gains are taken over; random is left out, for whether a score beats chance is another question.
_OVER: Final = ("dense", "qap", "semantic", "dpp-semantic", "dpp-flat")


@dataclass(frozen=True)
class Interaction:
    """How much more one method gains over another under a setup than under the reference.

    Attributes:
        method: label of the method, with its settings.
        versus: the other method, at the same budget.
        setup: the setup that is looked at.
        reference: the setup that it is compared with.
        by_budget: label of a budget -> gain here minus gain under the reference, and its 95 % interval.
        mean: the same for the mean gain over those budgets.
    """

    method: str
    versus: str
    setup: Setup
    reference: Setup
    by_budget: Mapping[str, Difference]
    mean: Difference

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        names = ("value", "low", "high")
        return {
            "method": self.method,
            "versus": self.versus,
            "model": self.setup.model,
            "kv": self.setup.kv,
            "reference": {"model": self.reference.model, "kv": self.reference.kv},
            "by_budget": {label: dict(zip(names, found, strict=True)) for label, found in self.by_budget.items()},
            "mean": dict(zip(names, self.mean, strict=True)),
        }


def interactions(outcomes: Sequence[Outcome], seed: int = 0, resamples: int = RESAMPLES) -> list[Interaction]:
    """Compare the gains of every setup with those of the first, the reference.

    Args:
        outcomes: what :func:`qap_gguf.eval.summarise` summarises; [] comes back where they have one setup.
        seed: seed of the bootstrap.
        resamples: resampled sets of pictures, at least 1.
    """
    setups = list(dict.fromkeys(outcome.setup for outcome in outcomes))
    if len(setups) < 2:
        return []
    tallies = Tallies(outcomes, seed, resamples)
    rows: dict[tuple[Setup, str, Budget | None], list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.setup, outcome.variant.label, outcome.variant.budget), []).append(outcome)
    curves = {key: tallies.curve(tallies.tally(found)) for key, found in rows.items()}
    methods = {outcome.variant.label: outcome.variant.method for outcome in outcomes if outcome.variant.budget}
    found = []
    for setup in setups[1:]:
        for label, method in methods.items():
            budgets = [budget for where, name, budget in curves if where == setup and name == label]
            for versus in (name for name in _OVER if name == "dense" or name in BASELINES.get(method, ())):
                grown = {}
                for budget in budgets:
                    other = None if versus == "dense" else budget
                    four = [(setup, label, budget), (setup, versus, other),
                            (setups[0], label, budget), (setups[0], versus, other)]  # fmt: skip
                    if budget is not None and all(key in curves for key in four):
                        here, there, before, beyond = (curves[key] for key in four)
                        grown[budget.label] = (here - there) - (before - beyond)
                if grown:
                    by_budget = {name: tallies.interval(curve) for name, curve in grown.items()}
                    mean = tallies.interval(sum(grown.values()) / len(grown))
                    found.append(Interaction(label, versus, setup, setups[0], by_budget, mean))
    return found
