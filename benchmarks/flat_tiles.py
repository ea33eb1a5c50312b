#!/usr/bin/env python3
"""What a half-blank page gains where tiles of one colour and repeated tokens stay out of the encoder.

    python benchmarks/flat_tiles.py --threads 2                          # InternVL3-1B's shape, random weights
    python benchmarks/flat_tiles.py --shape smolvlm-256m --blank 0.8 --rounds 7
    python benchmarks/flat_tiles.py --mmproj mmproj-f16.gguf --model model.gguf --image page.png

One process, all settings in turns, medians after a warm-up; a ratio is the median of the ratios of each round. The page
is drawn here: lines of short dark strokes on white paper above, paper alone below. "left" are the tokens that are no
padding and that the encoder sees. K is the same part of all tokens in every row but the first, or what is left.
Random weights say nothing about answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from qap_gguf.bench import SHAPES, Pass, find_shape, make_random_model
from qap_gguf.bench.measure import run_pass
from qap_gguf.vision.images import load_image

Pixels = npt.NDArray[np.uint8]
PAPER, INK = 255, 40
LINE, STROKE = 28, 14  # pixels from line to line, and of the strokes' height
TEXT = "What does the page say?"


def page(width: int, height: int, blank: float) -> Pixels:
    """A page whose lower part is blank, uint8 (height, width, 3)."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), PAPER, np.uint8)
    for top in range(LINE, int(height * (1 - blank)) - LINE, LINE):
        strokes = np.repeat(rng.random(width // 4) < 0.4, 4)
        pixels[top : top + STROKE, : len(strokes)][:, strokes] = INK
    return pixels


def settings(ratio: float, level: int) -> dict[str, qap.PruneConfig | None]:
    """What is compared, by its name in the table."""
    late = qap.PruneConfig(keep_ratio=ratio)
    flat = late.replace(skip_flat_tiles=level)
    return {
        "dense": None,
        "pruned": late,
        "pruned, no flat tiles": flat,
        "pruned, no duplicates": late.replace(duplicates=level),
        "pruned, neither": flat.replace(duplicates=level),
    }


def summary(name: str, dense: list[Pass], passes: list[Pass], n_left: int) -> dict[str, Any]:
    """One row of the table."""
    pairs = list(zip(dense, passes, strict=True))
    return {
        "setting": name,
        "left": n_left,
        "kept": passes[0].n_kept,
        "encode_s": statistics.median(one.encode_s for one in passes),
        "first_s": statistics.median(one.first_s for one in passes),
        "encode_x": statistics.median(whole.encode_s / one.encode_s for whole, one in pairs),
        "first_x": statistics.median(whole.first_s / one.first_s for whole, one in pairs),
    }


def measure(vlm: qap.VisionModel, pixels: Pixels, configs: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The rows of the table; the first round is not counted."""
    found: dict[str, list[Pass]] = {name: [] for name in configs}
    for number in range(rounds + 1):
        for name, config in configs.items():
            one = run_pass(vlm, pixels, TEXT, config, n_decode=1)
            if number > 0:
                found[name].append(one)
    n_real = vlm._encoder.count((pixels.shape[1], pixels.shape[0])).n_real
    rows = []
    for name, config in configs.items():
        left = vlm._encoder.count_left(pixels, config)
        rows.append(summary(name, found["dense"], found[name], n_real if left is None else left))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="internvl3-1b", help="random weights of a true shape")
    parser.add_argument("--mmproj", type=Path, help="an mmproj file instead")
    parser.add_argument("--model", type=Path, help="its language model")
    parser.add_argument("--image", type=Path, help="a picture instead of the drawn page")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1448), metavar=("W", "H"), help="of the page")
    parser.add_argument("--blank", type=float, default=0.5, help="part of the page that is blank (default: 0.5)")
    parser.add_argument("--keep-ratio", type=float, default=0.125, help="part of the tokens kept (default: 0.125)")
    parser.add_argument("--level", type=int, default=2, help="of skip_flat_tiles and duplicates (default: 2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    args = parser.parse_args()
    if (args.mmproj is None) != (args.model is None):
        parser.error("expected --mmproj and --model together")
    mmproj, model = args.mmproj, args.model
    if mmproj is None:
        files = make_random_model(find_shape(args.shape))
        mmproj, model = files.mmproj, files.model
    width, height = args.size
    pixels = page(width, height, args.blank) if args.image is None else load_image(args.image)
    with qap.VisionModel(mmproj, model, n_ctx=8192, n_threads=args.threads) as vlm:
        rows = measure(vlm, pixels, settings(args.keep_ratio, args.level), args.rounds)
    if args.json:
        print(json.dumps({"benchmark": "flat_tiles", "mmproj": str(mmproj), "rounds": args.rounds, "rows": rows}))
        return 0
    print("| setting | left | kept | encode | first word | encode sooner | first word sooner |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for row in rows:
        print(
            f"| {row['setting']} | {row['left']} | {row['kept']} | {row['encode_s']:.2f} s | "
            f"{row['first_s']:.2f} s | {row['encode_x']:.2f}x | {row['first_x']:.2f}x |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
