#!/usr/bin/env python3
"""What scores and selection cost: by themselves, and as a share of the time that the image encoder takes.

    python benchmarks/score_select.py               # table and JSON line; files with random weights are made once
    python benchmarks/score_select.py --json-only   # the JSON line alone

One process, two threads, medians after a warm-up. A share is the median over rounds of cost / encode, both taken in
the same round, so that a machine that other jobs slow down slows both. The bounds, with the default error int4 and
K = 64: score and topk take at most 1 % of the encode, score and dpp at most 3 %; exit 1 where one is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.bench import RandomModel, Shape, find_shape, make_random_model
from qap_gguf.language.llama import LanguageModel
from qap_gguf.language.opener import open_llama
from qap_gguf.pruning.score import cosines, needs_cosines, select_by

SHAPE = find_shape("llava-1.5-7b")
N_EMBD, N_LAYER, IMAGE = SHAPE.language.n_embd, SHAPE.vision.n_layer, SHAPE.vision.image
N_KEEP, THREADS = 64, 2
ERRORS = ("int4", "q4_0", "q8_0")
RANKED = ("topk", "dpp", "coverage")  # they look at scores
UNRANKED = ("divprune", "random")
SIZES = (576, 2880)  # LLaVA-1.5, and LLaVA-NeXT with five tiles
LIMITS = {"topk": 1.0, "dpp": 3.0, "coverage": 3.0}  # per cent of the encode

F32 = npt.NDArray[np.float32]


def run(x: F32, relevance: F32, error: str | None, method: str) -> None:
    """Scores and selection as a prune does them; random and divprune look at no score."""
    total = relevance
    if error is not None:
        total = qap.score(x, qap.PruneConfig(error=error), relevance, n_threads=THREADS).total
    table = cosines(x, n_threads=THREADS) if needs_cosines(method) else None
    select_by(total, table, N_KEEP, method, 0)


def seconds(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def features(n: int) -> tuple[F32, F32]:
    """Tokens (n, 4096) of different sizes, and a relevance of each."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, N_EMBD), dtype=np.float32) * rng.uniform(0.2, 1.0, (n, 1)).astype(np.float32)
    return x, rng.gamma(0.5, size=n).astype(np.float32)


def measure_methods(repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """{N: {error: {method: milliseconds}}}; "none" is the error of methods that need no score."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for n in SIZES:
        x, relevance = features(n)
        rows: dict[str, dict[str, float]] = {}
        for error, method in [(e, m) for e in ERRORS for m in RANKED] + [(None, m) for m in UNRANKED]:
            run(x, relevance, error, method)
            times = [seconds(run, x, relevance, error, method) for _ in range(repeats)]
            rows.setdefault(error or "none", {})[method] = 1e3 * statistics.median(times)
        out[str(n)] = rows
    return out


class DenseEncoder:
    """The image encoder without any pruning, as stock llama.cpp runs it."""

    def __init__(self, files: RandomModel) -> None:
        self._llama = open_llama(files.model, n_ctx=256, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
        self._encoder = _core.Encoder(
            mmproj=str(files.mmproj), model=LanguageModel(self._llama).model_address, device="CPU", n_threads=THREADS,
            flash_attn=None, max_tokens=None, verbose=False,
        )  # fmt: skip
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)
        chunks = self._encoder.tokenize(_core.media_marker(), [pixels], add_special=False, parse_special=True)
        (self._chunk,) = [chunk for chunk in chunks if chunk.is_image]

    def encode(self) -> F32:
        return self._encoder.encode(self._chunk, capture=False)

    def close(self) -> None:
        self._encoder.close()
        self._llama.close()


def measure_shares(files: RandomModel, rounds: int) -> dict[str, Any]:
    """Encode in milliseconds, and what score and selection take of it in per cent."""
    encoder = DenseEncoder(files)
    x, encodes = encoder.encode(), []
    _, relevance = features(len(x))
    costs: dict[str, list[float]] = {method: [] for method in LIMITS}
    for method in LIMITS:
        run(x, relevance, "int4", method)
    for _ in range(rounds):
        encodes.append(seconds(encoder.encode))
        for method, found in costs.items():
            # one encode is as long as hundreds of these: several of them say what the round was like
            found.append(statistics.median(seconds(run, x, relevance, "int4", method) for _ in range(9)))
    encoder.close()
    shares = {m: [100 * c / e for c, e in zip(found, encodes, strict=True)] for m, found in costs.items()}
    return {
        "n_tokens": len(x),
        "encode_ms": 1e3 * statistics.median(encodes),
        "cost_ms": {m: 1e3 * statistics.median(found) for m, found in costs.items()},
        "share_percent": {m: statistics.median(found) for m, found in shares.items()},
        "share_percent_range": {m: [min(found), max(found)] for m, found in shares.items()},
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    wide = [name for name in ("AVX", "AVX2", "AVX512", "NEON", "SVE") if f"{name} = 1" in _core.system_info()]
    return {
        "cpu": name,
        "cpus": os.cpu_count(),
        "threads": THREADS,
        "simd": wide,
        "system": f"{platform.system()} {platform.machine()}",
        "load": [round(load, 2) for load in os.getloadavg()],
        "llama_cpp_python": _core.upstream_version,
        "qap_gguf": _core.__version__,
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def print_table(result: dict[str, Any]) -> None:
    print(f"| error | method | {' | '.join(f'N = {n}' for n in SIZES)} |")
    print("| --- | --- |" + " ---: |" * len(SIZES))
    first = result["methods_ms"][str(SIZES[0])]
    for error, methods in first.items():
        for method in methods:
            cells = [f"{result['methods_ms'][str(n)][error][method]:.2f} ms" for n in SIZES]
            print(f"| {error} | {method} | {' | '.join(cells)} |")
    encode = result["encode"]
    print(f"\nencode, {N_LAYER} layers of CLIP-L/336 and projector: {encode['encode_ms']:.0f} ms")
    for method, limit in LIMITS.items():
        low, high = encode["share_percent_range"][method]
        print(
            f"int4 + {method}, K = {N_KEEP}: {encode['cost_ms'][method]:.1f} ms, "
            f"{encode['share_percent'][method]:.2f} % of the encode ({low:.2f} to {high:.2f}), limit {limit:g} %"
        )
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of scores and selection, and their share of the encode.")
    parser.add_argument("--json-only", action="store_true", help="print the JSON line alone")
    parser.add_argument("--repeats", type=int, default=15, help="runs for a median, at least 7 (default: 15)")
    parser.add_argument("--rounds", type=int, default=7, help="encodes for the shares, at least 7 (default: 7)")
    parser.add_argument("--folder", type=Path, help="where the random models are kept (default: the cache)")
    args = parser.parse_args()
    if args.repeats < 7 or args.rounds < 7:
        parser.error("expected at least 7 runs for a median")
    # The whole encoder; of the language model libmtmd only needs the width, so one small layer will do.
    shell = dataclasses.replace(SHAPE.language, n_vocab=512, n_layer=1, n_ff=256, n_head_kv=1)
    files = make_random_model(Shape("llava-1.5-7b-shell", shell, SHAPE.vision), args.folder)

    result = rounded(
        {
            "benchmark": "score_select",
            "n_embd": N_EMBD,
            "n_keep": N_KEEP,
            "methods_ms": measure_methods(args.repeats),
            "encode": measure_shares(files, args.rounds),
            "limits_percent": LIMITS,
            "machine": machine(),
        }
    )
    if not args.json_only:
        print_table(result)
    print(json.dumps(result))
    kept = all(result["encode"]["share_percent"][method] <= limit for method, limit in LIMITS.items())
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
