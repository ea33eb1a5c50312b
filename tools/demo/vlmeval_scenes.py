#!/usr/bin/env python3
"""A file of questions as a data set of VLMEvalKit: one TSV with the pictures in base64.

    python tools/demo/vlmeval_scenes.py scenes/questions.jsonl --out LMUData/emoji_scenes.tsv

Columns: index, image, question, answer, answers, category (our kind). A picture stands in the row of its first
question; further rows name that row's index, which VLMEvalKit allows. One answer is given ten times, as if VQA's ten
people agreed, because its class VizWiz counts VQA's soft accuracy. Choices are left out: the answer is asked for
freely. docs/evaluation.md has the commands.
"""

from __future__ import annotations

import argparse
import base64
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from qap_gguf.errors import QapError
from qap_gguf.eval import Question, load_questions
from qap_gguf.files.atomic import replacing

COLUMNS: Final = ("index", "image", "question", "answer", "answers", "category")
PEOPLE: Final = 10  #: that VQA v2 asked each question


def rows(questions: Iterable[Question]) -> Iterator[tuple[str, ...]]:
    """The rows of the TSV, in the order of the questions; indices count from 0."""
    first: dict[Path, int] = {}
    for index, question in enumerate(questions):
        place = first.setdefault(question.image, index)
        image = base64.b64encode(question.image.read_bytes()).decode("ascii") if place == index else str(place)
        answers = list(question.answers) or [question.answer] * PEOPLE
        yield str(index), image, question.text, question.answer, repr(answers), question.kind


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(description="Write a file of questions as a data set of VLMEvalKit.")
    parser.add_argument("data", type=Path, help="questions.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="TSV", help="its name is the data set's")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    args = parser.parse_args(argv)
    try:
        questions = load_questions(args.data, args.limit)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows(questions))
    except (QapError, OSError) as err:
        print(f"vlmeval_scenes: error: {err}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
