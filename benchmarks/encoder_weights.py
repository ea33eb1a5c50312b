#!/usr/bin/env python3
"""Time of an encode by the type of the encoder's matrices, with and without faster kernels, in one process in turns.

    python benchmarks/encoder_weights.py                      # the packaged model: a look at the table, no figures
    python benchmarks/encoder_weights.py --shape smolvlm-256m --max-image-tokens 128 --rounds 7 --threads 2
    python benchmarks/encoder_weights.py --mmproj mmproj-f16.gguf --model model.gguf --image photo.png --threads 2

Each type is the given mmproj file with its matrices converted (qap.requantize, into a temporary folder). "file" is
QAP_ENCODER_REPACK=0, where every matrix lies as it is in the file. Where ggml has no faster kernels for a type on this
CPU, nothing is repacked and the two are the same. NMSE is that of the embeddings against the f32 file's; random weights
(--shape) say little about it, a real file does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from qap_gguf.bench.random_files import make_random_model
from qap_gguf.bench.shapes import SHAPES, find_shape
from qap_gguf.convert import REQUANTIZE_TYPES
from qap_gguf.vision.images import load_image

VARIABLE = "QAP_ENCODER_REPACK"
Rows = npt.NDArray[np.float32]


@contextmanager
def repack(on: bool) -> Iterator[None]:
    """Encoders that are loaded inside have faster kernels, or not."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@dataclass
class Entry:
    """One row of the table: a type, with or without faster kernels."""

    kind: str
    faster: bool
    vlm: Any
    n_bytes: int
    seconds: list[float] = field(default_factory=list)
    rows: Rows | None = None

    @property
    def repacked(self) -> int:
        """Bytes of weights that faster kernels read."""
        return int(self.vlm._encoder.repacked_bytes)

    def encode(self, pixels: Any) -> None:
        """Encode once, without any cache, and note the time."""
        start = time.perf_counter()
        embedding = self.vlm._encoder.encode(pixels, hidden=False)
        self.seconds.append(time.perf_counter() - start)
        self.rows = embedding.features


def nmse(got: Rows, want: Rows) -> float:
    """Squared error as a part of the squared values.

    Example:
        >>> nmse(np.float32([1, 3]), np.float32([1, 2]))
        0.2
    """
    a, b = got.astype("f8"), want.astype("f8")
    return float(((a - b) ** 2).sum() / (b**2).sum())


def load(args: argparse.Namespace, stack: ExitStack) -> list[Entry]:
    """Every type with and without faster kernels; the language model is loaded once."""
    if args.shape:
        files = make_random_model(find_shape(args.shape))
        mmproj, model = files.mmproj, files.model
    else:
        packaged = qap.packaged_model()
        mmproj, model = args.mmproj or packaged.mmproj, args.model or packaged.model
    llama = llama_cpp.Llama(str(model), n_ctx=512, n_threads=args.threads, verbose=False)
    stack.callback(llama.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="encoder-weights-")))
    entries = []
    for kind in dict.fromkeys(["f32", *args.types]):
        made = qap.requantize(mmproj, folder / f"{kind}.gguf", kind)
        for line in made.notes:
            print(f"{kind}: {line}", file=sys.stderr)
        for faster in (False, True):
            with repack(faster):
                vlm = stack.enter_context(
                    qap.VisionModel(made.path, llama, n_threads=args.threads, max_image_tokens=args.max_image_tokens)
                )
            entries.append(Entry(kind, faster, vlm, made.path.stat().st_size))
    return entries


def table(entries: list[Entry], base: str) -> list[dict[str, Any]]:
    """Figures of each entry; `base` without faster kernels is what the others are compared with, round by round."""
    whole = next(entry for entry in entries if entry.kind == "f32" and not entry.faster)
    stock = next((entry for entry in entries if entry.kind == base and not entry.faster), whole)
    assert whole.rows is not None
    found = []
    for entry in entries:
        assert entry.rows is not None
        ratios = [a / b for a, b in zip(stock.seconds, entry.seconds, strict=True)]
        found.append(
            {
                "type": entry.kind,
                "kernels": "faster" if entry.faster else "file",
                "mb": round(entry.n_bytes / 1e6, 1),
                "repacked_mb": round(entry.repacked / 1e6, 1),
                "encode_ms": round(1000 * statistics.median(entry.seconds), 1),
                "times": round(statistics.median(ratios), 2),
                "times_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "nmse": nmse(entry.rows, whole.rows),
            }
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of a true shape, made once and kept")
    parser.add_argument("--mmproj", type=Path, help="an mmproj file in f32, f16 or bf16 [the packaged one]")
    parser.add_argument("--model", type=Path, help="its language model [the packaged one]")
    parser.add_argument("--image", type=Path, help="a picture [the packaged one]")
    parser.add_argument("--max-image-tokens", type=int, help="fewer tiles, where the family cuts pictures into them")
    parser.add_argument("--types", nargs="+", choices=list(REQUANTIZE_TYPES), default=list(REQUANTIZE_TYPES))
    parser.add_argument("--base", choices=list(REQUANTIZE_TYPES), default="f16", help="the type that `times` refers to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if (args.mmproj is None) != (args.model is None) or (args.shape and args.mmproj):
        parser.error("give --mmproj and --model together, or --shape, or none of them")
    if args.rounds < 1:
        parser.error(f"expected --rounds from 1, got {args.rounds}")
    pixels = load_image(args.image or qap.packaged_model().sample)
    with ExitStack() as stack:
        entries = load(args, stack)
        for entry in entries:  # buffers are made at the first encode
            entry.encode(pixels)
            entry.seconds.clear()
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
            for entry in entries if i % 2 == 0 else reversed(entries):
                entry.encode(pixels)
        rows = table(entries, args.base)
        features = qap.info()["cpu_features"]
    print(f"| type | kernels | MB | repacked MB | encode ms | times {args.base} | range | NMSE to f32 |")
    print("| :-- | :-- | --: | --: | --: | --: | --: | --: |")
    for row in rows:
        low, high = row["times_range"]
        print(
            f"| {row['type']} | {row['kernels']} | {row['mb']} | {row['repacked_mb']} | {row['encode_ms']} "
            f"| {row['times']} | {low} to {high} | {row['nmse']:.1e} |"
        )
    print(json.dumps({"threads": args.threads, "rounds": args.rounds, "cpu_features": features, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
