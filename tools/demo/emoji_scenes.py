"""Emoji scenes with questions of known answers: the generator behind make_scenes.py and train_demo_model.py.

A plain scene is a 192 x 192 RGB picture: a background in one of 8 colours with a little noise, and 2 to 6 objects out
of 64 emoji, each in a cell of its own of a 4 x 4 grid (48 pixels, so 3 x 3 patches of 16), of random size and place in
the cell. Everything follows from the seed, the Pillow version and the font. The design is that of the generator made
for this project beside tiny-llava's weights; the same seed gives the same scenes (tests/demo/test_scenes.py).
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
    """An object of a scene; row (or line) and column (or place in the line) count from 0."""

    emoji: str
    row: int
    column: int

    @property
    def cell(self) -> int:
        """Its number among the cells of a plain scene, line by line."""
        return self.row * GRID + self.column


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        pixels: uint8, shape (192, 192, 3), RGB; (96, 192, 3) in wide scenes.
        objects: in the order they were drawn; in plain scenes 2 to 6, each in a cell of its own.
        background: a key of ``COLORS``; of a patchwork that of its upper left quarter.
    """

    pixels: NDArray[np.uint8]
    objects: tuple[Placed, ...]
    background: str


@dataclass(frozen=True)
class Layout:
    """How the objects of a picture lie.

    Attributes:
        counts: the smallest and the largest number of objects.
        sizes: the smallest and the largest length of an object's longer side, in pixels.
        lines: objects fill cells from the beginning of a line on, as letters do; else any cells.
        patchwork: each quarter of the background has a colour of its own.
    """

    counts: tuple[int, int]
    sizes: tuple[int, int]
    lines: bool = False
    patchwork: bool = False


PLAIN: Final = Layout((2, 6), (32, 46))


class Question(NamedTuple):
    """A question about a scene; `kind` is one of ``KINDS`` in plain scenes."""

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


def add_noise(rng: random.Random, image: Image.Image) -> NDArray[np.uint8]:
    """Return a picture's pixels with a little noise that follows from one number of `rng`."""
    # RandomState, not Generator: its stream is frozen for ever.
    noise = np.random.RandomState(rng.randint(0, 2**31)).randint(-6, 7, (SIZE, SIZE, 3))
    pixels: NDArray[np.uint8] = np.clip(np.asarray(image).astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return pixels


def draw_object(rng: random.Random, image: Image.Image, sprite: Sprite, placed: Placed, sizes: tuple[int, int]) -> None:
    """Draw an object somewhere in its cell, its longer side of `sizes[0]` to `sizes[1]` pixels."""
    picture, cell = sprite(placed.emoji, rng.randint(*sizes)), image.width // GRID
    x = placed.column * cell + rng.randint(0, max(0, cell - picture.width))
    y = placed.row * cell + rng.randint(0, max(0, cell - picture.height))
    image.paste(picture, (x, y), picture)


def draw_layout(
    rng: random.Random, sprite: Sprite, side: int, layout: Layout
) -> tuple[Image.Image, tuple[Placed, ...], str]:
    """Draw a picture of `side` x `side` pixels; return it, its objects and the background's colour.

    The order of the calls of `rng` is what makes a seed mean the same everywhere.
    """
    n_objects = rng.randint(*layout.counts)
    background = rng.choice(list(COLORS))
    image = Image.new("RGB", (side, side), COLORS[background])
    if layout.patchwork:
        others, half = rng.sample([color for color in COLORS if color != background], 3), side // 2
        for color, corner in zip(others, ((half, 0), (0, half), (half, half)), strict=True):
            image.paste(COLORS[color], (*corner, corner[0] + half, corner[1] + half))
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    if layout.lines:
        first = GRID * rng.randrange(GRID - (n_objects - 1) // GRID)
        cells = cells[first : first + n_objects]
    objects = []
    for cell in rng.sample(cells, n_objects):
        objects.append(Placed(rng.choice(EMOJI), *cell))
        draw_object(rng, image, sprite, objects[-1], layout.sizes)
    return image, tuple(objects), background


def make_scene(rng: random.Random, sprite: Sprite, layout: Layout = PLAIN) -> Scene:
    """Draw the next scene of `rng`."""
    image, objects, background = draw_layout(rng, sprite, SIZE, layout)
    return Scene(add_noise(rng, image), objects, background)


def make_question(rng: random.Random, scene: Scene, kinds: Mapping[str, int] = KINDS) -> Question:
    """Ask the next question of `rng` about a scene, with its right answer; `kinds` as ``KINDS``."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
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
