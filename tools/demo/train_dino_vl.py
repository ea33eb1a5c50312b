#!/usr/bin/env python3
"""Train projector and language model of dino-vl further; its tower stays as it was pretrained.

    python tools/demo/train_dino_vl.py --init dino-vl --out better --minutes 80      # resumes where it stopped

The frozen tower is most of the work on a CPU (a third of a second for a picture on one core), so its features are
kept in `out`.features.npy, and more scenes than it saw are put together from them: a mixed scene takes each of its
cells, 4 x 4 patches, from a scene of the same background in which that cell, at that place, was empty or not. Of all
steps' scenes 0.4 are as they were drawn. No picture is ever pruned. What is trained goes on as dino-vl.safetensors
(`--export FILE`), from which dino_checkpoint.py builds. Needs torch, transformers, safetensors, this package and the
emoji font.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from demo_lessons import Lessons, Picture, cells_of, judge, pixel_values
from demo_questions import Asked, ask_some
from demo_run import Run, TrainError, arguments, main
from dino_checkpoint import DEVIATION, MEAN, SIDE
from emoji_scenes import COLORS, GRID, HELD_OUT_SEED, Placed, Scene, Sprite, find_font, font_sprites, make_question
from emoji_scenes_large import make_large
from qap_gguf.files.atomic import replacing

N: Final = SIDE * SIDE
BEFORE, AFTER = ("<|im_start|>user\n", "<img>"), ("</img>",)  # each tokenized by itself
TAKEN: Final = ("vision_tower",)  #: what dino_checkpoint.py takes from elsewhere
_DRAWN: Final = 0.4  # share of scenes that are as they were drawn
_NO_PIXELS: Final = np.zeros((0, 0, 3), np.uint8)

Features = NDArray[np.float16]


class Pool:
    """Scenes with what the tower made of them, and where to find a cell for a mixed one."""

    def __init__(self) -> None:
        self.features: list[Features] = []  # each (256, 384)
        self.scenes: list[Scene] = []
        self._cells: dict[tuple[str, int, bool], list[tuple[int, str]]] = {}
        cell = cells_of(SIDE).numpy()
        self._patches = [np.flatnonzero(cell == number) for number in range(GRID * GRID)]

    def add(self, scene: Scene, features: Features) -> None:
        """Take a scene in."""
        number = len(self.scenes)
        self.scenes.append(Scene(_NO_PIXELS, scene.objects, scene.background))
        self.features.append(features)
        there = {placed.cell: placed.emoji for placed in scene.objects}
        for cell in range(GRID * GRID):
            key = (scene.background, cell, cell in there)
            self._cells.setdefault(key, []).append((number, there.get(cell, "")))

    def drawn(self, rng: random.Random) -> tuple[Features, Scene]:
        """A scene as it was."""
        number = rng.randrange(len(self.scenes))
        return self.features[number], self.scenes[number]

    def mixed(self, rng: random.Random) -> tuple[Features, Scene]:
        """A scene of 1 to 6 objects, each cell out of another one."""
        background = rng.choice(list(COLORS))
        full = set(rng.sample(range(GRID * GRID), rng.randint(1, 6)))
        features = np.empty_like(self.features[0])
        objects = []
        for cell, patches in enumerate(self._patches):
            choices = self._cells.get((background, cell, cell in full))
            if not choices:
                return self.drawn(rng)
            number, emoji = rng.choice(choices)
            features[patches] = self.features[number][patches]
            if emoji:
                objects.append(Placed(emoji, *divmod(cell, GRID)))
        return features, Scene(_NO_PIXELS, tuple(objects), background)


class Learner:
    """The checkpoint with its lessons."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        load = transformers.InternVLForConditionalGeneration.from_pretrained
        self.model: Any = load(checkpoint, dtype=torch.float32).requires_grad_(False).eval()
        inner = self.model.model
        for part in (inner.multi_modal_projector, inner.language_model.layers, inner.language_model.norm):
            part.requires_grad_(True)
        self.lessons = Lessons.of(self.model, checkpoint, BEFORE, AFTER)
        self.cells = cells_of(SIDE)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def features(self, scenes: list[Scene]) -> Features:
        """What the tower makes of pictures: float16 (b, 256, 384)."""
        out = self.model.model.vision_tower(pixel_values(scenes, MEAN, DEVIATION)).last_hidden_state[:, 1:]
        made: Features = out.half().numpy()
        return made

    def project(self, features: list[Features]) -> Any:
        """Image tokens, (b, 256, d)."""
        return self.model.model.multi_modal_projector(torch.from_numpy(np.stack(features)).float())

    def picture(self, tokens: Any) -> Picture:
        """All tokens of each picture."""
        return Picture(tokens, torch.arange(N).expand(len(tokens), -1), N, self.cells)

    def fill(self, pool: Pool, n: int, sprite: Sprite, kept: Path) -> None:
        """Put the first `n` scenes of the pool into it, the same in every run: their features are kept in a file."""
        rng, said = random.Random("pool"), time.monotonic()
        done = np.load(kept) if kept.is_file() else np.empty((0, N, 384), np.float16)
        for start in range(0, n, 8):
            scenes = [make_large(rng, sprite) for _ in range(min(8, n - start))]
            ready = start + len(scenes) <= len(done)
            made = done[start : start + len(scenes)] if ready else self.features(scenes)
            for scene, one in zip(scenes, made, strict=True):
                pool.add(scene, one)
            if time.monotonic() - said > 30:
                print(f"tower: {len(pool.scenes)} of {n} scenes", file=sys.stderr, flush=True)
                said = time.monotonic()
        if n > len(done):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as part, part.open("wb") as file:
                np.save(file, np.stack(pool.features))

    def held_out(self, sprite: Sprite, n: int = 64) -> str:
        """Right answers about held-out scenes, all tokens."""
        rng = random.Random(HELD_OUT_SEED)
        scenes = [make_large(rng, sprite) for _ in range(n)]
        asked = [[Asked(make_question(rng, scene)) for _ in range(8)] for scene in scenes]

        def right(start: int) -> Any:
            tokens = self.project(list(self.features(scenes[start : start + 8])))
            return self.lessons.right(self.picture(tokens), asked[start : start + 8])

        return ", ".join(f"{kind} {some:.1f}" for kind, some in judge(right, asked).items())


def train(args: argparse.Namespace) -> None:
    """Train until the steps or the minutes are over."""
    if args.scenes < 1:
        raise TrainError(f"expected at least one scene, got --scenes {args.scenes}")
    learner, sprite, pool = Learner(args.init), font_sprites(find_font(args.font)), Pool()
    run = Run(learner.model, learner.lessons, args.init, args.out, args.rate, args.bf16)
    kept = args.out.with_name(f"{args.out.name}.features.npy")
    learner.fill(pool, args.scenes, sprite, kept)
    rng = random.Random(f"training {args.seed} {run.step}")  # another stream after a resume

    def lesson() -> Any:
        made = [pool.drawn(rng) if rng.random() < _DRAWN else pool.mixed(rng) for _ in range(args.batch)]
        asked = [ask_some(rng, scene, args.questions, run.right) for _, scene in made]
        tokens = learner.project([features for features, _ in made])
        picture = learner.picture(tokens)
        return learner.lessons.loss(picture, [scene for _, scene in made], asked, run.tally)

    run.go(lesson, lambda: learner.held_out(sprite), args.steps, args.minutes)
    if args.export is not None:
        run.export(args.export, TAKEN)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = arguments(str(__doc__).splitlines()[0], rate=4e-4, batch=8)
    options.add_argument("--scenes", type=int, default=4800, help="that the tower sees (default: 4800)")
    return options


if __name__ == "__main__":
    sys.exit(main("train_dino_vl", train, parser().parse_args()))
