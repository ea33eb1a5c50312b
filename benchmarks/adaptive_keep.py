#!/usr/bin/env python3
"""Is a K of each picture's own better than one part for all? Rules choose K by the picture, at the same mean K.

    python benchmarks/adaptive_keep.py scenes/questions.jsonl --out results-adaptive --write docs/results.md

Tokens are chosen by `coverage`, whose choice of K - 1 tokens is that of K without the last one, so a rule only says
where to stop. Each looks at one number that grows with K, and stops where that reaches a threshold:

- coverage: how much of the picture the kept tokens stand for, by what `coverage` maximises: facility location over the
  cosines, relative to that of all tokens.
- gain: the same sum's next gain has fallen to a part of the whole. (At a given sum of all K this makes the sum over the
  pictures largest, the other makes the smallest one large.)
- spectrum: the part of all eigenvalues of the table of cosines that the K largest have; it knows no choice of tokens.

The threshold is the largest whose mean K over the questions is at most that of the fixed part; no answer is looked at
for it. Each picture is encoded once, and no question is asked twice with the same K. What is in --out is not asked
again. Intervals are 95 %, paired, by a bootstrap over pictures; bold where they exclude 0. The table goes to
OUT/table.md, and with --write into FILE, between the lines `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from compare import cell
from imatrix_tables import Answers, check_run, interval
from qap_gguf.errors import QapError
from qap_gguf.eval import Question, fingerprint, load_questions, markdown
from qap_gguf.eval.report import Table
from qap_gguf.pruning.score import cosines
from qap_gguf.reference.selection import ranks
from results_tables import publish

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
MOST_TOKENS: Final = 12


def greedy(table: Array, weights: Array) -> tuple[list[int], Array]:
    """The tokens in the order in which `coverage` takes them, and what each adds, in parts of what all have together.

    Args:
        table: cosines, shape (n, n).
        weights: of each token, at least 0, shape (n,).

    Example:
        >>> order, gains = greedy(np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]), np.ones(3))
        >>> order, gains.round(2).tolist()
        ([0, 2, 1], [0.63, 0.33, 0.03])
    """
    similar = np.maximum(table, 0.0)
    covered, order, gains = np.zeros(len(table)), [], []
    free = np.ones(len(table), bool)
    while free.any():
        found = np.where(free, weights @ np.maximum(similar - covered[:, None], 0.0), -1.0)
        order.append(int(found.argmax()))
        gains.append(float(found.max()))
        free[order[-1]] = False
        covered = np.maximum(covered, similar[:, order[-1]])
    return order, np.array(gains) / (weights @ covered)


def by_coverage(table: Array, weights: Array) -> Array:
    """What the first K tokens stand for, in parts of the whole."""
    found: Array = np.cumsum(greedy(table, weights)[1])
    return found


def by_gain(table: Array, weights: Array) -> Array:
    """Minus what the next token would add; 0 once all are kept. Ties and rounding may let a gain rise by a trifle."""
    gains = greedy(table, weights)[1]
    found: Array = np.maximum.accumulate(-np.append(gains[1:], 0.0))
    return found


def by_spectrum(table: Array, weights: Array) -> Array:
    """The part that the K largest eigenvalues have of all."""
    values = np.maximum(np.linalg.eigvalsh(table)[::-1], 0.0)
    found: Array = np.cumsum(values) / values.sum()
    return found


RULES: Final[Mapping[str, Callable[[Array, Array], Array]]] = {
    "coverage": by_coverage,
    "gain": by_gain,
    "spectrum": by_spectrum,
}


def first_at(curve: Array, threshold: float) -> int:
    """The smallest K at which a curve that does not fall has reached a threshold, at most its length.

    Example:
        >>> first_at(np.array([0.5, 0.8, 0.9, 1.0]), 0.8), first_at(np.array([0.5, 0.8]), 2.0)
        (2, 2)
    """
    return min(len(curve), int(np.searchsorted(curve, threshold)) + 1)


def counts_at(curves: Sequence[Array], most: float) -> Counts:
    """K of each picture at the largest threshold whose mean K is at most `most`.

    Raises:
        ValueError: `most` is below 1.

    Example:
        >>> counts_at([np.array([0.5, 0.9, 1.0]), np.array([0.1, 0.4, 1.0])], 2.0).tolist()
        [1, 3]
    """
    if most < 1:
        raise ValueError(f"most: expected a mean of at least 1 token, got {most:g}")
    levels = np.unique(np.concatenate(curves))
    low, high = 0, len(levels)  # all thresholds below `low` are small enough, those from `high` on are not
    while low < high:
        middle = (low + high) // 2
        if np.mean([first_at(curve, levels[middle]) for curve in curves]) <= most:
            low = middle + 1
        else:
            high = middle
    return np.array([first_at(curve, levels[max(0, low - 1)]) for curve in curves])


class Study:
    """The questions and their pictures, and which K each rule gives a picture at each ratio.

    Attributes:
        n_tokens: tokens of each question's picture that are no padding.
        counts: (ratio, rule) -> K for each question; the rule "fixed" is that part of the tokens.
    """

    def __init__(
        self, vlm: qap.VisionModel, questions: Sequence[Question], ratios: Sequence[float], config: qap.PruneConfig
    ) -> None:
        self.questions, self.config = questions, config
        pictures = {path: number for number, path in enumerate(dict.fromkeys(q.image for q in questions))}
        images = self._images = [vlm.encode(path) for path in pictures]
        if any(len(image.pieces) > 1 for image in images):
            raise SystemExit("adaptive_keep: error: expected pictures that are encoded as one, got tiles")
        places = self._places = [pictures[q.image] for q in questions]
        tables = [self._inputs(vlm, image) for image in images]
        self.n_tokens = np.array([images[place].n_real for place in places])
        self.counts: dict[tuple[float, str], Counts] = {}
        for ratio in ratios:
            part = config.replace(keep_ratio=ratio)
            self.counts[ratio, "fixed"] = np.array([part.count(int(n)) for n in self.n_tokens])
        for rule, curve_of in RULES.items():
            curves = [curve_of(*inputs) for inputs in tables]
            for ratio in ratios:
                most = float(self.counts[ratio, "fixed"].mean())
                self.counts[ratio, rule] = counts_at([curves[place] for place in places], most)

    def _inputs(self, vlm: qap.VisionModel, image: qap.ImageEmbedding) -> tuple[Array, Array]:
        """Cosines of the tokens that are no padding, and their weights."""
        real = ~image.padding
        table = cosines(np.ascontiguousarray(image.tokens[real]), n_threads=1)
        return np.asarray(table, np.float64), ranks(vlm.score(image, self.config).total[real])

    def ask(self, vlm: qap.VisionModel, known: Answers) -> dict[tuple[int, int], dict[str, Any]]:
        """The answer to each question at each K that a rule gave its picture, and at K = 0, all tokens."""
        found = {(row["number"], row["keep"]): row for row in known.rows}
        by_picture: dict[int, list[int]] = {}
        for number, place in enumerate(self._places):
            by_picture.setdefault(place, []).append(number)
        started = time.perf_counter()
        for place, numbers in by_picture.items():
            for keep in sorted({0, *(int(counts[numbers[0]]) for counts in self.counts.values())}):
                for number in numbers:
                    if (number, keep) not in found:
                        row = {"number": number, "keep": keep, **self._answer(vlm, number, keep)}
                        known.add(row)
                        found[number, keep] = row
            if (place + 1) % 20 == 0:
                seconds = time.perf_counter() - started
                print(f"{place + 1} of {len(by_picture)} pictures, {seconds:.0f} s", file=sys.stderr, flush=True)
        return found

    def _answer(self, vlm: qap.VisionModel, number: int, keep: int) -> dict[str, Any]:
        prune = self.config.replace(n_keep=keep) if keep else None
        question, image = self.questions[number], self._images[self._places[number]]
        said = vlm.generate([image, question.text], prune=prune, max_tokens=MOST_TOKENS, temperature=0.0)
        return {"said": said, "right": question.score(said)}


def percent(values: Array, pictures: Sequence[Path]) -> str:
    """Mean in per cent, and its interval."""
    found = interval(values, pictures)
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def table_of(study: Study, found: Mapping[tuple[int, int], Mapping[str, Any]]) -> Table:
    """A row for all tokens, then one for each ratio and rule: K, right answers, and those minus the fixed K's."""
    pictures = [question.image for question in study.questions]

    def right(counts: Counts) -> Array:
        return np.array([found[number, int(keep)]["right"] for number, keep in enumerate(counts)], np.float64)

    dense = right(np.zeros(len(pictures), np.int64))
    body: list[tuple[str, ...]] = [
        ("all", "", f"{study.n_tokens.mean():.1f}", f"{study.n_tokens.min()} to {study.n_tokens.max()}",
         percent(dense, pictures), "")
    ]  # fmt: skip
    for (ratio, rule), counts in study.counts.items():
        low, high = np.quantile(counts, [0.05, 0.95], method="inverted_cdf")
        mine, theirs = right(counts), right(study.counts[ratio, "fixed"])
        versus = "" if rule == "fixed" else cell(interval(mine - theirs, pictures))
        body.append((f"{ratio:g}", rule, f"{counts.mean():.1f}", f"{low} to {high}", percent(mine, pictures), versus))
    body[1:] = sorted(body[1:], key=lambda row: -float(row[0]))  # stable: rules stay in their order
    return ("part", "K by", "K, mean", "K, 5 to 95 %", "right, %", "minus fixed"), body


def main() -> None:
    """Encode, choose, ask, print."""
    parser = argparse.ArgumentParser(description="Is a K of each picture's own better than one part for all?")
    parser.add_argument("data", type=Path, help="questions.jsonl")
    parser.add_argument("-m", "--model", type=Path, help="the language model (default: the packaged pair)")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--ratios", default="0.25,0.125", metavar="LIST", help="parts of the tokens, with commas")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="adaptive", help="of the table (default: adaptive)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into FILE too")
    args = parser.parse_args()
    packaged = qap.packaged_model()
    model, mmproj = args.model or packaged.model, args.mmproj or packaged.mmproj
    questions = load_questions(args.data, args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    config = qap.PruneConfig(select="coverage")
    files = {"data": args.data, "model": model, "mmproj": mmproj}
    check_run(args.out, {name: fingerprint(file) for name, file in files.items()} | {"config": config.to_dict()})
    with qap.VisionModel(mmproj, model, n_threads=args.threads) as vlm:
        study = Study(vlm, questions, [float(part) for part in args.ratios.split(",")], config)
        found = study.ask(vlm, Answers(args.out / "answers.jsonl"))
    n_pictures = len({question.image for question in questions})
    text = f"{markdown(table_of(study, found))}\n\n{len(questions)} questions about {n_pictures} pictures."
    publish(text, args.out / "table.md", args.write, args.name)


if __name__ == "__main__":
    try:
        main()
    except QapError as err:
        raise SystemExit(f"adaptive_keep: error: {err}") from err
