#!/usr/bin/env python3
"""The memory that choosing tokens and LLaVA-NeXT's tiles take, as estimated and as measured.

    python benchmarks/memory_estimates.py              # the table; exit 1 where an estimate is off by over 20 %
    python benchmarks/memory_estimates.py --case dpp

Measured is the peak of the resident memory of a process that does the step, less that of one that does the same
without it; the kernel's count (VmHWM, of Linux), each process a new one. The steps: choosing a quarter of the tokens
from features of 1,024 channels by dpp, with all cosines and, above 4,096 tokens, row by row; by divprune; by coverage;
merging the others into the kept ones; a picture of LLaVA-NeXT, encoded and pruned by default, against the same picture
through the same encoder as one tile; the same for Llama 4, whose tiles are encoded one by one; and an encoder without
flash attention, against one with it. Estimates are those that the package refuses by (native/src/select.cpp,
native/src/gate/gate-room.cpp). The NeXT files are the packaged one with 576 tokens a tile and a grid of tiles, the
others tiny ones with random weights (tools/fuzz/tiny_mmproj.py), Llama 4's with 576 tokens a tile too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import struct
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "fuzz"))

WIDTH = 1024  # channels of made-up features
SIDE, PATCH = 384, 16  # of a tile and of a token, in pixels
TINY_PATCH = 8  # of a tiny encoder
MOST_OFF = 0.2

Encoder = tuple[Path, bool | None]  # its file, and whether with flash attention: None is where it can be


@dataclass(frozen=True)
class Case:
    """A step and its size.

    Attributes:
        step: dpp, divprune, coverage, merge, next, llama4, or attention.
        size: tokens, tiles along a side of the grid, or patches along a side.
    """

    step: str
    size: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.step == "next":
            return f"LLaVA-NeXT, {self.size} x {self.size} tiles"
        if self.step == "llama4":
            return f"Llama 4, {self.size} x {self.size} tiles"
        if self.step == "attention":
            return f"no flash attention, {self.size} x {self.size} patches, 4 heads"
        return f"{self.step}{', row by row' if self.step == 'dpp' and self.size > 4096 else ''}"

    @property
    def n_tokens(self) -> int:
        """Tokens of the picture."""
        if self.step == "attention":
            return (self.size // 2) ** 2
        side = SIDE // PATCH
        line = side * self.size
        return side * side + line * line if self.step in ("next", "llama4") else self.size


CASES = [
    *(Case("dpp", n) for n in (1024, 2048, 4096, 4608, 6144, 8192)),
    *(Case(step, n) for step in ("divprune", "coverage", "merge") for n in (1024, 2048, 4096)),
    *(Case("next", n) for n in (2, 3, 4)),
    *(Case("llama4", n) for n in (2, 3, 4)),
    *(Case("attention", n) for n in (48, 64, 96)),
]


# --- in processes of their own ---


def _peak() -> int:
    """The most that was resident. Not ru_maxrss, which keeps what the parent held when it started this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _choose(case: Case, with_step: bool) -> int:
    """The peak of a process that has features, and chooses some of them."""
    import numpy as np

    import qap_gguf as qap
    from qap_gguf.pruning.score import cosines, merge_average

    def work(n: int) -> None:
        rng = np.random.default_rng(n)
        x, scores = rng.standard_normal((n, WIDTH), np.float32), rng.random(n, np.float32)
        kept = max(1, n // 4)
        if n == case.size and not with_step:
            return
        if case.step == "merge":
            merge_average(x, cosines(x), qap.select(scores, kept))
        else:
            qap.select(scores, kept, x, case.step)

    work(8)  # libraries and thread pools
    work(case.size)
    return _peak()


def _encode(mmproj: str, model: str, side: int, flash_attn: bool | None) -> int:
    """The peak of a process that encodes a picture and prunes it."""
    import numpy as np

    import qap_gguf as qap

    picture = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with qap.VisionModel(mmproj, model, n_ctx=256, n_threads=1, flash_attn=flash_attn) as vlm:
        vlm.prune(vlm.encode(picture), qap.PruneConfig())
    return _peak()


def _in_process(function: Any, *arguments: Any) -> int:
    # "spawn": a forked child would start with all that this process holds
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return int(pool.submit(function, *arguments).result())


# --- estimate and measure ---


def write_mmproj(path: Path, n_tiles: int) -> Path:
    """The packaged encoder for pictures of SIDE pixels; with a grid of n_tiles x n_tiles, or without one for 0."""
    import qap_gguf as qap
    from gguf_mutations import ARRAY, STRING, Gguf, Key, Tensor, write

    file = Gguf(qap.packaged_model().mmproj.read_bytes())
    u32, i32, f32, f16 = 4, 5, 0, 1
    vision = b"clip.vision."
    changed = {vision + b"image_size": (u32, struct.pack("<I", SIDE))}
    newline = []
    if n_tiles:
        changed[vision + b"image_grid_pinpoints"] = (ARRAY, struct.pack("<IQ2i", i32, 2, *[SIDE * n_tiles] * 2))
        changed[vision + b"mm_patch_merge_type"] = (STRING, struct.pack("<Q", 13) + b"spatial_unpad")
        newline = [Tensor(b"v.image_newline", [256], f32, bytes(4 * 256), 0)]
    keys = [key for key in file.keys if key.name not in changed]
    keys += [Key(name, *value, 0) for name, value in changed.items()]
    tensors = []
    for tensor in file.tensors:
        if tensor.name == b"v.position_embd.weight":
            places = (SIDE // PATCH) ** 2 + 1
            tensors.append(Tensor(tensor.name, [tensor.dims[0], places], f16, bytes(2 * tensor.dims[0] * places), 0))
        else:
            tensors.append(tensor)
    path.write_bytes(write(keys, [*tensors, *newline]))
    return path


def write_tiny(path: Path, projector: str, side: int, counts: dict[str, int]) -> Path:
    """A tiny encoder of that projector for pictures of `side` pixels, with these numbers in its header."""
    from gguf_mutations import Gguf, Key, write
    from tiny_mmproj import tiny_mmproj

    file = Gguf(tiny_mmproj(projector, side=side))
    keys = [Key(f"clip.vision.{name}".encode(), 4, struct.pack("<I", count), 0) for name, count in counts.items()]
    path.write_bytes(write([*file.keys, *keys], file.tensors))
    return path


def _more(larger: Encoder, smaller: Encoder, model: Path, side: int) -> tuple[float, float]:
    """(estimated, measured) bytes that one encoder takes more than another."""
    from qap_gguf import _core

    pair = (larger, smaller)
    estimates = [_core.mmproj_bytes(str(file), flash is not False) for file, flash in pair]
    peaks = [_in_process(_encode, str(file), str(model), side, flash) for file, flash in pair]
    return estimates[0] - estimates[1], peaks[0] - peaks[1]


def measure(case: Case, folder: Path) -> tuple[float, float]:
    """(estimated, measured) bytes."""
    import qap_gguf as qap
    from qap_gguf import _core
    from qap_gguf.convert.relabel import relabel
    from qap_gguf.defaults import to_params

    model = qap.packaged_model().model
    if case.step == "next":
        plain = folder / "plain.gguf"  # LLaVA-NeXT's tiles have one position a token
        if not plain.exists():
            relabel(model, plain, undo=True)
        cut, whole = (write_mmproj(folder / f"{n}.gguf", n) for n in (case.size, 0))
        return _more((cut, None), (whole, None), plain, SIDE * case.size)
    if case.step == "llama4":
        cut, whole = (
            write_tiny(folder / f"llama4-{n}.gguf", "llama4", SIDE, {"preproc_max_tiles": n}) for n in (case.size**2, 1)
        )
        return _more((cut, None), (whole, None), model, SIDE * case.size)
    if case.step == "attention":
        file = write_tiny(folder / f"attention-{case.size}.gguf", "pixtral", TINY_PATCH * case.size, {})
        return _more((file, False), (file, True), model, TINY_PATCH * case.size)
    merge = {"select": "topk", "merge": "average"} if case.step == "merge" else {"select": case.step}
    params = to_params(qap.PruneConfig(**merge))  # type: ignore[arg-type]
    estimated = _core.choice_bytes(params, case.size, WIDTH, case.size // 4)
    return estimated, _in_process(_choose, case, True) - _in_process(_choose, case, False)


def rows(cases: list[Case]) -> Iterator[tuple[Case, float, float]]:
    """The cases with what was estimated and measured."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            yield (case, *measure(case, Path(folder)))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted({case.step for case in CASES}), help="this step alone")
    args = parser.parse_args()
    print("| step | tokens | estimate | measured | off |\n| :-- | --: | --: | --: | --: |")
    n_off = 0
    for case, estimated, measured in rows([case for case in CASES if args.case in (None, case.step)]):
        off = estimated / measured - 1.0
        n_off += abs(off) > MOST_OFF
        print(
            f"| {case.name} | {case.n_tokens:,} | {estimated / 1e6:.0f} MB | {measured / 1e6:.0f} MB | {off:+.0%} |",
            flush=True,
        )
    return 1 if n_off else 0


if __name__ == "__main__":
    sys.exit(main())
