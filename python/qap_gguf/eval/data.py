"""Questions with known answers.

The file format is ours (tools/demo/make_scenes.py writes it): one JSON object for each line with the texts
image (a path relative to the file), question, answer and, optionally, kind; instead of answer, answers (a list, what
several people said); choices (a list that holds the answer) makes it multiple choice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qap_gguf.errors import ConfigError, DataError
from qap_gguf.eval.scoring import SCORINGS, is_right, yes_or_no
from qap_gguf.files.regular import read_text

_FORM: Final = "an object with the texts image, question and answer"


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        image: path of the picture.
        text: the question.
        answer: the right answer, the first of several.
        kind: what sort of question it is, for the breakdown; "any" where the file does not say.
        answers: all right answers; () means `answer` alone.
        choices: what a multiple choice chooses from; () for a free answer.
        scoring: a key of ``SCORINGS``.
    """

    image: Path
    text: str
    answer: str
    kind: str = "any"
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    scoring: str = "exact"

    def score(self, said: str) -> float:
        """What an answer is worth, 0..1.

        Example:
            >>> Question(Path("a.png"), "What?", "dog").score(" Dog.")
            1.0
        """
        return SCORINGS[self.scoring](said, self.answers or (self.answer,))


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = row.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise DataError(f"{where}: {key} must be a list of texts, got {str(values)[:40]}; correct the line")
    return tuple(values)


def _scoring(asked: str, answers: tuple[str, ...], choices: tuple[str, ...], where: str) -> str:
    """The scoring of one row: the one that was asked for, or what the row suggests."""
    found = asked if asked != "auto" else "choice" if choices else "vqa" if len(answers) > 1 else "exact"
    if found == "choice" and not choices:
        raise DataError(f"{where}: multiple choice needs choices, got none; add them or take another scoring")
    if found == "yesno" and not yes_or_no(answers[0]):
        raise DataError(f"{where}: yesno needs the answer yes or no, got {answers[0]!r}; take another scoring")
    return found


def _question(row: Any, folder: Path, where: str, scoring: str, need_answers: bool) -> Question:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected {_FORM}; correct the line")
    answers, choices = _texts(row, "answers", where), _texts(row, "choices", where)
    row = row if "answer" in row or not answers else row | {"answer": answers[0]}
    needed = ("image", "question", "answer") if need_answers or "answer" in row else ("image", "question")
    if not all(isinstance(row.get(key), str) and row[key] for key in needed):
        raise DataError(f"{where}: expected {_FORM}; correct the line")
    kind = row.get("kind", "any")
    if not isinstance(kind, str):
        raise DataError(f"{where}: kind must be a text, got {kind!r}; correct the line")
    image = folder / row["image"]
    try:
        is_there = image.is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_there = False
    if not is_there:
        raise DataError(f"{where}: no picture at {image}; paths are relative to the file of questions")
    if "answer" not in row:
        return Question(image, row["question"], "", kind)
    answer = row["answer"]
    if choices and not any(is_right(answer, choice) for choice in choices):
        raise DataError(f"{where}: the answer must be one of the choices, got {answer!r}; correct the line")
    found = _scoring(scoring, answers or (answer,), choices, where)
    return Question(image, row["question"], answer, kind, answers, choices if found == "choice" else (), found)


def load_questions(
    path: str | Path, limit: int | None = None, scoring: str = "auto", *, need_answers: bool = True
) -> list[Question]:
    """Read a file of questions.

    Args:
        path: JSON lines, see above. Blank lines are passed over.
        limit: read the first questions only; None reads all.
        scoring: a key of ``SCORINGS``, or "auto": choice where there are choices, vqa where there are several answers,
            else exact.
        need_answers: refuse rows without an answer; else theirs is "".

    Returns:
        At least one question, in the order of the file.

    Raises:
        ConfigError: an unknown scoring.
        DataError: the file or a picture is missing, a line is not as described, or there is no question.
    """
    if scoring != "auto" and scoring not in SCORINGS:
        raise ConfigError(f"scoring: expected auto, {', '.join(SCORINGS)}, got {scoring!r}; choose one of these")
    path = Path(path)
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: expected a readable file of JSON lines, got {err}; check the path") from err
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(questions) >= limit:
            break
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise DataError(f"{where}: expected a JSON object, got {line[:40]!r}; correct the line") from err
        questions.append(_question(row, path.parent, where, scoring, need_answers))
    if not questions:
        raise DataError(f"{path}: expected at least one question, got none; write one JSON object for each line")
    return questions
