#!/usr/bin/env python3
"""Train the packaged model further, on scenes that are drawn as it learns.

    python tools/demo/train_demo_model.py --init tiny-llava --out better --minutes 60       # resumes where it stopped
    python tools/demo/train_demo_model.py --init better --out pruned --minutes 30 --pruned 0.6

Everything is trained: tower, projector and language model, by the lessons of demo_lessons.py. With --pruned that
share of the steps sees a part of each picture's tokens, at their own places: most of those times the part that covers
the picture best, else a random one. The held-out scenes of make_scenes.py have another seed. `out` is a checkpoint
for `qap-gguf convert`; it is replaced whole, with the state of the optimizer beside it. Needs torch, transformers and
the emoji font.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from demo_lessons import Lessons, Picture, Tally, cells_of, judge, pixel_values
from demo_questions import Asked, ask_one, ask_some
from demo_run import Run, arguments, main
from emoji_scenes import (
    COLORS,
    EMOJI,
    GRID,
    HELD_OUT_SEED,
    SIZE,
    Scene,
    Sprite,
    find_font,
    font_sprites,
    make_question,
    make_scene,
)

PATCH: Final = 16
SIDE: Final = SIZE // PATCH  #: patches of a side
N: Final = SIDE * SIDE
BEFORE: Final = "<|im_start|>user\n"
MEAN: Final = (0.48145466, 0.4578275, 0.40821073)  #: of the pixels in training, red, green and blue
DEVIATION: Final = (0.26862954, 0.26130258, 0.27577711)
_LAYERS: Final = 5  # of the tower: vision_feature_layer is -2 of 6
_CAPTIONS: Final = 0.06  # share of the steps that ask for everything in the picture


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """What each patch shows: the number of an emoji plus 1, or 0 where nearly all of it is background; (144,)."""
    far = np.abs(scene.pixels.astype(np.int16) - np.array(COLORS[scene.background])).max(-1) > 24
    share = far.reshape(SIDE, PATCH, SIDE, PATCH).mean((1, 3)).reshape(-1)
    in_cell = np.zeros(GRID * GRID, np.int64)
    for placed in scene.objects:
        in_cell[placed.cell] = EMOJI.index(placed.emoji) + 1
    return np.where(share > 0.12, in_cell[cells_of(SIDE).numpy()], 0)


def covering(tokens: Any, k: int) -> Any:
    """Numbers of `k` tokens that stand for the others best, each weighted at random: (b, n, d) -> sorted (b, k).

    The package's `coverage` weighs by its scores; here the weights are random, so that no choice becomes a habit.
    """
    with torch.no_grad():
        near = F.normalize(tokens, dim=-1)
        near = (near @ near.transpose(1, 2)).clamp(min=0)
        rows = torch.arange(len(tokens))
        weight, best = torch.rand(tokens.shape[:2])[:, :, None], torch.zeros(tokens.shape[:2])
        taken, kept = torch.zeros(tokens.shape[:2], dtype=torch.bool), []
        for _ in range(k):
            gain = ((near - best[:, :, None]).clamp(min=0) * weight).sum(1).masked_fill(taken, -1)
            kept.append(gain.argmax(1))
            taken[rows, kept[-1]] = True
            best = torch.maximum(best, near[rows, :, kept[-1]])
    return torch.stack(kept, 1).sort(1).values


class Learner:
    """The checkpoint with its lessons."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        load = transformers.LlavaForConditionalGeneration.from_pretrained
        self.model: Any = load(checkpoint, dtype=torch.float32).requires_grad_(False).eval()
        tower = self.model.model.vision_tower
        self.tower: Any = getattr(tower, "vision_model", tower)
        for part in (
            self.tower.embeddings, self.tower.pre_layrnorm, self.tower.encoder.layers[:_LAYERS],
            self.model.model.multi_modal_projector, self.model.model.language_model.layers,
            self.model.model.language_model.norm,
        ):  # fmt: skip
            part.requires_grad_(True)
        self.lessons = Lessons.of(self.model, checkpoint, [BEFORE], [])
        self.cells = cells_of(SIDE)

    def see(self, scenes: list[Scene]) -> Any:
        """Projected image tokens of whole pictures, (b, 144, d)."""
        out = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values(scenes, MEAN, DEVIATION)))
        for layer in self.tower.encoder.layers[:_LAYERS]:
            done = layer(out, None)
            out = done[0] if isinstance(done, tuple) else done
        return self.model.model.multi_modal_projector(out[:, 1:])

    def picture(self, tokens: Any, k: int, cover: bool) -> Picture:
        """All of the tokens, or `k` of them."""
        at = torch.arange(N).expand(len(tokens), -1)
        if k < N and cover:
            at = covering(tokens, k)
        elif k < N:
            at = torch.stack([torch.randperm(N)[:k].sort().values for _ in tokens])
        kept = tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[-1]))
        return Picture(kept, at, N, self.cells)

    def loss(self, scenes: list[Scene], asked: list[list[Asked]], k: int, cover: bool, tally: Tally) -> Any:
        """All lessons of a step."""
        tokens = self.see(scenes)
        readers = self.lessons.readers
        plain = F.rms_norm(tokens, tokens.shape[-1:])
        often = torch.ones(len(EMOJI) + 1)
        often[0] = 0.25  # most patches are background
        labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
        colors = torch.tensor([list(COLORS).index(scene.background) for scene in scenes])
        what = F.cross_entropy(readers.what(plain).flatten(0, 1), labels.flatten(), weight=often)
        behind = F.cross_entropy(readers.background(plain).flatten(0, 1), colors.repeat_interleave(N))
        tally.losses["what"].append(what.item())
        total = self.lessons.loss(self.picture(tokens, k, cover), scenes, asked, tally)
        return total + what + 0.2 * behind

    def held_out(self, sprite: Sprite, n: int = 64) -> str:
        """Right answers about held-out plain scenes: all tokens, and 36 and 18 covering ones."""
        rng = random.Random(HELD_OUT_SEED)
        scenes = [make_scene(rng, sprite) for _ in range(n)]
        asked = [[Asked(make_question(rng, scene)) for _ in range(8)] for scene in scenes]

        def share(k: int) -> str:
            def right(start: int) -> Any:
                batch = slice(start, start + 8)
                picture = self.picture(self.see(scenes[batch]), k, True)
                return self.lessons.right(picture, asked[batch])

            return ", ".join(f"{kind} {some:.1f}" for kind, some in judge(right, asked).items())

        return "; ".join(f"K = {k}: {share(k)}" for k in (N, 36, 18))


def train(args: argparse.Namespace) -> None:
    """Train until the steps or the minutes are over."""
    learner, sprite = Learner(args.init), font_sprites(find_font(args.font))
    run = Run(learner.model, learner.lessons, args.init, args.out, args.rate)
    rng = random.Random(f"training {args.seed} {run.step}")  # another stream after a resume

    def lesson() -> Any:
        scenes = [make_scene(rng, sprite) for _ in range(args.batch)]
        if rng.random() < _CAPTIONS:
            asked = [[ask_one(rng, scene, "caption")] for scene in scenes]
        else:
            asked = [ask_some(rng, scene, args.questions, run.right) for scene in scenes]
        k = round(math.exp(rng.uniform(math.log(9), math.log(80)))) if rng.random() < args.pruned else N
        return learner.loss(scenes, asked, k, rng.random() < 0.7, run.tally)

    run.go(lesson, lambda: learner.held_out(sprite), args.steps, args.minutes)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = arguments(str(__doc__).splitlines()[0], rate=5e-4, batch=8)
    options.add_argument("--pruned", type=float, default=0.0, help="share of steps with pruned pictures (default: 0)")
    return options


if __name__ == "__main__":
    sys.exit(main("train_demo_model", train, parser().parse_args()))
