"""Harder emoji scenes: counting among distractors, relations, small objects, rows of objects as small as letters, and
wide pictures that a model pads.

They ask more of the picture than plain scenes do: every instance (distractors), exact places (relations), single
patches (small), many objects in neighbouring patches (rows), where dropping a token drops an object. tiny-llava was
trained on plain scenes only: it knows the questions of `small` and `wide`, and not those of the other three.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from PIL import Image

from emoji_scenes import (
    CELL,
    COLORS,
    EMOJI,
    GRID,
    NAMES,
    NUMBERS,
    PLAIN,
    SIZE,
    Placed,
    Question,
    Scene,
    Sprite,
    add_noise,
    draw_object,
    make_question,
    make_scene,
)

COUNTS: Final = (*NUMBERS, "seven", "eight")
ORDINALS: Final = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
PITCH: Final = 20  #: pixels from one object of a row to the next, a little more than a patch
_LINE: Final = 24  # pixels from one row to the next
_SMALL: Final = (12, 20)
#: Words of a relation -> step in rows and columns.
RELATIONS: Final = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
NOTHING: Final = "nothing"
_ALIKE: Final = 3  # neighbours in EMOJI are of one sort: animals with animals, food with food


def _canvas(rng: random.Random) -> tuple[str, Image.Image]:
    background = rng.choice(list(COLORS))
    return background, Image.new("RGB", (SIZE, SIZE), COLORS[background])


def _cells(rng: random.Random, n: int) -> list[tuple[int, int]]:
    return rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], n)


def make_distractors(rng: random.Random, sprite: Sprite) -> Scene:
    """One sort of object up to six times, among two to six others of which some look alike."""
    background, image = _canvas(rng)
    at = rng.randrange(len(EMOJI))
    alike = [EMOJI[(at + step) % len(EMOJI)] for step in range(-_ALIKE, _ALIKE + 1) if step]
    others = [rng.choice(alike) if rng.random() < 0.5 else rng.choice(EMOJI) for _ in range(rng.randint(2, 6))]
    sorts = [EMOJI[at]] * rng.randint(1, 6) + others
    objects = [Placed(emoji, *cell) for emoji, cell in zip(sorts, _cells(rng, len(sorts)), strict=True)]
    for placed in objects:
        draw_object(rng, image, sprite, placed, PLAIN.sizes)
    return Scene(add_noise(rng, image), tuple(objects), background)


def ask_distractors(rng: random.Random, scene: Scene) -> Question:
    """How many there are of one sort, none now and then."""
    counts = {emoji: sum(placed.emoji == emoji for placed in scene.objects) for emoji in EMOJI}
    present = [emoji for emoji in EMOJI if 0 < counts[emoji] < len(NUMBERS)]
    absent = [emoji for emoji in EMOJI if not counts[emoji]]
    emoji = rng.choice(absent if rng.random() < 0.15 else present)
    return Question(f"How many times does the {NAMES[emoji]} appear?", NUMBERS[counts[emoji]], "distractors")


def make_relations(rng: random.Random, sprite: Sprite) -> Scene:
    """Four to nine objects, all different."""
    background, image = _canvas(rng)
    n_objects = rng.randint(4, 9)
    objects = [Placed(e, *cell) for e, cell in zip(rng.sample(EMOJI, n_objects), _cells(rng, n_objects), strict=True)]
    for placed in objects:
        draw_object(rng, image, sprite, placed, PLAIN.sizes)
    return Scene(add_noise(rng, image), tuple(objects), background)


def ask_relations(rng: random.Random, scene: Scene) -> Question:
    """What is in the next cell, mostly where there is something."""
    at = {(placed.row, placed.column): placed.emoji for placed in scene.objects}
    pairs = [(placed, words) for placed in scene.objects for words in RELATIONS]
    full = [(p, w) for p, w in pairs if (p.row + RELATIONS[w][0], p.column + RELATIONS[w][1]) in at]
    placed, words = rng.choice(full if full and rng.random() < 0.8 else pairs)
    step = RELATIONS[words]
    found = at.get((placed.row + step[0], placed.column + step[1]))
    answer = NOTHING if found is None else NAMES[found]
    return Question(f"What is directly {words} the {NAMES[placed.emoji]}?", answer, "relations")


def make_small(rng: random.Random, sprite: Sprite) -> Scene:
    """Two to six objects of 12 to 20 pixels, about one patch each."""
    background, image = _canvas(rng)
    n_objects = rng.randint(2, 6)
    objects = [Placed(rng.choice(EMOJI), *cell) for cell in _cells(rng, n_objects)]
    for placed in objects:
        draw_object(rng, image, sprite, placed, _SMALL)
    return Scene(add_noise(rng, image), tuple(objects), background)


def ask_small(rng: random.Random, scene: Scene) -> Question:
    """The questions of plain scenes."""
    question = make_question(rng, scene)
    return question._replace(kind=f"small-{question.kind}")


def make_rows(rng: random.Random, sprite: Sprite) -> Scene:
    """One to three lines of four to eight objects of 16 pixels, as letters stand in words."""
    background, image = _canvas(rng)
    objects = []
    top = rng.randint(4, SIZE - 3 * _LINE - 4)
    for line in range(rng.randint(1, 3)):
        n_objects = rng.randint(4, 8)
        left = rng.randint(2, SIZE - n_objects * PITCH - 2)
        for i in range(n_objects):
            placed = Placed(rng.choice(EMOJI), line, i)
            picture = sprite(placed.emoji, 16)
            image.paste(picture, (left + i * PITCH, top + line * _LINE), picture)
            objects.append(placed)
    return Scene(add_noise(rng, image), tuple(objects), background)


def ask_rows(rng: random.Random, scene: Scene) -> Question:
    """Which object stands at a place of a line, or how many stand in it."""
    placed = rng.choice(scene.objects)
    line = ORDINALS[placed.row]
    if rng.random() < 0.25:
        n_objects = sum(other.row == placed.row for other in scene.objects)
        return Question(f"How many objects are in the {line} line?", COUNTS[n_objects], "rows-count")
    text = f"What is the {ORDINALS[placed.column]} object in the {line} line?"
    return Question(text, NAMES[placed.emoji], "rows-at")


def make_wide(rng: random.Random, sprite: Sprite) -> Scene:
    """Two to six objects in the two middle rows, and only that band of the picture: 192 x 96 pixels.

    A model that pads pictures to a square puts the band back in the middle, so rows are named as in the square: the
    upper row of the band is row 2. Half of the patches are padding.
    """
    background, image = _canvas(rng)
    cells = [(row, column) for row in range(1, GRID - 1) for column in range(GRID)]
    objects = [Placed(rng.choice(EMOJI), *cell) for cell in rng.sample(cells, rng.randint(2, 6))]
    for placed in objects:
        draw_object(rng, image, sprite, placed, PLAIN.sizes)
    return Scene(add_noise(rng, image)[CELL : SIZE - CELL], tuple(objects), background)


def ask_wide(rng: random.Random, scene: Scene) -> Question:
    """The questions of plain scenes."""
    question = make_question(rng, scene)
    return question._replace(kind=f"wide-{question.kind}")


Draw = Callable[[random.Random, Sprite], Scene]
Ask = Callable[[random.Random, Scene], Question]
#: Kind of scene -> how to draw one and how to ask about it.
SCENE_KINDS: Final[dict[str, tuple[Draw, Ask]]] = {
    "plain": (make_scene, make_question),
    "distractors": (make_distractors, ask_distractors),
    "relations": (make_relations, ask_relations),
    "small": (make_small, ask_small),
    "rows": (make_rows, ask_rows),
    "wide": (make_wide, ask_wide),
}


def add_choices(rng: random.Random, question: Question, n: int) -> list[str]:
    """Return `n` different choices of the answer's sort in random order, the right one among them, or all there are.

    Example:
        >>> sorted(add_choices(random.Random(0), Question("Is there a dog?", "yes", "is"), 4))
        ['no', 'yes']
    """
    places = [f"row {row + 1}, column {column + 1}" for row in range(GRID) for column in range(GRID)]
    sorts: list[list[str]] = [["yes", "no"], list(COLORS), list(COUNTS), places, [*NAMES.values(), NOTHING]]
    # "orange" is a colour only: no emoji has that name
    sort = next(sort for sort in sorts if question.answer in sort)
    wrong = rng.sample([answer for answer in sort if answer != question.answer], min(n - 1, len(sort) - 1))
    choices = [question.answer, *wrong]
    rng.shuffle(choices)
    return choices
