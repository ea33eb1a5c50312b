#!/usr/bin/env python3
"""Does memory grow with the number of pictures? Encodes one new picture after the other and watches the process.

    python tools/fuzz/leak_check.py               # 1,000 encodes; prints the growth, exit 1 if it is 1 MB or more
    python tools/fuzz/leak_check.py --n 100 --answers

Each picture is another one, so that the encoder runs for each (it is counted), and the cache of embeddings, which has
room for four, drops one for each. The first pictures are not counted: buffers, arenas of the allocator and Python's
caches find their size in them. The figure is the resident memory at the end less that after them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

import numpy as np

import qap_gguf as qap

LIMIT = 1_000_000
WARM = 2 * 144  # each K twice: a larger one makes room that stays
ROOM = 4  # pictures in the cache


def resident() -> int:
    """Bytes of memory that this process occupies now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(n: int, answers: bool) -> tuple[int, int]:
    """(bytes by which the process grew while it encoded and pruned `n` pictures, passes of the encoder for them)."""
    rng = np.random.default_rng(0)
    room = ROOM * 144 * 260 * 4  # rows of 256 numbers, and what is kept beside each
    with qap.VisionModel(n_threads=1, cache=qap.EmbeddingCache(room)) as vlm:
        before = passes = 0
        for number in range(WARM + n):
            if number == WARM:
                before, passes = resident(), vlm.n_encodes
            image = vlm.encode(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8))
            vlm.prune(image, qap.PruneConfig(n_keep=1 + number % 144, select=("topk", "dpp")[number % 2]))
            if answers:
                vlm.generate([image, "How many objects are there?"], prune=qap.PruneConfig(n_keep=18), max_tokens=4)
        return resident() - before, vlm.n_encodes - passes


def main() -> int:
    """Print the growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="pictures that count (default 1000)")
    parser.add_argument("--answers", action="store_true", help="let the language model answer each time")
    args = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        print("leak_check: expected /proc/self/statm, found none; run it on Linux", file=sys.stderr)
        return 1
    started = time.perf_counter()
    grown, passes = growth(args.n, args.answers)
    print(f"{args.n} pictures, {passes} encodes: memory grew by {grown / 1e6:.3f} MB (limit {LIMIT / 1e6:.0f} MB)")
    print(f"leak_check: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 1 if grown >= LIMIT or passes != args.n else 0


if __name__ == "__main__":
    sys.exit(main())
