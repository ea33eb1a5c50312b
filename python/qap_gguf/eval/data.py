"""Questions with known answers, and what counts as the right answer.

The file format is this project's own (tools/make_scenes.py writes it): one JSON object for each line with the texts
image (a path relative to the file), question, answer and, optionally, kind.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qap_gguf.errors import DataError

_REQUIRED: Final = ("image", "question", "answer")
_TRAILING: Final = ".,;:!?"


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        image: path of the picture.
        text: the question.
        answer: the right answer.
        kind: what sort of question it is, for the breakdown; "any" where the file does not say.
    """

    image: Path
    text: str
    answer: str
    kind: str = "any"


def normalise(answer: str) -> str:
    """Return an answer as it is compared: lower case, without surrounding space and trailing punctuation.

    Example:
        >>> normalise("  Row 2, column 3. ")
        'row 2, column 3'
    """
    return answer.strip().rstrip(_TRAILING + string.whitespace).lower()


def is_right(said: str, answer: str) -> bool:
    """Whether two answers are the same once normalised.

    Example:
        >>> is_right("Yes!", "yes"), is_right("yes it is", "yes")
        (True, False)
    """
    return normalise(said) == normalise(answer)


def _question(row: Any, folder: Path, where: str) -> Question:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key] for key in _REQUIRED):
        raise DataError(f"{where}: expected an object with the texts image, question and answer; correct the line")
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
    return Question(image, row["question"], row["answer"], kind)


def load_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Read a file of questions.

    Args:
        path: JSON lines, see above. Blank lines are passed over.
        limit: read the first questions only; None reads all.

    Returns:
        At least one question, in the order of the file.

    Raises:
        DataError: the file or a picture is missing, a line is not as described, or there is no question.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
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
        questions.append(_question(row, path.parent, where))
    if not questions:
        raise DataError(f"{path}: expected at least one question, got none; write one JSON object for each line")
    return questions
