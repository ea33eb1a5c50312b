"""Questions for training the demonstration models: many about one scene, packed side by side behind the picture.

The questions of a scene share its image tokens and do not see each other: each is a branch whose positions go on
where the image ends, as if it were asked alone. One pass over the image serves them all. Rows are padded on the left,
so that the answers of all branches end in the last column. Prompt: the chat template of the checkpoint, with the
image in front.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoji_scenes import COLORS, EMOJI, GRID, NAMES, NUMBERS, Question, Scene, caption

IGNORED: Final = -100  #: label of a token that is not learnt
_FILL: Final = 2  # a token that nothing looks at
#: Kind of question -> how often it is asked before anything is known. "row" (how many objects are in a row) is a step
#: towards "count" that no table asks.
KINDS: Final = {"at": 4.0, "is": 4.0, "where": 4.0, "count": 2.0, "color": 0.7, "row": 0.7}

Tokenize = Callable[[str], list[int]]


class Asked(NamedTuple):
    """A question as a lesson.

    Attributes:
        question: with its right answer.
        to_name: the text from the start to the name that the model must look for; "" if it looks for none.
        cells: numbers (row * 4 + column) of the cells where that object is; none if it is absent.
    """

    question: Question
    to_name: str = ""
    cells: tuple[int, ...] = ()


class Packed(NamedTuple):
    """b scenes with q questions each, as arrays; n columns, of which the last m hold labels.

    Attributes:
        tokens: int64 (b, q, n).
        labels: the next token where it belongs to an answer, else ``IGNORED``, int64 (b, q, n).
        position: of a token after the image's last, int64 (b, q, n); 0 in padding.
        real: False in padding, bool (b, q, n).
        name: column of the last token of the name that is looked for, -1 without one, int64 (b, q).
        m: columns that any answer needs.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    position: NDArray[np.int64]
    real: NDArray[np.bool_]
    name: NDArray[np.int64]
    m: int


def _search(kind: str, name: str) -> tuple[str, str]:
    """(question, its text up to the name) of the kinds that look for an object."""
    start = f"Is there a {name}" if kind == "is" else f"Where is the {name}"
    return f"{start}?", f"\n{start}"


def ask_one(rng: random.Random, scene: Scene, kind: str) -> Asked:
    """Ask a question of that kind about a scene of cells; "where" becomes "is" if no object is there only once.

    Example:
        >>> import numpy as np
        >>> from emoji_scenes import Placed
        >>> scene = Scene(np.zeros((192, 192, 3), np.uint8), (Placed("🐶", 1, 2),), "red")
        >>> asked = ask_one(random.Random(0), scene, "where")
        >>> asked.question.text, asked.question.answer, asked.cells
        ('Where is the dog?', 'row 2, column 3', (6,))
    """
    at = {placed.cell: placed.emoji for placed in scene.objects}
    present = sorted(set(at.values()), key=EMOJI.index)
    cells = {emoji: tuple(cell for cell, other in at.items() if other == emoji) for emoji in present}
    once = [emoji for emoji in present if len(cells[emoji]) == 1]
    if kind == "where" and not once:
        kind = "is"
    if kind == "is":
        absent = [emoji for emoji in EMOJI if emoji not in cells]
        emoji = rng.choice(present if rng.random() < 0.5 else absent)
        text, to_name = _search(kind, NAMES[emoji])
        return Asked(Question(text, "yes" if emoji in cells else "no", kind), to_name, cells.get(emoji, ()))
    if kind == "where":
        emoji = rng.choice(once)
        row, column = divmod(cells[emoji][0], GRID)
        text, to_name = _search(kind, NAMES[emoji])
        return Asked(Question(text, f"row {row + 1}, column {column + 1}", kind), to_name, cells[emoji])
    if kind == "at":
        cell = rng.choice(list(at))
        row, column = divmod(cell, GRID)
        return Asked(Question(f"What is in row {row + 1}, column {column + 1}?", NAMES[at[cell]], kind))
    if kind == "row":
        row = rng.randrange(GRID)
        n = sum(cell // GRID == row for cell in at)
        return Asked(Question(f"How many objects are in row {row + 1}?", NUMBERS[n], kind))
    if kind == "count":
        return Asked(Question("How many objects are there?", NUMBERS[len(scene.objects)], kind))
    if kind == "caption":
        return Asked(caption(scene.objects))
    return Asked(Question("What color is the background?", scene.background, kind))


def ask_some(rng: random.Random, scene: Scene, n: int, right: Mapping[str, float]) -> list[Asked]:
    """Ask `n` questions, kinds more often that are answered less well; `right`: kind -> share of right answers."""
    weights = [often * (0.25 + 1.5 * (1 - right.get(kind, 0.5))) for kind, often in KINDS.items()]
    return [ask_one(rng, scene, kind) for kind in rng.choices(list(KINDS), weights, k=n)]


def branch(tokenize: Tokenize, question: Question) -> tuple[list[int], list[int]]:
    """(tokens of the question after the image, tokens of the answer and its end)."""
    asked = tokenize(f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
    return asked, tokenize(f"{question.answer}<|im_end|>")


def pack(tokenize: Tokenize, scenes: Sequence[Sequence[Asked]]) -> Packed:
    """Pack the questions of some scenes, equally many for each."""
    b, q = len(scenes), len(scenes[0])
    rows = [branch(tokenize, asked.question) for scene in scenes for asked in scene]
    lessons = [asked for scene in scenes for asked in scene]
    n = max(len(asked) + len(answer) - 1 for asked, answer in rows)
    tokens, labels = np.full((b * q, n), _FILL, np.int64), np.full((b * q, n), IGNORED, np.int64)
    position, real = np.zeros((b * q, n), np.int64), np.zeros((b * q, n), bool)
    name = np.full(b * q, -1, np.int64)
    for i, (asked, answer) in enumerate(rows):
        size = len(asked) + len(answer) - 1  # the last token has nothing to predict
        tokens[i, n - size :], position[i, n - size :] = (asked + answer)[:-1], np.arange(size)
        labels[i, n - len(answer) :], real[i, n - size :] = answer, True
        if lessons[i].to_name:
            name[i] = n - size + len(tokenize(lessons[i].to_name)) - 1
    m = max(len(answer) for _, answer in rows)
    shape = (b, q, n)
    return Packed(
        tokens.reshape(shape),
        labels.reshape(shape),
        position.reshape(shape),
        real.reshape(shape),
        name.reshape(b, q),
        m,
    )


def texts_in_use() -> list[str]:
    """Texts that hold every word of all questions and answers, each as it is tokenized there."""
    names = list(NAMES.values())
    asked = [_search(kind, name)[0] for name in names for kind in ("is", "where")]
    asked += [f"What is in row {row}, column {column}?" for row in range(1, 5) for column in range(1, 5)]
    asked += [f"How many objects are in row {row}?" for row in range(1, 5)]
    asked += ["How many objects are there?", "What color is the background?", "What is in the picture?"]
    answers = [*names, *COLORS, *NUMBERS, "yes", "no", *(f"row {i}, column {i}" for i in range(1, 5))]
    answers += [f"{name} in row 1, column 2; {name} in row 3, column 4" for name in names]
    return [f"\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in asked] + [
        f"{text}<|im_end|>" for text in answers
    ]
