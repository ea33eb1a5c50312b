"""`qap-gguf compare`: the same question from all tokens and from fewer, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qap_gguf.cli.budgets import WITHOUT, budget_configs, budget_options
from qap_gguf.cli.chosen import chosen_pair
from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    model_options,
    note,
    output_options,
    print_json,
    prune_options,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.output import check_targets, counter_bar, print_table, write_file
from qap_gguf.cli.pictures import allow_urls_option, one_picture
from qap_gguf.cli.places import keeping

if TYPE_CHECKING:
    import qap_gguf as qap
    from qap_gguf.eval.report import Table

_RATIOS = (0.5, 0.25, 0.125, 0.0625)
_QUESTION = "What is in row 2, column 4?"  # about the packaged sample


def ask(
    vlm: qap.VisionModel, pixels: Any, question: str, cfg: qap.PruneConfig | None, max_tokens: int
) -> dict[str, Any]:
    """One answer and what it cost, ready for JSON.

    Returns:
        config (None: all tokens), n_tokens, n_kept, n_kv (cells of the KV cache after the answer), kept (their
        numbers), first_s (to the first word, the picture's encoding included), prefill_s, answer.
    """
    image = vlm.encode(pixels, cfg)  # once for all, but for rows that drop tokens inside the encoder
    answer = vlm.generate([image, question], prune=cfg, max_tokens=max_tokens, stream=True)
    stats = answer.stats
    first = image.seconds + stats.score_s + stats.select_s + stats.prefill_s
    return {
        "config": None if cfg is None else cfg.to_dict(),
        "answer": "".join(answer).strip(),
        "n_tokens": stats.n_image_tokens,
        "n_kept": stats.n_image_kept,
        "n_kv": stats.n_kv,
        "first_s": first,
        "prefill_s": stats.prefill_s,
        "kept": None if cfg is None else answer.kept[0].tolist(),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one question; the first is the dense one, which the others are compared with."""
    dense = rows[0]
    head = ("K", "of all", "KV cells", "prefill, ms", "first word, s", "sooner", "answer")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        same = " (same)" if row is not dense and row["answer"] == dense["answer"] else ""
        lines.append(
            (
                str(row["n_kept"]),
                f"{100 * row['n_kept'] / row['n_tokens']:.0f} %",
                str(row["n_kv"]),
                f"{1000 * row['prefill_s']:.1f}",
                f"{row['first_s']:.2f}",
                f"{dense['first_s'] / row['first_s']:.2f}x",
                " ".join(row["answer"].split()) + same,
            )
        )
    return head, lines


@click.command(cls=GroupedCommand, short_help="One question at several K, side by side.")
@click.argument("word", metavar="[IMAGE]", required=False)
@click.option("-p", "--prompt", "questions", multiple=True, metavar="TEXT", help="The question. Repeatable.")
@budget_options(_RATIOS)
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer.")
@click.option(
    "--png",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw what is kept at each K of the first question, with the answers (needs matplotlib).",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@allow_urls_option
@model_options()
@prune_options(without=WITHOUT)
@output_options
def compare(
    word: str | None,
    questions: tuple[str, ...],
    n_keep: tuple[int, ...],
    keep_ratio: tuple[float, ...],
    max_tokens: int,
    png: Path | None,
    force: bool,
    allow_urls: bool,
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    ctx: int,
    kv: str | None,
    as_json: bool,
    **prune: Any,
) -> None:
    """Ask about a picture from all of its tokens and from fewer, and show the answers side by side.

    This is the way to find out how many tokens your own pictures and questions need. The picture is encoded once; the
    time to the first word counts that encode for every row. Times are of one pass each: `qap-gguf bench` measures them.

    \b
    Examples:
      qap-gguf compare
      qap-gguf compare photo.jpg -p "What is this?" -p "How many people?" -m model.gguf --mmproj mmproj.gguf --png c.png
    """
    check_model_pair(model, mmproj)
    configs = budget_configs(n_keep, keep_ratio, _RATIOS, prune)
    if any(not question.strip() for question in questions):
        raise click.UsageError("-p/--prompt is empty; write a question")
    check_targets({"png": png}, force)

    import qap_gguf as qap
    from qap_gguf.plotting.plot import require_matplotlib
    from qap_gguf.plotting.sheet import sheet
    from qap_gguf.vision.overlay import check_grid

    if png is not None:
        require_matplotlib()
    if not questions:
        if word is not None:
            raise click.UsageError("-p/--prompt: expected a question about the picture, got none; give one")
        questions = (_QUESTION,)
    name, picture = one_picture(word, allow_urls)
    model, mmproj = chosen_pair(model, mmproj)
    model = keeping(model, prune)
    settings: dict[str, Any] = {"device": device, "model_device": model_device, "kv": kv, "n_ctx": ctx}
    with qap.VisionModel(mmproj, model, n_threads=threads, **settings, verbose=is_debug()) as vlm:
        (pixels,) = vlm.load_fitting([picture], None, max(questions, key=len))
        image = vlm.encode(pixels)
        if png is not None:
            check_grid(image)  # before anything slow happens
        vlm.generate([image, questions[0]], prune=None, max_tokens=1)  # the first pass of a model is slower
        found: list[list[dict[str, Any]]] = []
        with counter_bar("answers") as report:
            for question in questions:
                found.append([])
                for cfg in (None, *configs):
                    vlm.language_model.reset()  # type: ignore[no-untyped-call]
                    found[-1].append(ask(vlm, pixels, question, cfg, max_tokens))
                    if report is not None:
                        report(sum(map(len, found)), len(questions) * (1 + len(configs)))

    if png is not None:
        panels = [
            (
                row["kept"],
                f"{row['n_kept']} of {row['n_tokens']}: {row['answer']}\nfirst word after {row['first_s']:.2f} s",
            )
            for row in found[0]
        ]
        drawn = sheet(pixels, image, panels, title=questions[0])
        write_file(png, force, lambda file: drawn.save(file, "PNG"))
        note(f"wrote {png}")
    if as_json:
        answers = [{"prompt": q, "rows": rows} for q, rows in zip(questions, found, strict=True)]
        print_json({"image": name, "model": model, "mmproj": mmproj, "encode_s": image.seconds, "questions": answers})
        return
    for question, rows in zip(questions, found, strict=True):
        click.echo(f"\n{question}\n")
        print_table(table(rows))
