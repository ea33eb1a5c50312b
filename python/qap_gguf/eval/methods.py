"""What an evaluation compares: a method at a budget becomes one config for each repetition.

The baselines random, uniform and pool (a lower resolution after the encoder; resize is one before it) are in every
table, because random selection beats many published methods on LLaVA-1.5 (UniPruneBench).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qap_gguf.config import LEVELS, PruneConfig
from qap_gguf.errors import ConfigError

#: Method -> what it means, in the order of the tables.
METHODS: Final[Mapping[str, str]] = {
    "dense": "every token",
    "qap": "semantic score and sensitivity to quantization, fused",
    "semantic": "semantic score alone (alpha 1)",
    "numeric": "sensitivity to quantization alone (alpha 0)",
    "dpp": "the fused score, as the relevance of a determinantal point process",
    "dpp-semantic": "the same with the semantic score alone",
    "dpp-numeric": "the same with the sensitivity to quantization alone",
    "dpp-flat": "the same with equal scores: what the process does by itself",
    "divprune": "diversity alone, without scores",
    "coverage": "what stands for most of the picture, tokens weighted by the rank of the fused score",
    "coverage-semantic": "the same with the semantic score alone",
    "random": "random tokens, mean of 3 seeds",
    "uniform": "tokens at an even stride",
    "pool": "the grid of tokens averaged down, as a smaller picture",
    "resize": "all tokens of a picture that is scaled down; not with encoders of one size",
}
RANDOM_REPETITIONS: Final = 3
#: Method -> those that it is compared with at the same budget, beside dense.
BASELINES: Final[Mapping[str, tuple[str, ...]]] = {
    "qap": ("semantic", "random"),
    "numeric": ("semantic", "random"),
    "semantic": ("random",),
    "dpp": ("qap", "dpp-semantic", "dpp-flat", "pool", "resize", "random"),
    "dpp-numeric": ("dpp-semantic", "dpp-flat", "random"),
    "dpp-semantic": ("dpp-flat", "random"),
    "dpp-flat": ("random",),
    "divprune": ("random",),
    "coverage": ("dpp", "coverage-semantic", "pool", "resize", "random"),
    "coverage-semantic": ("dpp-semantic", "random"),
    "uniform": ("random",),
    "pool": ("random",),
    "resize": ("pool", "random"),
}
#: Methods that no config can say: they put tokens of their own into rows that are then kept (see replaced.py).
REPLACED: Final = ("dpp-flat", "pool")
#: Methods that need all tokens of a picture, so that nothing is dropped early.
WHOLE: Final = ("pool", "resize")
#: The method that has the picture encoded at another size (see smaller.py).
RESIZE: Final = "resize"
_FUSED: Final = ("qap", "dpp", "coverage")
_NUMERIC: Final = ("numeric", "dpp-numeric")


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
        settings: what tells apart the rows of one method, such as "alpha 0.5"; "" where there is one row.
    """

    method: str
    budget: Budget | None
    configs: tuple[PruneConfig | None, ...]
    settings: str = ""

    @property
    def needs_attention(self) -> bool:
        """Whether the variant means nothing on a model without class-token attention."""
        return any(config is not None and config.semantic == "cls" for config in self.configs)

    @property
    def label(self) -> str:
        """Method and settings in words."""
        return f"{self.method}, {self.settings}" if self.settings else self.method

    @property
    def key(self) -> str:
        """What a journal knows the variant by; alpha and error stand in it even where no other row differs by them."""
        config = self.configs[0]
        if self.budget is None or config is None:
            return self.method
        scored = f", alpha {config.alpha}, {config.error}" if self.method in _FUSED + _NUMERIC else ""
        early = f", encoder_keep {config.encoder_keep}" if config.encoder_keep < 1 else ""
        early += f" after {config.encoder_layer}" if early and config.encoder_layer is not None else ""
        return f"{self.method}{scored}{early} @ {self.budget.label}"


def _configs(method: str, budget: Budget, base: PruneConfig) -> tuple[PruneConfig, ...]:
    greedy = method.partition("-")[0]
    select = greedy if greedy in ("dpp", "coverage") else "topk"
    if method in _FUSED:
        return (budget.apply(base, select=select),)
    if method in ("semantic", "dpp-semantic", "coverage-semantic"):
        # Not "auto": on a model without attention that would keep the first K tokens and call it semantic.
        semantic = "cls" if base.semantic in ("auto", "none") else base.semantic
        return (budget.apply(base, select=select, alpha=1.0, semantic=semantic),)
    if method in _NUMERIC:
        return (budget.apply(base, select=select, alpha=0.0, semantic="none"),)
    if method in (*REPLACED, RESIZE):
        return (budget.apply(base, select="uniform", merge="none"),)
    if method in ("divprune", "uniform"):
        return (budget.apply(base, select=method),)
    seeds = [(base.seed + i) % 2**64 for i in range(RANDOM_REPETITIONS)]
    return tuple(budget.apply(base, select="random", seed=seed) for seed in seeds)


def _settings(
    method: str, base: PruneConfig, alphas: Sequence[Any], errors: Sequence[str], early: Sequence[float]
) -> list[tuple[str, PruneConfig]]:
    """(words, base) for each row of a method: alphas matter to fused scores, errors to those and the numeric ones, an
    early drop to all that choose among the encoder's tokens."""
    some_alphas = list(dict.fromkeys(alphas)) if method in _FUSED and alphas else [base.alpha]
    some_errors = list(dict.fromkeys(errors)) if method in _FUSED + _NUMERIC and errors else [base.error]
    some_early = list(dict.fromkeys(early)) or [base.encoder_keep]
    if method in WHOLE:
        some_early = [1.0]
        base = base.replace(**dict.fromkeys(LEVELS))
    rows = []
    for alpha, error, keep in itertools.product(some_alphas, some_errors, some_early):
        words = [f"alpha {alpha}"] if len(some_alphas) > 1 else []
        words += [error] if len(some_errors) > 1 else []
        words += [f"encoder_keep {keep}"] if keep < 1 and len(some_early) > 1 else []
        rows.append((", ".join(words), base.replace(alpha=alpha, error=error, encoder_keep=keep)))
    return rows


def variants(
    methods: Iterable[str],
    budgets: Sequence[Budget],
    base: PruneConfig | None = None,
    *,
    alphas: Sequence[Any] = (),
    errors: Sequence[str] = (),
    encoder_keeps: Sequence[float] = (),
) -> list[Variant]:
    """List what to compare: dense once, every other method at each budget.

    Args:
        methods: keys of ``METHODS``; repetitions count once.
        budgets: at least one, unless dense is the only method.
        base: every setting that neither the method nor the budget decides; None takes the defaults.
        alphas: one row of each fused method for each of these; () takes that of `base`.
        errors: one row of each method with a sensitivity for each of these; () takes that of `base`.
        encoder_keeps: one row of each method, pool and resize excepted, for each of these; () takes that of `base`.

    Raises:
        ConfigError: an unknown method, a bad alpha, error or encoder_keep, or no budget.

    Example:
        >>> [(v.method, v.budget.label if v.budget else "") for v in variants(["dense", "qap"], [Budget(n_keep=18)])]
        [('dense', ''), ('qap', '18')]
        >>> [v.key for v in variants(["qap", "random"], [Budget(n_keep=18)], alphas=[0.3, 0.7])]
        ['qap, alpha 0.3, int4 @ 18', 'qap, alpha 0.7, int4 @ 18', 'random @ 18']
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
        for method in chosen:
            if method != "dense":
                for words, changed in _settings(method, base, alphas, errors, encoder_keeps):
                    found.append(Variant(method, budget, _configs(method, budget, changed), words))
    return found
