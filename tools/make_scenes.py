#!/usr/bin/env python3
"""Emoji scenes with questions of known answers: what tiny-llava was trained on, and a benchmark without end.

A scene is a 192 x 192 RGB picture: a plain background in one of 8 colours with a little noise, and 2 to 6 objects out
of 64 emoji, each in a cell of its own of a 4 x 4 grid (48 pixels, so 3 x 3 patches of 16), of random size and place in
the cell. Everything follows from the seed, the Pillow version and the font. The design is that of the generator made
for this project beside tiny-llava's weights; the same seed gives the same scenes (tests/test_scenes.py).

    python tools/make_scenes.py --n 50 --out scenes     # scenes/00000.png ... and scenes/questions.jsonl, 300 questions

Held-out scenes: which seeds training used is not recorded. The default seed is a large number that nobody picks by
habit, and there are more than 10**9 scenes of two objects alone: a scene of training hardly comes again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIZE: Final = 192  #: pixels of a side
GRID: Final = 4
CELL: Final = SIZE // GRID
HELD_OUT_SEED: Final = 260402816
FONT_PLACES: Final = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu: fonts-noto-color-emoji
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/Library/Fonts/NotoColorEmoji.ttf",  # macOS
    "/Library/Fonts/NotoColorEmoji.ttf",
)
_FONT_PIXELS: Final = 109  # the only size of the bitmaps in that font
_CANVAS: Final = (136, 128)

#: Colour name -> RGB of the background.
COLORS: Final = {
    "red": (214, 60, 60), "green": (80, 170, 90), "blue": (70, 110, 210), "yellow": (235, 205, 80),
    "white": (245, 245, 245), "gray": (150, 150, 150), "pink": (240, 170, 190), "orange": (240, 150, 60),
}  # fmt: skip
NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six")
KINDS: Final = {"at": 5, "is": 2, "where": 3, "count": 1, "color": 1}  #: kind of question -> how often
#: The emoji, in the order that the random numbers refer to.
EMOJI: Final = tuple(
    "🐶🐱🐭🐰🦊🐻🐼🐯🦁🐮🐷🐸🐵🐔🐧🐦🦆🦉🐴🐝🐛🦋🐌🐢🐍🐙🦀🐠🐬🐳🌵🌲🌻🌹🍄🍎🍌🍇🍓🍒🍍🥕🌽🍞🧀🍕🍔🍟🍩🍪🎂☕⚽🏀🏈🎾🚗🚌🚲🚂🚀⛵🏠⏰"
)
_SHORT_NAMES: Final = {
    "🌵": "cactus", "🌲": "tree", "🌻": "sunflower", "🌹": "rose", "🍄": "mushroom", "🍎": "apple", "🌽": "corn",
    "🧀": "cheese", "🍕": "pizza", "🍔": "burger", "🍟": "fries", "🎂": "cake", "☕": "coffee", "⚽": "soccer ball",
    "🏀": "basketball", "🏈": "football", "🎾": "tennis ball", "🚗": "car", "🚌": "bus", "🚲": "bicycle",
    "🚂": "train", "🚀": "rocket", "⛵": "boat", "🏠": "house", "⏰": "clock", "🐝": "bee", "🐛": "bug", "🐠": "fish",
    "🐳": "whale", "🐔": "chicken", "🐌": "snail", "🦀": "crab", "🐙": "octopus", "🍞": "bread", "🍩": "donut",
    "🍪": "cookie", "🍇": "grapes", "🍒": "cherries",
}  # fmt: skip
#: Emoji -> its name in questions and answers: Unicode's, or a shorter one.
NAMES: Final = {e: _SHORT_NAMES.get(e) or unicodedata.name(e).lower().replace(" face", "") for e in EMOJI}

Sprite = Callable[[str, int], Image.Image]  #: (emoji, pixels of the longer side) -> RGBA picture


class SceneError(Exception):
    """Scenes cannot be made here; the message is one line with the cure."""


class Placed(NamedTuple):
    """An object of a scene; row and column count from 0."""

    emoji: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        pixels: uint8, shape (192, 192, 3), RGB.
        objects: 2 to 6, each in a cell of its own, in the order they were drawn.
        background: a key of ``COLORS``.
    """

    pixels: NDArray[np.uint8]
    objects: tuple[Placed, ...]
    background: str


class Question(NamedTuple):
    """A question about a scene; `kind` is one of ``KINDS``."""

    text: str
    answer: str
    kind: str


def find_font(given: Path | None = None) -> Path:
    """Return the path of Noto Color Emoji: `given`, or the first of ``FONT_PLACES`` that exists.

    Raises:
        SceneError: there is none.
    """
    places = [given] if given is not None else [Path(place).expanduser() for place in FONT_PLACES]
    for place in places:
        if place.is_file():
            return place
    looked = str(given) if given is not None else "the usual folders"
    raise SceneError(
        f"expected the font Noto Color Emoji, found none at {looked}; on Debian: apt-get install "
        "fonts-noto-color-emoji, elsewhere give the path of NotoColorEmoji.ttf (the bitmap version) with --font"
    )


def font_sprites(font: Path) -> Sprite:
    """Return a function that draws emoji from a bitmap font, each glyph rendered once.

    Raises:
        SceneError: Pillow cannot draw from the file.
    """
    try:
        face = ImageFont.truetype(str(font), _FONT_PIXELS)
    except OSError as err:
        raise SceneError(
            f"expected a bitmap font of {_FONT_PIXELS} pixels, got {font} ({err}); "
            "give Debian's or Google's NotoColorEmoji.ttf with --font"
        ) from err
    glyphs: dict[str, Image.Image] = {}

    def sprite(emoji: str, pixels: int) -> Image.Image:
        if emoji not in glyphs:
            canvas = Image.new("RGBA", _CANVAS, (0, 0, 0, 0))
            ImageDraw.Draw(canvas).text((0, 0), emoji, font=face, embedded_color=True)
            box = canvas.getbbox()
            if box is None:
                raise SceneError(f"{font} has no picture of {NAMES[emoji]}; give Noto Color Emoji with --font")
            glyphs[emoji] = canvas.crop(box)
        glyph = glyphs[emoji]
        factor = pixels / max(glyph.size)
        size = (max(1, int(glyph.width * factor)), max(1, int(glyph.height * factor)))
        return glyph.resize(size, Image.Resampling.BILINEAR)

    return sprite


def make_scene(rng: random.Random, sprite: Sprite) -> Scene:
    """Draw the next scene of `rng`. The order of the calls of `rng` is what makes a seed mean the same everywhere."""
    n_objects = rng.randint(2, 6)
    background = rng.choice(list(COLORS))
    image = Image.new("RGB", (SIZE, SIZE), COLORS[background])
    objects = []
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    for row, column in rng.sample(cells, n_objects):
        emoji = rng.choice(EMOJI)
        picture = sprite(emoji, rng.randint(32, 46))
        x = column * CELL + rng.randint(0, max(0, CELL - picture.width))
        y = row * CELL + rng.randint(0, max(0, CELL - picture.height))
        image.paste(picture, (x, y), picture)
        objects.append(Placed(emoji, row, column))
    # RandomState, not Generator: its stream is frozen for ever.
    noise = np.random.RandomState(rng.randint(0, 2**31)).randint(-6, 7, (SIZE, SIZE, 3))
    pixels = np.clip(np.asarray(image).astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return Scene(pixels, tuple(objects), background)


def make_question(rng: random.Random, scene: Scene) -> Question:
    """Ask the next question of `rng` about a scene, with its right answer."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    emoji, row, column = rng.choice(scene.objects)
    name, present = NAMES[emoji], {placed.emoji for placed in scene.objects}
    if kind == "where" and sum(placed.emoji == emoji for placed in scene.objects) > 1:
        kind = "is"  # "where" has one answer only if there is one of them
    if kind == "at":
        return Question(f"What is in row {row + 1}, column {column + 1}?", name, kind)
    if kind == "where":
        return Question(f"Where is the {name}?", f"row {row + 1}, column {column + 1}", kind)
    if kind == "count":
        return Question("How many objects are there?", NUMBERS[len(scene.objects)], kind)
    if kind == "color":
        return Question("What color is the background?", scene.background, kind)
    if rng.random() < 0.5:
        return Question(f"Is there a {name}?", "yes", kind)
    return Question(f"Is there a {NAMES[rng.choice([e for e in EMOJI if e not in present])]}?", "no", kind)


def caption(objects: Iterable[Placed]) -> Question:
    """Return the question for everything in the picture, and its answer in reading order."""
    found = sorted(objects, key=lambda placed: (placed.row, placed.column))
    answer = "; ".join(f"{NAMES[e]} in row {row + 1}, column {column + 1}" for e, row, column in found)
    return Question("What is in the picture?", answer, "caption")


def write_scenes(out: Path, n: int, questions: int, seed: int, sprite: Sprite, force: bool = False) -> int:
    """Write `n` scenes and `questions` for each to the folder `out`; return the number of questions.

    Everything is made beside `out` first, so that nothing half-finished ever lies in it.

    Raises:
        SceneError: `out` has questions already and `force` is not set.
    """
    if (out / "questions.jsonl").exists() and not force:
        raise SceneError(f"{out / 'questions.jsonl'} is there already; choose another folder or say --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        rng = random.Random(seed)
        lines = []
        for i in range(n):
            scene, name = make_scene(rng, sprite), f"{i:05d}.png"
            Image.fromarray(scene.pixels).save(made / name)
            for text, answer, kind in (make_question(rng, scene) for _ in range(questions)):
                lines.append(json.dumps({"image": name, "question": text, "answer": answer, "kind": kind}) + "\n")
        (made / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
        out.mkdir(exist_ok=True)
        for path in sorted(made.iterdir()):  # digits sort before letters: the questions come last
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return len(lines)


def _number(text: str, low: int) -> int:
    value = int(text)
    if value < low:
        raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status: 0 done, 1 not possible here, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description="Write emoji scenes and questions of known answers.",
        epilog="example: python tools/make_scenes.py --n 50 --out scenes",
    )
    at_least_one = partial(_number, low=1)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--n", type=at_least_one, default=50, metavar="N", help="pictures (default: 50)")
    parser.add_argument("--questions", type=at_least_one, default=6, metavar="N", help="for each picture (default: 6)")
    parser.add_argument(
        "--seed",
        type=partial(_number, low=0),
        default=HELD_OUT_SEED,
        metavar="N",
        help=f"everything follows from it (default: {HELD_OUT_SEED}, held out from training)",
    )
    parser.add_argument("--font", type=Path, metavar="TTF", help="Noto Color Emoji, where it is not found by itself")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    try:
        sprite = font_sprites(find_font(args.font))
        n_questions = write_scenes(args.out, args.n, args.questions, args.seed, sprite, args.force)
    except (SceneError, OSError) as err:
        print(f"make_scenes: error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(args.out / "questions.jsonl")
    print(f"{args.n} pictures, {n_questions} questions", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
