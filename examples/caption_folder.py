"""One line of text for each picture of a folder and of the folders in it.

    python examples/caption_folder.py photos/ --mmproj mmproj-f16.gguf --model model-Q4_K_M.gguf --n-keep 64
    python examples/caption_folder.py photos/ --out captions.tsv    # stop it as you like, and run it again to go on

Without files the packaged model answers; it knows pictures of emoji in a grid. Prints the picture's path within the
folder, a tab and the answer, each line as soon as it is there; a picture that cannot be read is noted on stderr and
passed over. With --out the lines go to the end of that file, and pictures that have a line there are passed over.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TextIO

import qap_gguf as qap

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def lines_of(path: Path | None) -> set[str]:
    """Pictures that have a whole line; what was cut off within one is taken out of the file."""
    if path is None or not path.is_file():
        return set()
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(whole), encoding="utf-8")
    return {line.partition("\t")[0] for line in whole}


def main() -> int:
    """Caption the pictures, in the order of their names."""
    parser = argparse.ArgumentParser(description="One line of text for each picture of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--question", default="How many objects are there?")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--n-keep", type=int, default=36)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    done, failed = lines_of(args.out), 0
    with contextlib.ExitStack() as stack:
        out: TextIO = sys.stdout if args.out is None else stack.enter_context(args.out.open("a", encoding="utf-8"))
        vlm = stack.enter_context(qap.VisionModel(args.mmproj, args.model, n_threads=args.threads))
        for path in sorted(args.folder.rglob("*")):
            name = path.relative_to(args.folder).as_posix()
            if path.suffix.lower() not in SUFFIXES or not path.is_file() or name in done:
                continue
            try:
                image = vlm.encode(path)
                prune = qap.PruneConfig(n_keep=min(args.n_keep, image.n_tokens))
                answer = vlm.generate([image, args.question], prune=prune)
            except (qap.QapError, OSError) as err:
                print(f"{name}: {err}", file=sys.stderr, flush=True)
                failed += 1
                continue
            print(f"{name}\t{' '.join(answer.split())}", file=out, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
