"""One line of text for each picture of a folder.

    python examples/caption_folder.py photos/ --mmproj mmproj-f16.gguf --model model-Q4_K_M.gguf --n-keep 64

Without files the packaged model answers; it knows pictures of emoji in a grid. Prints the file's name, a tab and the
answer; a picture that cannot be read is noted on stderr and passed over.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import qap_gguf as qap

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def main() -> int:
    """Caption the pictures, in the order of their names."""
    parser = argparse.ArgumentParser(description="One line of text for each picture of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--question", default="How many objects are there?")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--n-keep", type=int, default=36)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    failed = 0
    with qap.VisionModel(args.mmproj, args.model, n_threads=args.threads) as vlm:
        for path in sorted(args.folder.iterdir()):
            if path.suffix.lower() not in SUFFIXES:
                continue
            try:
                answer = vlm.generate([path, args.question], prune=qap.PruneConfig(n_keep=args.n_keep))
            except qap.ImageError as err:
                print(f"{path.name}: {err}", file=sys.stderr)
                failed += 1
                continue
            print(f"{path.name}\t{' '.join(answer.split())}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
