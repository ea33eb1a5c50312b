"""Pictures that lie otherwise than those that the demo models were trained on, with questions that they know.

Each layout comes in both sizes, plain ("two") and large ("large-two"): two objects, six objects, objects in lines
without gaps as letters stand in words, and a background of four colours. Objects of one to two patches are
`large-small` here and `small` in emoji_scenes_hard.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import emoji_scenes_large
from emoji_scenes import CELL, KINDS, PLAIN, Layout, Question, Scene, Sprite, make_question, make_scene
from emoji_scenes_hard import Ask, Draw
from emoji_scenes_large import LARGE, make_large

_GAP: Final = 6  #: pixels by which an object of a line may be smaller than its cell
_SMALL: Final = (14, 24)


def _layouts(usual: Layout, cell: int) -> dict[str, Layout]:
    return {
        "two": replace(usual, counts=(2, 2)),
        "six": replace(usual, counts=(6, 6)),
        "lines": replace(usual, counts=(3, 6), sizes=(cell - _GAP, cell), lines=True),
        "patchwork": replace(usual, patchwork=True),
    }


def _kind(name: str, layout: Layout, make: Callable[[random.Random, Sprite, Layout], Scene]) -> tuple[Draw, Ask]:
    """The functions that draw a scene of a kind and ask about it."""
    kinds = {kind: weight for kind, weight in KINDS.items() if kind != "color" or not layout.patchwork}

    def draw(rng: random.Random, sprite: Sprite) -> Scene:
        return make(rng, sprite, layout)

    def ask(rng: random.Random, scene: Scene) -> Question:
        question = make_question(rng, scene, kinds)
        return question._replace(kind=f"{name}-{question.kind}")

    return draw, ask


_PLAIN: Final = _layouts(PLAIN, CELL)
_LARGE: Final = {"small": replace(LARGE, sizes=_SMALL), **_layouts(LARGE, emoji_scenes_large.CELL)}
#: Kind of scene -> how to draw one and how to ask about it.
LAYOUT_KINDS: Final[dict[str, tuple[Draw, Ask]]] = {
    **{name: _kind(name, layout, make_scene) for name, layout in _PLAIN.items()},
    **{f"large-{name}": _kind(f"large-{name}", layout, make_large) for name, layout in _LARGE.items()},
}
