#!/usr/bin/env python3
"""Make cases for our own surfaces (tests/fuzz/surfaces.py) until the time is up; keep the first that does harm.

    python tools/fuzz/fuzz_surfaces.py --seconds 600 --checkpoint FOLDER  # a small LLaVA; without it, what needs none
    python tools/fuzz/fuzz_surfaces.py --seconds 60 --surface arguments
    python tools/fuzz/fuzz_surfaces.py --seconds 600 --surface requests      # starts a server with the packaged model

A case that ends in anything but a right result or one line of our error is written to tests/fuzz/corpus, where the
tests find it. Counts on stdout, exit 1 for a finding.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS))

from fuzz.server_requests import Requests  # noqa: E402
from fuzz.surfaces import Arguments, Checkpoint, Metadata, Questions, SentencePiece, Surface  # noqa: E402
from serve.conftest import FUZZED, serving  # noqa: E402


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--surface", help="this one alone")
    args = parser.parse_args()
    surfaces: list[Surface] = [SentencePiece(), Metadata(), Arguments(), Questions()]
    if args.checkpoint is not None:
        surfaces.append(Checkpoint(args.checkpoint))
    with contextlib.ExitStack() as stack:
        if args.surface in (None, Requests.name):
            server = stack.enter_context(serving(*FUZZED))
            surfaces.append(Requests(*server.address, lambda: server.process.poll() is None))
        surfaces = [surface for surface in surfaces if args.surface in (None, surface.name)]
        if not surfaces:
            parser.error(f"--surface: expected another name (checkpoint needs --checkpoint), got {args.surface!r}")
        return report(surfaces, args.seconds, args.seed)


def report(surfaces: list[Surface], seconds: float, seed: int) -> int:
    """Run them in turn and print the counts."""
    counts = {surface.name: collections.Counter[str]() for surface in surfaces}
    found = number = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        surface = surfaces[number % len(surfaces)]
        case = surface.make(random.Random(f"{seed}/{number}"))
        number += 1
        try:
            counts[surface.name][surface.run(case)] += 1
        except Exception:
            traceback.print_exc()
            folder = TESTS / "fuzz" / "corpus" / surface.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"found-{seed}-{number}.json").write_text(json.dumps(case, indent=1) + "\n")
            counts[surface.name]["harm"] += 1
            found += 1
    for name, each in counts.items():
        print(f"{name}: {sum(each.values())} cases ({', '.join(f'{n} {end}' for end, n in sorted(each.items()))})")
    print(f"{number} cases, seed {seed}: {found} did harm")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
