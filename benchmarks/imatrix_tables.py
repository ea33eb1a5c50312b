#!/usr/bin/env python3
"""Does an importance matrix of pruned pictures help? One F16 model in several types, with four kinds of matrix.

    python benchmarks/imatrix_tables.py model-F16.gguf mmproj-f16.gguf --measure train/questions.jsonl \\
        --text wiki.txt --test held-out/questions.jsonl --keep-ratio 0.125 --out results-imatrix

Matrices: none, text (chunks of --text), dense (pictures of --measure with all tokens), pruned (the same with a part of
them). Each quantized model answers the questions of --test, with all tokens and with that part, and its logits of the
first token are compared with the F16 model's (KL divergence in nats, 0 where they agree). What is in --out is not made
again, so that the script goes on where it was stopped; answers are appended as they come. Every picture is encoded once
for all models. Intervals are 95 %, paired, by a bootstrap over pictures; bold where they exclude 0. A type that needs a
matrix has "-" without one. Tables go to OUT/tables.md, and with --write into FILE, between the lines
`<!-- table NAME -->` (--name) and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from compare import cell
from qap_gguf.convert import quantize
from qap_gguf.errors import ConvertError, QapError
from qap_gguf.eval import Question, fingerprint, load_questions, markdown, measure_imatrix
from qap_gguf.eval.report import Table
from results_tables import publish

Array = npt.NDArray[np.float64]
KINDS = ("none", "text", "dense", "pruned")
TYPES = "Q4_0,Q4_K_M,Q3_K_S,Q2_K,IQ2_XS,IQ1_M"
RESAMPLES, MOST_TOKENS, CACHE = 2000, 12, 2 << 30
KEYS = {"right": "points", "kl": "1/1000 nat"}  # what is compared, and the unit of its differences


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
        if text and not text.endswith("\n"):  # the last line was cut off
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


class Asker:
    """Asks one model after another the same questions; the F16 model, whose logits are the truth, comes first."""

    def __init__(self, args: argparse.Namespace, questions: Sequence[Question], config: qap.PruneConfig) -> None:
        self._mmproj, self._out, self._threads = args.mmproj, args.out, args.threads
        self._questions, self._cache = questions, qap.EmbeddingCache(max_bytes=CACHE)
        self.ways: dict[str, qap.PruneConfig | None] = {
            "all tokens": None,
            f"{config.keep_ratio:g} of the tokens": config,
        }
        self._truth = args.out / "truth"
        self._truth.mkdir(exist_ok=True)

    def ask(self, model: Path, *, is_truth: bool = False) -> list[dict[str, Any]]:
        """A row for each way and question, in that order: a picture stays in the KV cache for all of its questions."""
        known = Answers(self._out / f"{model.stem}.jsonl")
        jobs = [(way, number) for way in self.ways for number in range(len(self._questions))]
        if len(known.rows) >= len(jobs):
            return known.rows
        started = time.perf_counter()
        with qap.VisionModel(self._mmproj, model, n_threads=self._threads, cache=self._cache) as vlm:
            last, image = Path(), None
            for way, number in jobs[len(known.rows) :]:
                question = self._questions[number]
                if question.image != last:
                    last, image = question.image, vlm.encode(question.image)
                generation = vlm.generate(
                    [image, question.text], prune=self.ways[way], max_tokens=MOST_TOKENS, temperature=0.0, stream=True
                )
                found, file = log_softmax(vlm.last_logits()), self._truth / f"{number}-{way[:3]}.npy"
                if is_truth:
                    np.save(file, found)
                said = "".join(generation)
                row = {"number": number, "way": way, "said": said, "right": question.score(said)}
                known.add(row | {"kl": divergence(np.load(file), found)})
        print(f"{model.stem}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return known.rows


def interval(values: Array, pictures: Sequence[Path]) -> dict[str, float]:
    """Mean, and its interval by a bootstrap over pictures."""
    names, places = np.unique([str(picture) for picture in pictures], return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places)
    draws = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


Found = dict[tuple[str, str], list[dict[str, Any]]]  #: (type, matrix) -> its answers


def column(found: Found, name: str, kind: str, way: str, key: str) -> Array | None:
    """Of each question, in hundredths of the unit that is printed; None where the type cannot be without a matrix."""
    rows = found.get((name, kind))
    scale = 10 if key == "kl" else 1
    return None if rows is None else scale * np.array([row[key] for row in rows if row["way"] == way], np.float64)


def table(found: Found, types: Sequence[str], way: str, pictures: Sequence[Path]) -> Table:
    """A row for each type and matrix: right answers and divergence, and how they differ from those without a matrix."""
    body: list[tuple[str, ...]] = []
    for name in types:
        for kind in KINDS:
            cells = []
            for key in KEYS:
                mine, none = (column(found, name, one, way, key) for one in (kind, "none"))
                if mine is None:
                    cells += ["-", ""]
                    continue
                versus = "" if none is None or kind == "none" else cell(interval(mine - none, pictures))
                cells += [f"{100 * mine.mean():.1f}", versus]
            body.append((name, kind, *cells))
    return ("type", "imatrix", "right, %", "minus none", "KL, 1/1000 nat", "minus none"), body


def over_types(found: Found, types: Sequence[str], way: str, key: str, pictures: Sequence[Path]) -> Table:
    """The difference between two matrices, mean over the types that both were used with."""
    body = []
    for kind in KINDS[1:]:
        cells = []
        for other in KINDS[:-1]:
            pairs = [(column(found, name, kind, way, key), column(found, name, other, way, key)) for name in types]
            whole = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
            before = KINDS.index(other) < KINDS.index(kind)
            cells.append(cell(interval(np.mean(whole, axis=0), pictures)) if before and whole else "")
        body.append((kind, *cells))
    return (f"imatrix, {KEYS[key]}", *(f"minus {kind}" for kind in KINDS[:-1])), body


def measure(args: argparse.Namespace, config: qap.PruneConfig) -> dict[str, Path]:
    """The imatrix files by kind."""
    made: dict[str, Path] = {}
    common: dict[str, Any] = {"model": args.model, "n_threads": args.threads}
    runs: dict[str, Callable[[Path], Any]] = {
        "text": lambda path: measure_imatrix(args.text, path, text=True, chunk=args.chunk, limit=args.chunks, **common),
        "dense": lambda path: measure_imatrix(args.measure, path, mmproj=args.mmproj, prune=None, **common),
        "pruned": lambda path: measure_imatrix(args.measure, path, mmproj=args.mmproj, prune=config, **common),
    }
    for kind, run in runs.items():
        made[kind] = args.out / f"imatrix-{kind}.gguf"
        if not made[kind].exists():
            print(f"imatrix, {kind}: {run(made[kind]).seconds:.0f} s", file=sys.stderr, flush=True)
    return made


def check_run(out: Path, run: Mapping[str, Any]) -> None:
    """What is in `out` was made from the same files with the same settings; an empty folder is noted as this run's."""
    file = out / "run.json"
    if not file.exists():
        file.write_text(json.dumps(run), encoding="utf-8")
    theirs = json.loads(file.read_text(encoding="utf-8"))
    differs = [name for name in run if theirs.get(name) != run[name]]
    if differs:
        raise SystemExit(f"error: {out} is of a run with another {', '.join(differs)}; choose another --out")


def run_of(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change between two runs with the same --out."""
    run: dict[str, Any] = {name: fingerprint(getattr(args, name)) for name in ("model", "mmproj", "measure", "text")}
    run |= {name: getattr(args, name) for name in ("keep_ratio", "limit", "chunk", "chunks")}
    return run | {"test": fingerprint(args.test)}


def report(
    types: Sequence[str], asker: Asker, found: Found, exact: Sequence[dict[str, Any]], pictures: Sequence[Path]
) -> str:
    """All tables as Markdown."""
    parts = []
    for way in asker.ways:
        right = [row["right"] for row in exact if row["way"] == way]
        parts.append(f"With {way}: {len(right)} questions, of which F16 answers {100 * float(np.mean(right)):.1f} %.")
        parts.append(markdown(table(found, types, way, pictures)))
        parts.append("Mean over the types, right answers and divergence:")
        parts += [markdown(over_types(found, types, way, key, pictures)) for key in KEYS]
    return "\n\n".join(parts)


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
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a chunk of text")
    parser.add_argument("--chunks", type=int, help="the first chunks of --text only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into FILE too")
    parser.add_argument("--name", default="imatrix", help="the tables' name in FILE (default: imatrix)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    check_run(args.out, run_of(args))
    config, questions = qap.PruneConfig(keep_ratio=args.keep_ratio), load_questions(args.test, args.limit)
    matrices, asker = measure(args, config), Asker(args, questions, config)
    exact = asker.ask(args.model, is_truth=True)
    found: Found = {}
    for name in args.types.split(","):
        for kind in KINDS:
            path = args.out / f"{name}-{kind}.gguf"
            try:
                if not path.exists():
                    quantize(args.model, path, type=name, imatrix=matrices.get(kind))
            except ConvertError as err:  # a type that needs a matrix
                print(f"{name}, {kind}: {err}", file=sys.stderr, flush=True)
                continue
            found[name, kind] = asker.ask(path)
    text = report(args.types.split(","), asker, found, exact, [question.image for question in questions])
    publish(text, args.out / "tables.md", args.write, args.name)


if __name__ == "__main__":
    try:
        main()
    except QapError as err:
        raise SystemExit(f"imatrix_tables: error: {err}") from err
