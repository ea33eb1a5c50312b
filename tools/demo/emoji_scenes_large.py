"""Scenes of 224 x 224 pixels for models around a real image tower, whose patches are 14 pixels.

The model dino-vl was trained on them; the same seed gives the same scenes as its generator. One to six emoji of 34 to
56 pixels in a 4 x 4 grid (56 pixels, so 4 x 4 patches a cell), stronger noise than in plain scenes, and on every other
picture a slow change of light, so that no two patches of the background are equal.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np
from PIL import Image

from emoji_scenes import COLORS, EMOJI, GRID, Placed, Scene, Sprite

SIDE: Final = 224  #: pixels of a side
CELL: Final = SIDE // GRID
_NOISE: Final = 8  # brightness levels up or down
_LIGHT: Final = 18  # levels from the middle to the edge


def make_large(rng: random.Random, sprite: Sprite) -> Scene:
    """Draw the next large scene of `rng`; its questions are those of plain scenes."""
    n_objects = rng.randint(1, 6)
    background = rng.choice(list(COLORS))
    image = Image.new("RGB", (SIDE, SIDE), COLORS[background])
    objects = []
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    for row, column in rng.sample(cells, n_objects):
        emoji = rng.choice(EMOJI)
        picture = sprite(emoji, rng.randint(34, CELL))
        x = column * CELL + rng.randint(0, max(0, CELL - picture.width))
        y = row * CELL + rng.randint(0, max(0, CELL - picture.height))
        image.paste(picture, (x, y), picture)
        objects.append(Placed(emoji, row, column))
    noise = np.random.RandomState(rng.randint(0, 2**31)).randint(-_NOISE, _NOISE + 1, (SIDE, SIDE, 3))
    pixels = np.asarray(image).astype(np.int16) + noise
    if rng.random() < 0.5:
        light = np.linspace(-_LIGHT, _LIGHT, SIDE)
        across = light[None, :, None] if rng.random() < 0.5 else light[:, None, None]
        pixels = pixels + (across * rng.choice((-1, 1))).astype(np.int16)
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), tuple(objects), background)
