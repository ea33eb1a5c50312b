"""Several numbers of tokens in one command: the options of `bench` and `compare`, and a config for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from qap_gguf.cli.common import default_of, make_config

if TYPE_CHECKING:
    from qap_gguf.config import PruneConfig


def budget_options(ratios: tuple[float, ...]) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """Add --n-keep and --keep-ratio, both repeatable; `ratios` are those that hold where none is given."""
    usual = ", ".join(f"{ratio:g}" for ratio in ratios)

    def decorate(function: click.decorators.FC) -> click.decorators.FC:
        function = click.option(
            "--keep-ratio",
            type=float,
            multiple=True,
            metavar="R",
            help=f"Keep this part of the tokens, 0 < R <= 1. Repeatable.  [default: {usual}]",
        )(function)
        return click.option(
            "--n-keep", type=click.IntRange(min=1), multiple=True, metavar="K", help="Keep K tokens. Repeatable."
        )(function)

    return decorate


def encoder_keep_option(function: click.decorators.FC) -> click.decorators.FC:
    """Add --encoder-keep, repeatable: a row for each in `bench` and `eval`."""
    return click.option(
        "--encoder-keep",
        type=float,
        multiple=True,
        metavar="R",
        help="Drop all but this part of the tokens inside the image encoder, 0 < R <= 1; 1 drops none. Repeatable."
        + default_of("encoder_keep"),
    )(function)


def budget_configs(
    n_keep: tuple[int, ...],
    keep_ratio: tuple[float, ...],
    usual: tuple[float, ...],
    prune: Mapping[str, Any],
    encoder_keep: tuple[float, ...] = (),
) -> tuple[PruneConfig, ...]:
    """One config for each number of tokens, in the order given.

    Args:
        n_keep, keep_ratio: of the command line.
        usual: ratios where neither was given.
        prune: the other prune options; None is one that was not given.
        encoder_keep: each budget is combined with each of these, if there are any.

    Raises:
        click.UsageError: both kinds of budget, or a value outside its range.
    """
    if n_keep and keep_ratio:
        raise click.UsageError("--n-keep and --keep-ratio exclude each other; give one of them")
    base = {name: value for name, value in prune.items() if value is not None}
    budgets: list[dict[str, Any]] = [{"n_keep": k} for k in n_keep]
    budgets = budgets or [{"keep_ratio": ratio} for ratio in keep_ratio or usual]
    drops: list[dict[str, Any]] = [{"encoder_keep": ratio} for ratio in encoder_keep] or [{}]
    return tuple(make_config(base | budget | drop) for budget in budgets for drop in drops)


WITHOUT: Final = ("n_keep", "keep_ratio", "dense")  #: prune options that these take the place of
