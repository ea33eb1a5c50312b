"""What an evaluation compares: a method at a budget becomes one config for each repetition.

The baselines are those of docs/design.md, section 6: random and uniform stand in every table, because random selection
beats many published methods on LLaVA-1.5 (UniPruneBench).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError

#: Method -> what it means, in the order of the tables.
METHODS: Final[Mapping[str, str]] = {
    "dense": "every token",
    "qap": "semantic score and sensitivity to quantization, fused",
    "dpp": "the same score, as the relevance of a determinantal point process",
    "semantic": "semantic score alone (alpha 1)",
    "numeric": "sensitivity to quantization alone (alpha 0)",
    "divprune": "diversity alone, without scores",
    "random": "random tokens, mean of 3 seeds",
    "uniform": "tokens at an even stride",
}
RANDOM_REPETITIONS: Final = 3


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep: ``n_keep``, or ``keep_ratio`` of them. One of the two is given.

    Example:
        >>> Budget(n_keep=18).label, Budget(keep_ratio=0.125).label
        ('18', '12.5 %')
    """

    n_keep: int | None = None
    keep_ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.n_keep is None) == (self.keep_ratio is None):
            raise ConfigError("a budget is either n_keep or keep_ratio, got both or none; give one of them")

    @property
    def label(self) -> str:
        """The budget in words."""
        return str(self.n_keep) if self.keep_ratio is None else f"{100 * self.keep_ratio:g} %"

    def apply(self, base: PruneConfig, **changes: Any) -> PruneConfig:
        """Return `base` with this budget and other changes."""
        return base.replace(n_keep=self.n_keep, keep_ratio=self.keep_ratio, **changes)


@dataclass(frozen=True)
class Variant:
    """One row of the table: a method at a budget.

    Attributes:
        method: a key of ``METHODS``.
        budget: how many tokens; None for dense.
        configs: one config for each repetition, whose results are averaged; (None,) for dense.
    """

    method: str
    budget: Budget | None
    configs: tuple[PruneConfig | None, ...]

    @property
    def needs_attention(self) -> bool:
        """Whether the variant means nothing on a model without class-token attention."""
        return any(config is not None and config.semantic == "cls" for config in self.configs)


def _configs(method: str, budget: Budget, base: PruneConfig) -> tuple[PruneConfig, ...]:
    if method == "qap":
        return (budget.apply(base, select="topk"),)
    if method == "semantic":
        # Not "auto": on a model without attention that would keep the first K tokens and call it semantic.
        return (budget.apply(base, select="topk", alpha=1.0, semantic="cls"),)
    if method == "numeric":
        return (budget.apply(base, select="topk", alpha=0.0, semantic="none"),)
    if method in ("dpp", "divprune", "uniform"):
        return (budget.apply(base, select=method),)
    seeds = [(base.seed + i) % 2**64 for i in range(RANDOM_REPETITIONS)]
    return tuple(budget.apply(base, select="random", seed=seed) for seed in seeds)


def variants(methods: Iterable[str], budgets: Sequence[Budget], base: PruneConfig | None = None) -> list[Variant]:
    """List what to compare: dense once, every other method at each budget.

    Args:
        methods: keys of ``METHODS``; repetitions count once.
        budgets: at least one, unless dense is the only method.
        base: every setting that neither the method nor the budget decides; None takes the defaults.

    Raises:
        ConfigError: an unknown method, or no budget.

    Example:
        >>> [(v.method, v.budget.label if v.budget else "") for v in variants(["dense", "qap"], [Budget(n_keep=18)])]
        [('dense', ''), ('qap', '18')]
    """
    base = PruneConfig() if base is None else base
    chosen = list(dict.fromkeys(methods))
    unknown = [method for method in chosen if method not in METHODS]
    if unknown or not chosen:
        raise ConfigError(f"methods are {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}; choose from these")
    if not budgets and chosen != ["dense"]:
        raise ConfigError("pruning needs a number of tokens, got none; give n_keep or keep_ratio")
    found = [Variant("dense", None, (None,))] if "dense" in chosen else []
    for budget in dict.fromkeys(budgets):
        found += [Variant(m, budget, _configs(m, budget, base)) for m in chosen if m != "dense"]
    return found
