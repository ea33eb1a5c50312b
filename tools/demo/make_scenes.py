#!/usr/bin/env python3
"""Emoji scenes with questions of known answers: what tiny-llava was trained on, and a benchmark without end.

    python tools/demo/make_scenes.py --n 50 --out scenes            # scenes/00000.png ... and scenes/questions.jsonl
    python tools/demo/make_scenes.py --n 50 --kinds small,rows --choices 4 --out hard

Plain scenes are described in emoji_scenes.py, the harder kinds in emoji_scenes_hard.py, scenes of 224 x 224 pixels
("large", what dino-vl was trained on) in emoji_scenes_large.py, other layouts of both in emoji_scenes_layouts.py.
Everything follows from the seed, the Pillow version and the font.

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
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from emoji_scenes import HELD_OUT_SEED, SceneError, Sprite, find_font, font_sprites, make_question
from emoji_scenes_hard import SCENE_KINDS, add_choices
from emoji_scenes_large import make_large
from emoji_scenes_layouts import LAYOUT_KINDS

KINDS = SCENE_KINDS | {"large": (make_large, make_question)} | LAYOUT_KINDS


def write_scenes(
    out: Path,
    n: int,
    questions: int,
    seed: int,
    sprite: Sprite,
    *,
    kinds: Sequence[str] = ("plain",),
    choices: int = 0,
    force: bool = False,
) -> int:
    """Write `n` scenes and `questions` for each to the folder `out`; return the number of questions.

    The kinds take turns. With `choices` each question gets that many, the right answer among them; scenes and questions
    stay the same. Everything is made beside `out` first, so that nothing half-finished ever lies in it.

    Raises:
        SceneError: `out` has questions already and `force` is not set.
    """
    if (out / "questions.jsonl").exists() and not force:
        raise SceneError(f"{out / 'questions.jsonl'} is there already; choose another folder or say --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        rng, other = random.Random(seed), random.Random(f"choices {seed}")
        lines = []
        for i in range(n):
            draw, ask = KINDS[kinds[i % len(kinds)]]
            scene, name = draw(rng, sprite), f"{i:05d}.png"
            Image.fromarray(scene.pixels).save(made / name)
            for question in (ask(rng, scene) for _ in range(questions)):
                row = {"image": name, "question": question.text, "answer": question.answer, "kind": question.kind}
                more = {"choices": add_choices(other, question, choices)} if choices else {}
                lines.append(json.dumps(row | more) + "\n")
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


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    if not kinds or not set(kinds) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(KINDS)}, got {text!r}")
    return kinds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status: 0 done, 1 not possible here, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description="Write emoji scenes and questions of known answers.",
        epilog="example: python tools/demo/make_scenes.py --n 50 --out scenes",
    )
    at_least_one = partial(_number, low=1)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--n", type=at_least_one, default=50, metavar="N", help="pictures (default: 50)")
    parser.add_argument("--questions", type=at_least_one, default=6, metavar="N", help="for each picture (default: 6)")
    parser.add_argument(
        "--kinds",
        type=_kinds,
        default=["plain"],
        metavar="LIST",
        help=f"with commas, of {', '.join(KINDS)}; pictures take turns (default: plain)",
    )
    parser.add_argument(
        "--choices", type=partial(_number, low=2), metavar="N", help="give each question N choices (default: none)"
    )
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
        n_questions = write_scenes(
            args.out, args.n, args.questions, args.seed, sprite,
            kinds=args.kinds, choices=args.choices or 0, force=args.force,
        )  # fmt: skip
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
