#!/usr/bin/env python3
"""Does an importance matrix of pruned pictures help? One F16 model in several types, with four kinds of matrix.

    python benchmarks/imatrix_tables.py model-F16.gguf mmproj-f16.gguf --measure train/questions.jsonl \\
        --text wiki.txt --test held-out/questions.jsonl --keep-ratio 0.125 --out results-imatrix

Matrices: none, text (chunks of --text), dense (pictures of --measure with all tokens), pruned (the same with a part of
them). Each quantized model answers the questions of --test, with all tokens and with that part, and its logits of the
first token are compared with the F16 model's (KL divergence in nats). What is in --out is not made again, so that the
script goes on where it was stopped; answers are appended as they come. Intervals are 95 %, paired, by a bootstrap over
pictures; bold where they exclude 0. A type that needs a matrix has "-" without one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from compare import cell
from qap_gguf.convert import quantize
from qap_gguf.errors import ConvertError
from qap_gguf.eval import Question, load_questions, markdown, measure_imatrix

Array = npt.NDArray[np.float64]
KINDS = ("none", "text", "dense", "pruned")
TYPES = "Q4_0,Q4_K_M,Q3_K_S,Q2_K,IQ2_XS,IQ1_M"
RESAMPLES, MOST_TOKENS = 2000, 12


def log_softmax(logits: Any) -> Array:
    """In double precision."""
    wide = np.asarray(logits, np.float64)
    wide -= wide.max()
    out: Array = wide - np.log(np.exp(wide).sum())
    return out


def divergence(truth: Array, other: Array) -> float:
    """KL divergence of log probabilities, in nats.

    Example:
        >>> divergence(np.log([0.5, 0.5]), np.log([0.5, 0.5]))
        0.0
    """
    return float((np.exp(truth) * (truth - other)).sum())


class Answers:
    """What one model said: a line of JSON for each question and way of reading, in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.rows = [json.loads(line) for line in text.split("\n")[:-1]]

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def ways(config: qap.PruneConfig) -> Iterator[tuple[str, qap.PruneConfig | None]]:
    yield "all tokens", None
    yield f"{config.keep_ratio:g} of them", config


def ask(
    model: Path,
    mmproj: Path,
    questions: Sequence[Question],
    config: qap.PruneConfig,
    out: Path,
    truth: Path,
    threads: int,
) -> list[dict[str, Any]]:
    """Answers of one model; `truth` is a folder with the F16 model's log probabilities, which that one writes."""
    known = Answers(out / f"{model.stem}.jsonl")
    jobs = [(n, way, cfg) for n in range(len(questions)) for way, cfg in ways(config)]
    if len(known.rows) >= len(jobs):
        return known.rows
    truth.mkdir(exist_ok=True)
    with qap.VisionModel(mmproj, model, n_threads=threads) as vlm:
        for number, way, cfg in jobs[len(known.rows) :]:
            question = questions[number]
            generation = vlm.generate(
                [vlm.encode(question.image), question.text],
                prune=cfg,
                max_tokens=MOST_TOKENS,
                temperature=0.0,
                stream=True,
            )
            found, file = log_softmax(vlm.last_logits()), truth / f"{number}-{'all' if cfg is None else 'part'}.npy"
            if not file.exists():  # the F16 model comes first
                np.save(file, found)
            said = "".join(generation)
            row = {"number": number, "way": way, "said": said, "right": question.score(said)}
            known.add(row | {"kl": divergence(np.load(file), found)})
    return known.rows


def interval(values: Array, pictures: Sequence[Path]) -> dict[str, float]:
    """Mean, and its interval by a bootstrap over pictures."""
    names, places = np.unique([str(picture) for picture in pictures], return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places)
    draws = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def table(
    found: dict[tuple[str, str], list[dict[str, Any]]], way: str, key: str, questions: Sequence[Question]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row for each type and matrix: the mean, and the difference to none and to dense, all in hundredths."""

    def column(name: str, kind: str) -> Array | None:
        rows = found.get((name, kind))
        return None if rows is None else np.array([row[key] for row in rows if row["way"] == way])

    pictures = [question.image for question in questions]
    body: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for name, _ in found):
        for kind in KINDS:
            mine = column(name, kind)
            if mine is None:
                body.append((name, kind, "-", "-", "-"))
                continue
            others = [None if other == kind else column(name, other) for other in ("none", "dense")]
            versus = ["" if other is None else cell(interval(mine - other, pictures)) for other in others]
            body.append((name, kind, f"{100 * mine.mean():.2f}", *versus))
    return ("type", "imatrix", key, "against none", "against dense"), body


def measure(args: argparse.Namespace, config: qap.PruneConfig) -> dict[str, Path]:
    """The imatrix files by kind."""
    made: dict[str, Path] = {}
    runs: dict[str, Callable[[Path], Any]] = {
        "text": lambda path: measure_imatrix(
            args.text, path, model=args.model, text=True, chunk=args.chunk, n_threads=args.threads
        ),
        "dense": lambda path: measure_imatrix(
            args.measure, path, model=args.model, mmproj=args.mmproj, prune=None, n_threads=args.threads
        ),
        "pruned": lambda path: measure_imatrix(
            args.measure, path, model=args.model, mmproj=args.mmproj, prune=config, n_threads=args.threads
        ),
    }
    for kind, run in runs.items():
        made[kind] = args.out / f"imatrix-{kind}.gguf"
        if not made[kind].exists():
            run(made[kind])
    return made


def main() -> None:
    """Measure, quantize, ask, print."""
    parser = argparse.ArgumentParser(description="Does an importance matrix of pruned pictures help?")
    parser.add_argument("model", type=Path, help="the language model in F16")
    parser.add_argument("mmproj", type=Path)
    parser.add_argument("--measure", type=Path, required=True, help="questions that the matrices are measured on")
    parser.add_argument("--text", type=Path, required=True, help="a text for the matrix of text")
    parser.add_argument("--test", type=Path, required=True, help="questions about other pictures")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--keep-ratio", type=float, default=0.125)
    parser.add_argument("--limit", type=int, help="the first questions of --test only")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config, questions = qap.PruneConfig(keep_ratio=args.keep_ratio), load_questions(args.test, args.limit)
    matrices, truth = measure(args, config), args.out / "truth"
    exact = ask(args.model, args.mmproj, questions, config, args.out, truth, args.threads)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in args.types.split(","):
        for kind in KINDS:
            path = args.out / f"{name}-{kind}.gguf"
            try:
                if not path.exists():
                    quantize(args.model, path, type=name, imatrix=matrices.get(kind))
            except ConvertError as err:  # a type that needs a matrix
                print(f"{name}, {kind}: {err}\n")
                continue
            found[name, kind] = ask(path, args.mmproj, questions, config, args.out, truth, args.threads)
    for way, _ in ways(config):
        right = [row["right"] for row in exact if row["way"] == way]
        print(f"## {way}: {len(right)} questions, F16 answers {100 * float(np.mean(right)):.2f} % rightly\n")
        print(markdown(table(found, way, "right", questions)) + "\n")
        print(markdown(table(found, way, "kl", questions)) + "\n")


if __name__ == "__main__":
    main()
