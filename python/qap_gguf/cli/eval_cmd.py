"""`qap-gguf eval`: how many answers are right, dense and pruned in several ways. The logic is in qap_gguf.eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    make_config,
    model_options,
    output_options,
    print_json,
    prune_options,
    sampler_seed,
)
from qap_gguf.cli.output import counter_bar, print_table

if TYPE_CHECKING:
    from qap_gguf.eval import Budget

_METHODS = "dense,qap,dpp,semantic,numeric,divprune,random,uniform"


def _budgets(n_keep: tuple[int, ...], keep_ratio: tuple[float, ...]) -> list[Budget]:
    from qap_gguf.eval import Budget

    if n_keep and keep_ratio:
        raise click.UsageError("--n-keep and --keep-ratio exclude each other; give one of them")
    if n_keep:
        return [Budget(n_keep=k) for k in n_keep]
    ratios = keep_ratio or (0.125,)
    for ratio in ratios:
        make_config({"keep_ratio": ratio})  # a bad one is a usage error now, not an error later
    return [Budget(keep_ratio=ratio) for ratio in ratios]


@click.command("eval", short_help="Count right answers, dense and pruned.")
@click.argument("data", metavar="DATA.jsonl", type=click.Path(path_type=Path))
@model_options
@click.option("--n-keep", type=click.IntRange(min=1), multiple=True, metavar="K", help="Keep K tokens. Repeatable.")
@click.option(
    "--keep-ratio",
    type=float,
    multiple=True,
    metavar="R",
    help="Keep this part of the tokens, 0 < R <= 1. Repeatable.  [default: 0.125]",
)
@click.option("--methods", default=_METHODS, show_default=True, metavar="LIST", help="What to compare, with commas.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask the first N questions only.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=12, show_default=True, help="Longest answer, in tokens."
)
@prune_options(without=("n_keep", "keep_ratio", "select", "dense"))
@output_options
def eval_command(
    data: Path,
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    ctx: int,
    n_keep: tuple[int, ...],
    keep_ratio: tuple[float, ...],
    methods: str,
    limit: int | None,
    max_tokens: int,
    as_json: bool,
    **prune: Any,
) -> None:
    """Count right answers to the questions in DATA.jsonl, dense and pruned.

    Each line of the file is a JSON object with image (a path relative to the file), question, answer and, if you like,
    kind. An answer is right when it equals the expected one but for case, surrounding space and trailing punctuation.

    \b
    Methods:
      dense     every token
      qap       semantic score and sensitivity to quantization, fused (--alpha), best tokens
      dpp       the same score, good and different tokens
      semantic  semantic score alone
      numeric   sensitivity to quantization alone
      divprune  different tokens, without scores
      random    random tokens, mean of three seeds
      uniform   tokens at an even stride

    \b
    Example:
      python tools/make_scenes.py --seed 20260000 --n 50 --out scenes
      qap-gguf eval scenes/questions.jsonl --n-keep 18 --n-keep 36
    """
    check_model_pair(model, mmproj)
    base = make_config({name: value for name, value in prune.items() if value is not None})

    from qap_gguf.errors import ConfigError
    from qap_gguf.eval import Evaluation, evaluate, load_questions, summarise, variants

    try:
        compared = variants([m.strip() for m in methods.split(",") if m.strip()], _budgets(n_keep, keep_ratio), base)
    except ConfigError as err:
        raise click.UsageError(str(err)) from err
    questions = load_questions(data, limit)

    import qap_gguf as qap

    if model is None or mmproj is None:
        packaged = qap.packaged_model()
        model, mmproj = packaged.model, packaged.mmproj
    opened = qap.VisionModel(
        mmproj,
        model,
        device=device,
        model_device=model_device,
        n_ctx=ctx,
        n_threads=threads,
        seed=sampler_seed(base.seed),
        verbose=is_debug(),
    )
    with opened as vlm, counter_bar("questions") as report:
        outcomes = evaluate(vlm, questions, compared, max_tokens=max_tokens, progress=report)
    pictures = len({question.image for question in questions})
    result = Evaluation(summarise(outcomes, base.seed), len(questions), pictures, base.seed)
    if as_json:
        print_json({"data": data, "model": model, "mmproj": mmproj, **result.to_dict()})
        return
    print_table(result.main_table())
    click.echo(f"\n{result.note}\n")
    print_table(result.kind_table())
