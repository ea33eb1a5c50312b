#!/usr/bin/env python3
"""Does error="model" choose better tokens than int4's plain error? The same questions, method by method, paired.

    qap-gguf imatrix train/questions.jsonl -m model-F16.gguf --mmproj mmproj.gguf --keep-ratio 0.125 -o imatrix.gguf
    qap-gguf convert --annotate mmproj.gguf weighted.gguf --error model --imatrix imatrix.gguf
    python benchmarks/model_error.py held-out/questions.jsonl -m model-Q4_0.gguf --mmproj weighted.gguf --out results

Methods that use the sensitivity to quantization, as `qap-gguf eval` has them. Answers are appended to
OUT/journal.jsonl, and the script goes on where it was stopped. Intervals are 95 %, paired, by a bootstrap over
pictures; bold where they exclude 0. With --write the table goes into FILE, between the lines
`<!-- table model-error -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import qap_gguf as qap
from compare import cell
from qap_gguf.errors import QapError
from qap_gguf.eval import (
    Budget,
    Journal,
    Outcome,
    Setup,
    evaluate_grid,
    fingerprint,
    load_questions,
    markdown,
    variants,
)
from qap_gguf.eval.report import Table
from qap_gguf.eval.stats import RESAMPLES, Tallies
from results_tables import write_tables

METHODS = "qap,numeric,dpp,dpp-numeric,coverage"
ERRORS = ("int4", "model")


def table(outcomes: list[Outcome]) -> Table:
    """A row for each model, method and K: right answers with either error in per cent, and the difference in points."""
    tallies = Tallies(outcomes, 0, RESAMPLES)
    rows: dict[tuple[str, str, str], dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        variant = outcome.variant
        if variant.budget is not None and variant.configs[0] is not None:
            key = outcome.setup.model, variant.method, variant.budget.label
            rows.setdefault(key, {}).setdefault(variant.configs[0].error, []).append(outcome)
    body = []
    for key, by_error in rows.items():
        plain, model = (tallies.tally(by_error[error]) for error in ERRORS)
        value, low, high = tallies.difference(model, plain)
        right = [f"{100 * one[0].sum() / one[1].sum():.1f}" for one in (plain, model)]
        same = [mine.said == other.said for mine, other in zip(*(by_error[error] for error in ERRORS), strict=True)]
        differ = f"{100 * (1 - sum(same) / len(same)):.1f}"
        body.append((*key, *right, cell({"value": value, "low": low, "high": high}), differ))
    return ("model", "method", "K", *ERRORS, "model minus int4", "other answers, %"), body


def main() -> None:
    """Ask and print."""
    parser = argparse.ArgumentParser(description='Does error="model" choose better tokens than int4\'s plain error?')
    parser.add_argument("data", type=Path, help="questions")
    parser.add_argument("-m", "--model", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--mmproj", type=Path, required=True, help="with channel weights")
    parser.add_argument("--n-keep", type=int, action="append", required=True, metavar="K", help="repeatable")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--limit", type=int, help="the first questions only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into FILE too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    models = {path.stem: path for path in args.model}
    compared = variants(args.methods.split(","), [Budget(n_keep=k) for k in args.n_keep], errors=ERRORS)
    header = {"data": fingerprint(args.data), "mmproj": fingerprint(args.mmproj)}
    known = {name: fingerprint(path) for name, path in models.items()}
    with Journal(args.out / "journal.jsonl", header, known) as journal:
        outcomes = evaluate_grid(
            lambda setup: qap.VisionModel(args.mmproj, models[setup.model], n_threads=args.threads),
            [Setup(name) for name in models],
            load_questions(args.data, args.limit),
            compared,
            journal=journal,
        )
    text = markdown(table(outcomes))
    print(text)
    if args.write is not None:
        write_tables(args.write, {"model-error": text})


if __name__ == "__main__":
    try:
        main()
    except QapError as err:
        raise SystemExit(f"model_error: error: {err}") from err
