"""`qap-gguf eval`: how many answers are right, dense and pruned in several ways. The logic is in qap_gguf.eval."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qap_gguf.cli.budgets import encoder_keep_option
from qap_gguf.cli.common import (
    check_model_pair,
    default_of,
    is_debug,
    make_config,
    model_options,
    note,
    output_options,
    parse_alpha,
    print_json,
    prune_options,
    sampler_seed,
    warn,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.output import counter_bar, print_table, split_table
from qap_gguf.cli.places import keeping
from qap_gguf.config import ERRORS, PruneConfig

if TYPE_CHECKING:
    from qap_gguf.eval import Budget, Journal, Setup, Variant

_METHODS = (
    "dense,qap,semantic,numeric,dpp,dpp-semantic,dpp-numeric,dpp-flat,divprune,coverage,coverage-semantic,random,"
    "uniform,pool"
)
#: A journal knows them by Variant.key.
_IN_THE_KEY = ("alpha", "encoder_keep", "encoder_layer", "error", "keep_ratio", "n_keep", "select")
_SCORINGS = ("auto", "exact", "choice", "vqa", "f1", "yesno")


def _budgets(n_keep: tuple[int, ...], keep_ratio: tuple[float, ...]) -> list[Budget]:
    from qap_gguf.eval import Budget

    if n_keep and keep_ratio:
        raise click.UsageError("--n-keep and --keep-ratio exclude each other; give one of them")
    if n_keep:
        return [Budget(n_keep=k) for k in n_keep]
    # a bad one is a usage error now, not an error later
    ratios = [make_config({"keep_ratio": ratio}).keep_ratio for ratio in keep_ratio] or [PruneConfig().keep_ratio]
    return [Budget(keep_ratio=ratio) for ratio in ratios]


def _variants(
    methods: str,
    budgets: list[Budget],
    base: PruneConfig,
    alphas: Sequence[Any],
    errors: Sequence[str],
    encoder_keeps: Sequence[float],
) -> list[Variant]:
    from qap_gguf.errors import ConfigError
    from qap_gguf.eval import variants

    chosen = [method.strip() for method in methods.split(",") if method.strip()]
    try:
        return variants(chosen, budgets, base, alphas=alphas, errors=errors, encoder_keeps=encoder_keeps)
    except ConfigError as err:
        raise click.UsageError(str(err)) from err


def _setups(models: Sequence[Path], kvs: Sequence[str]) -> dict[Setup, tuple[Path, str | None]]:
    """What to open under which name."""
    from qap_gguf.eval import Setup

    names = [path.stem for path in models]
    if len(set(names)) != len(names):
        raise click.UsageError(f"the model files need names that differ, got {', '.join(names)}; rename one")
    return {
        Setup(name, kv or ""): (path, kv or None)
        for name, path in zip(names, models, strict=True)
        for kv in dict.fromkeys(kvs or ("",))
    }


def _stopped(journal: Journal | None) -> str:
    """What remains of an evaluation that Ctrl-C ends."""
    if journal is None:
        return "stopped; nothing is kept: with --out DIR the same command goes on where it was"
    return f"stopped; the answers so far are in {journal.path}: run the same command again to go on"


@click.command("eval", cls=GroupedCommand, short_help="Count right answers, dense and pruned.")
@click.argument("data", metavar="DATA.jsonl", type=click.Path(path_type=Path))
@model_options(multiple=True)
@click.option("--n-keep", type=click.IntRange(min=1), multiple=True, metavar="K", help="Keep K tokens. Repeatable.")
@click.option(
    "--keep-ratio",
    type=float,
    multiple=True,
    metavar="R",
    help="Keep this part of the tokens, 0 < R <= 1. Repeatable." + default_of("keep_ratio"),
)
@click.option("--methods", default=_METHODS, show_default=True, metavar="LIST", help="What to compare, with commas.")
@click.option(
    "--alpha",
    multiple=True,
    callback=parse_alpha,
    metavar="A",
    help='Weight of the semantic score in fused methods, 0..1, or "dynamic". Repeatable.' + default_of("alpha"),
)
@click.option(
    "--error",
    type=click.Choice(ERRORS),
    multiple=True,
    metavar="Q",
    help="Quantizer whose error is measured: int2 to int8, or a ggml type. Repeatable." + default_of("error"),
)
@encoder_keep_option
@click.option(
    "--scoring",
    type=click.Choice(_SCORINGS),
    default="auto",
    show_default=True,
    help="What an answer is worth; auto: choice where a row has choices, vqa where it has several answers, else exact.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask the first N questions only.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=12, show_default=True, help="Longest answer, in tokens."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write results.csv, .json and .md, accuracy.png and a journal to DIR; run again to go on where it stopped.",
)
@click.option("--force", is_flag=True, help="Begin anew where DIR holds the journal of another run.")
@prune_options(without=("n_keep", "keep_ratio", "select", "dense", "alpha", "error", "encoder_keep"))
@output_options
def eval_command(
    data: Path,
    model: tuple[Path, ...],
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    ctx: int,
    n_keep: tuple[int, ...],
    keep_ratio: tuple[float, ...],
    methods: str,
    alpha: tuple[float | str, ...],
    error: tuple[str, ...],
    encoder_keep: tuple[float, ...],
    kv: tuple[str, ...],
    scoring: str,
    limit: int | None,
    max_tokens: int,
    out: Path | None,
    force: bool,
    as_json: bool,
    **prune: Any,
) -> None:
    """Count right answers to the questions in DATA.jsonl, dense and pruned.

    Each line of the file is a JSON object with image (a path relative to the file), question and answer; if you like
    also kind, choices (then the likeliest is taken), or answers in place of answer. Several -m, --kv, --n-keep,
    --alpha, --error and --encoder-keep make a grid; each picture is encoded once for each --encoder-keep.

    \b
    Methods:
      dense         every token
      qap           semantic score and sensitivity to quantization, fused (--alpha), best tokens
      semantic      semantic score alone
      numeric       sensitivity to quantization alone
      dpp           the fused score, good and different tokens; dpp-semantic, dpp-numeric likewise,
                    dpp-flat with equal scores
      divprune      different tokens, without scores
      coverage      tokens that stand for most of the picture, weighted by the rank of the fused score;
                    coverage-semantic likewise
      random        random tokens, mean of three seeds
      uniform       tokens at an even stride
      pool          the grid of tokens averaged down to K, as a smaller picture would be
      resize        all tokens of a smaller picture, at most K; not with encoders of one size

    \b
    Scorings: exact (but for case, space, trailing punctuation), choice (likeliest, mean log probability of a token),
    vqa (soft accuracy), f1 (of words), yesno (first word; POPE).

    \b
    Examples:
      python tools/demo/make_scenes.py --seed 20260000 --n 50 --out scenes
      qap-gguf eval scenes/questions.jsonl --n-keep 18 --n-keep 36
      qap-gguf eval scenes/questions.jsonl -m m-Q8_0.gguf -m m-Q2_K.gguf --mmproj mmproj.gguf --kv q4_0 --out results
    """
    check_model_pair(model[0] if model else None, mmproj)
    base = make_config({name: value for name, value in prune.items() if value is not None})
    base = make_config(base.to_dict() | ({"alpha": alpha[0]} if alpha else {}) | ({"error": error[0]} if error else {}))
    for value in alpha:
        make_config({"alpha": value})
    compared = _variants(methods, _budgets(n_keep, keep_ratio), base, alpha, error, encoder_keep)

    from qap_gguf.eval import (
        Evaluation,
        Journal,
        evaluate_grid,
        fingerprint,
        interactions,
        load_questions,
        summarise,
    )

    questions = load_questions(data, limit, scoring)

    import qap_gguf as qap

    if not model or mmproj is None:
        packaged = qap.packaged_model()
        model, mmproj = (packaged.model,), packaged.mmproj
    kept = {path: keeping(path, prune) for path in model}
    setups = _setups(model, kv)

    def opened(setup: Setup) -> Any:
        path, kv_type = setups[setup]
        return qap.VisionModel(
            mmproj, kept[path], kv=kv_type, device=device, model_device=model_device, n_ctx=ctx, n_threads=threads,
            seed=sampler_seed(base.seed), check="child", verbose=is_debug(),
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        journal = None
        if out is not None:
            header = {
                "data": fingerprint(data), "mmproj": fingerprint(mmproj), "scoring": scoring, "max_tokens": max_tokens,
                "base": {name: value for name, value in base.to_dict().items() if name not in _IN_THE_KEY},
            }  # fmt: skip
            files = {path.stem: fingerprint(path) for path in model}
            journal = stack.enter_context(Journal(out / "journal.jsonl", header, files, force))
            if journal.n_known:
                note(f"{journal.n_known} answers are known from {journal.path}")
        report = stack.enter_context(counter_bar("questions"))
        try:
            outcomes = evaluate_grid(
                opened, list(setups), questions, compared, max_tokens=max_tokens, progress=report, journal=journal
            )
        except KeyboardInterrupt:
            warn(_stopped(journal))
            raise
    pictures = len({question.image for question in questions})
    result = Evaluation(
        summarise(outcomes, base.seed), len(questions), pictures, base.seed, interactions(outcomes, base.seed)
    )
    plain = {"data": data, "models": [str(path) for path in model], "mmproj": mmproj, **result.to_dict()}
    if out is not None:
        from qap_gguf.eval.output import write_results

        missing = write_results(out, result, plain)
        if missing is not None:
            note(missing)
    if as_json:
        print_json(plain)
        return
    for table in split_table(result.main_table()):
        print_table(table)
        click.echo()
    click.echo(f"{result.note}\n")
    for number, table in enumerate(split_table(result.kind_table())):
        click.echo("\n" if number else "", nl=False)
        print_table(table)
