"""One question, several K: what the model says when it sees fewer image tokens, and how long its prefill takes.

python examples/compare_k.py --image photo.jpg --question "What is this?" --mmproj mmproj-f16.gguf --model m.gguf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import qap_gguf as qap


def main() -> int:
    """Ask at all tokens, a half, a quarter, an eighth and a sixteenth."""
    parser = argparse.ArgumentParser(description="One question, several K.")
    parser.add_argument("--image", type=Path, default=qap.packaged_model().sample)
    parser.add_argument("--question", default="What is in row 1, column 2?")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--select", default="dpp")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    print("    K  prefill ms  answer")
    with qap.VisionModel(args.mmproj, args.model, n_threads=args.threads) as vlm:
        image = vlm.encode(args.image)  # once, for all K
        for part in (1, 2, 4, 8, 16):
            cfg = qap.PruneConfig(keep_ratio=1 / part, select=args.select)
            answer = vlm.generate([image, args.question], prune=cfg, stream=True)
            text = "".join(answer)
            print(f"{answer.stats.n_image_kept:5}  {1000 * answer.stats.prefill_s:10.1f}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
