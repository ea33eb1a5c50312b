"""Scenes of 224 x 224 pixels for models around a real image tower, whose patches are 14 pixels.

The model dino-vl was trained on them; the same seed gives the same scenes as its generator. One to six emoji of 34 to
56 pixels in a 4 x 4 grid (56 pixels, so 4 x 4 patches a cell), stronger noise than in plain scenes, and on every other
picture a slow change of light, so that no two patches of the background are equal.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np

from emoji_scenes import GRID, Layout, Scene, Sprite, draw_layout

SIDE: Final = 224  #: pixels of a side
CELL: Final = SIDE // GRID
LARGE: Final = Layout((1, 6), (34, CELL))
_NOISE: Final = 8  # brightness levels up or down
_LIGHT: Final = 18  # levels from the middle to the edge


def make_large(rng: random.Random, sprite: Sprite, layout: Layout = LARGE) -> Scene:
    """Draw the next large scene of `rng`; its questions are those of plain scenes."""
    image, objects, background = draw_layout(rng, sprite, SIDE, layout)
    noise = np.random.RandomState(rng.randint(0, 2**31)).randint(-_NOISE, _NOISE + 1, (SIDE, SIDE, 3))
    pixels = np.asarray(image).astype(np.int16) + noise
    if rng.random() < 0.5:
        light = np.linspace(-_LIGHT, _LIGHT, SIDE)
        across = light[None, :, None] if rng.random() < 0.5 else light[:, None, None]
        pixels = pixels + (across * rng.choice((-1, 1))).astype(np.int16)
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), objects, background)
