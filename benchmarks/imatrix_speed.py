#!/usr/bin/env python3
"""How much slower a prefill is while an importance matrix is measured: rows a second, plain and measured in turns.

    python benchmarks/imatrix_speed.py --shape llava-1.5-7b --threads 2        # random weights, made once
    python benchmarks/imatrix_speed.py -m model-F16.gguf --rows 512 --rounds 5

Two contexts of one loaded model prefill the same tokens in turns, so that a busy machine slows down both. "image" is
measured without the output matrix, as rows of pictures are, "text" with it. Prints medians, their ratios to plain
prefill, and the peak of resident memory. A prefill of --shape llava-1.5-7b takes about half a minute on two cores: the
first command about five minutes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import _internals

from qap_gguf.bench import find_shape, make_random_model
from qap_gguf.language.collector import Collector
from qap_gguf.language.llama import LanguageModel
from qap_gguf.language.opener import open_llama

WARM_UP = 32  # rows of the first prefill of each kind, which reads the weights and is not timed


def prefill(llama: llama_cpp.Llama, n_rows: int) -> float:
    """Rows a second of one prefill from an empty KV cache."""
    language = LanguageModel(llama)
    language.reset()
    started = time.perf_counter()
    language.prefill([5 + i % 90 for i in range(n_rows)])
    language.synchronize()
    return n_rows / (time.perf_counter() - started)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Rows a second of a prefill, plain and measured.")
    parser.add_argument("--shape", default="llava-1.5-7b", help="a shape of `qap-gguf bench`")
    parser.add_argument("-m", "--model", type=Path, help="a language model, instead of a shape")
    parser.add_argument("--rows", type=int, default=512, help="rows of a prefill")
    parser.add_argument("--rounds", type=int, default=3, help="timed prefills of each kind")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    path = args.model or make_random_model(find_shape(args.shape)).model
    settings = {"n_ctx": args.rows, "n_batch": min(args.rows, 512), "n_threads": args.threads}
    llama: Any = open_llama(path, n_threads_batch=args.threads, verbose=False, **settings)
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    collector = Collector(llama)  # puts a context that it watches in the place of the first one
    measured, plain = llama._ctx, _internals.LlamaContext(model=llama._model, params=params, verbose=False)
    found: dict[str, list[float]] = {"plain": [], "image": [], "text": []}
    for number in range(args.rounds + 1):
        for kind, speeds in found.items():
            llama._ctx = plain if kind == "plain" else measured
            collector.kind = None if kind == "plain" else kind
            speed = prefill(llama, args.rows if number else min(args.rows, WARM_UP))
            if number:
                speeds.append(speed)
                print(f"round {number}, {kind}: {speed:.1f} rows a second", file=sys.stderr, flush=True)
    collector.check()
    print("| prefill | rows a second | of plain |\n| :-- | --: | --: |")
    for kind, speeds in found.items():
        ratio = statistics.median(mine / usual for mine, usual in zip(speeds, found["plain"], strict=True))
        print(f"| {kind} | {statistics.median(speeds):.1f} | {100 * ratio:.1f} % |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\n{path.name}, {args.rows} rows, {args.threads} threads, {args.rounds} rounds, ", end="")
    print(f"{len(collector.sums())} matrices, peak {peak / 1e9:.2f} GB")
    llama.close()


if __name__ == "__main__":
    main()
