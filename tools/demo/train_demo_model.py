#!/usr/bin/env python3
"""Train the packaged model further, on scenes that are drawn as it learns.

    python tools/demo/tiny_checkpoint.py tiny-llava                      # the packaged model's own checkpoint
    python tools/demo/train_demo_model.py --init tiny-llava --out better --minutes 60       # resumes where it stopped

Everything is trained: tower, projector and language model, by the lessons of demo_lessons.py. A share of the steps
(--pruned) sees a part of each picture's tokens, at their own places: mostly those that the package would keep, which
follow the attention of the tower's class token and what tokens resemble each other. So that token is taught to look at
objects, and the patches of one thing to be alike. A few steps show small objects, or wide pictures without padding.
The held-out scenes of make_scenes.py have another seed. `out` is a checkpoint for `qap-gguf convert`; it is replaced
whole, with the state of the optimizer beside it. Needs torch, transformers, this package and the emoji font.
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
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from demo_lessons import Lessons, Picture, Tally, cells_of, judge, pixel_values
from demo_pictures import ALL, MIDDLE, N, Sight, apart, covering, padded, patch_labels
from demo_questions import Asked, ask_one, ask_some
from demo_run import Run, arguments, main
from emoji_scenes import (
    COLORS,
    EMOJI,
    HELD_OUT_SEED,
    SIZE,
    Scene,
    Sprite,
    find_font,
    font_sprites,
    make_question,
    make_scene,
)
from emoji_scenes_hard import make_small, make_wide
from straight_through import round_as_it_learns
from tiny_checkpoint import DEVIATION, LAYERS, MEAN, SIDE

BEFORE: Final = "<|im_start|>user\n"
TAKEN: Final = ("vision_tower", "multi_modal_projector")  #: what tiny_checkpoint.py takes from the packaged mmproj
_KEPT: Final = (12, 48)  # tokens of a pruned picture, from and to
_FOR_CAPTIONS: Final = 36  # at least: they tell everything
_COVERING: Final = 0.9  # share of the pruned steps whose tokens cover the picture; the others' are random
_CAPTIONS: Final = 0.06  # share of the steps that ask for everything in the picture
_SMALL, _WIDE = 0.08, 0.08  # shares of the steps with such scenes; the others' are plain


def class_attention(layer: Any, x: Any) -> Any:
    """Attention of the class token to the patches in a CLIP layer that reads `x`, mean over heads, (b, n)."""
    part, normed = layer.self_attn, layer.layer_norm1(x)
    b, heads = len(x), part.num_heads
    query = part.q_proj(normed[:, :1]).reshape(b, 1, heads, -1).transpose(1, 2)
    keys = part.k_proj(normed).reshape(b, -1, heads, query.shape[-1]).transpose(1, 2)
    logits = query.float() @ keys.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)[:, 0, 1:]


def shown_of(scenes: list[Scene]) -> Any:
    """Numbers of the patches that are not padding."""
    return ALL if len(scenes[0].pixels) == SIZE else MIDDLE


class Learner:
    """The checkpoint with its lessons."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        load = transformers.LlavaForConditionalGeneration.from_pretrained
        self.model: Any = load(checkpoint, dtype=torch.float32).requires_grad_(False).eval()
        tower = self.model.model.vision_tower
        self.tower: Any = getattr(tower, "vision_model", tower)
        for part in (
            self.tower.embeddings, self.tower.pre_layrnorm, self.tower.encoder.layers[:LAYERS],
            self.model.model.multi_modal_projector, self.model.model.language_model.layers,
            self.model.model.language_model.norm,
        ):  # fmt: skip
            part.requires_grad_(True)
        self.lessons = Lessons.of(self.model, checkpoint, [BEFORE], [], places=0.0, inside=0.5)
        self.cells = cells_of(SIDE)

    def see(self, scenes: list[Scene]) -> Sight:
        """What the tower makes of whole pictures: 144 tokens each."""
        whole = [padded(scene) for scene in scenes]
        out = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values(whole, MEAN, DEVIATION)))
        for number, layer in enumerate(self.tower.encoder.layers[:LAYERS]):
            if number == LAYERS - 1:
                attention = class_attention(layer, out)
            done = layer(out, None)
            out = done[0] if isinstance(done, tuple) else done
        return Sight(self.model.model.multi_modal_projector(out[:, 1:]), attention)

    def picture(self, sight: Sight, k: int, cover: bool, shown: Any = ALL, spread: bool = False) -> Picture:
        """All tokens of the patches that are `shown`, or `k` of them: those that cover the picture, or random ones."""
        part = Sight(sight.tokens[:, shown], sight.attention[:, shown])
        at = torch.arange(len(shown)).expand(len(part.tokens), -1)
        if k < len(shown) and cover:
            at = covering(part, k, spread)
        elif k < len(shown):
            at = torch.stack([torch.randperm(len(shown))[:k].sort().values for _ in part.tokens])
        kept = part.tokens.gather(1, at[..., None].expand(-1, -1, part.tokens.shape[-1]))
        return Picture(kept, shown[at], N, self.cells)

    def loss(self, scenes: list[Scene], asked: list[list[Asked]], picture: Picture, sight: Sight, tally: Tally) -> Any:
        """All lessons of a step; scenes of one size."""
        shown = shown_of(scenes)
        readers = self.lessons.readers
        plain = F.rms_norm(sight.tokens[:, shown], sight.tokens.shape[-1:])
        often = torch.ones(len(EMOJI) + 1)
        often[0] = 0.25  # most patches are background
        labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
        colors = torch.tensor([list(COLORS).index(scene.background) for scene in scenes])
        what = F.cross_entropy(readers.what(plain).flatten(0, 1), labels[:, shown].flatten(), weight=often)
        behind = F.cross_entropy(readers.background(plain).flatten(0, 1), colors.repeat_interleave(len(shown)))
        there = labels > 0
        looks = (-(sight.attention.float() + 1e-6).log() * there).sum(1) / there.sum(1)  # smallest if it is even
        behind_apart, object_apart = apart(sight.tokens[:, shown], labels[:, shown], self.cells[shown])
        alike = behind_apart + 0.5 * object_apart
        for name, part in (("what", what), ("looks", (looks - there.sum(1).log()).mean()), ("alike", alike)):
            tally.losses[name].append(part.item())
        total = self.lessons.loss(picture, scenes, asked, tally)
        return total + what + 0.2 * behind + 0.3 * looks.mean() + 0.4 * alike

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
    if args.rounded:
        round_as_it_learns(learner.model.model.language_model)
    run = Run(learner.model, learner.lessons, args.init, args.out, args.rate, args.bf16)
    rng = random.Random(f"training {args.seed} {run.step}")  # another stream after a resume

    def lesson() -> Any:
        make = rng.choices((make_small, make_wide, make_scene), (_SMALL, _WIDE, 1 - _SMALL - _WIDE))[0]
        captions = rng.random() < _CAPTIONS
        scenes = [make(rng, sprite) for _ in range(args.batch * (3 if captions else 1))]
        if captions:
            asked = [[ask_one(rng, scene, "caption")] for scene in scenes]
        else:
            asked = [ask_some(rng, scene, args.questions, run.right) for scene in scenes]
        k = round(math.exp(rng.uniform(*map(math.log, _KEPT)))) if rng.random() < args.pruned else N
        k = max(k, _FOR_CAPTIONS) if captions else k
        sight = learner.see(scenes)
        picture = learner.picture(sight, k, rng.random() < _COVERING, shown_of(scenes), rng.random() < 0.3)
        return learner.loss(scenes, asked, picture, sight, run.tally)

    run.go(lesson, lambda: learner.held_out(sprite), args.steps, args.minutes)
    if args.export is not None:
        run.export(args.export, TAKEN)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = arguments(str(__doc__).splitlines()[0], rate=5e-4, batch=8)
    options.add_argument("--pruned", type=float, default=0.6, help="share of steps with pruned pictures (default: 0.6)")
    options.add_argument("--rounded", action="store_true", help="learn with the language model in Q4_0")
    return options


if __name__ == "__main__":
    sys.exit(main("train_demo_model", train, parser().parse_args()))
