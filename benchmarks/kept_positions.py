#!/usr/bin/env python3
"""What kept positions cost: the speed of a relabelled file, and the way without one (moving cells between runs).

    python benchmarks/kept_positions.py QUESTIONS -m model.gguf --relabelled model-keep.gguf --mmproj mmproj.gguf

First prefill and decoding of the relabelled file against the original, in turns, on text. Then what
``llama_memory_seq_add`` between runs of kept tokens costs and loses on the original.

A model with one position per token takes no gaps: each batch must begin where the cache ends. But cells can be moved.
So a run of kept tokens is decoded next to what stands before it, then all that stands before is moved back by the gap;
the cache starts at a position as large as all gaps together. Later rows see right distances. What is lost: while a run
is computed, its own distance to what stands before it is too small by one gap. ``gap`` moves at each gap, ``row`` only
where a row of the picture ends, ``none`` never (compact positions).

For each question: the logits of the first answer token against those of the relabelled file with positions kept, which
are exact. One process; the times are medians of the prefill, each as a ratio to the relabelled file's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import qap_gguf as qap
from qap_gguf.arguments import FloatArray, IndexArray
from qap_gguf.generation.messages import read_messages
from qap_gguf.language.opener import open_llama

WAYS = ("gap", "row", "none")


class Shifter:
    """A language model with one position per token, whose cells are moved to where they belong."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int) -> None:
        self.llama = open_llama(
            path, n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, verbose=False, n_batch=512
        )
        self.context = self.llama._ctx.ctx
        self.memory = llama_cpp.llama_get_memory(self.context)
        if not llama_cpp.llama_memory_can_shift(self.memory):
            raise SystemExit(f"kept_positions: expected a model whose cells can be moved, got {path}; use another one")

    def decode(self, at: int, *, tokens: Sequence[int] = (), rows: FloatArray | None = None) -> int:
        """Evaluate tokens or rows at positions from `at` on; returns the position after them."""
        n = len(tokens) if rows is None else len(rows)
        batch = llama_cpp.llama_batch_init(n, 0 if rows is None else rows.shape[1], 1)
        try:
            batch.n_tokens = n
            for i in range(n):
                batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = at + i, 1, 0, i == n - 1
                if rows is None:
                    batch.token[i] = tokens[i]
            if rows is not None:
                np.ctypeslib.as_array(batch.embd, shape=rows.shape)[:] = rows
            if llama_cpp.llama_decode(self.context, batch):
                raise SystemExit("kept_positions: expected llama_decode to take the batch, it did not; see its log")
        finally:
            llama_cpp.llama_batch_free(batch)
        return at + n

    def answer(
        self,
        before: Sequence[int],
        picture: Iterator[tuple[int, FloatArray]],
        after: Sequence[int],
        after_gap: int,
        total: int,
    ) -> tuple[FloatArray, int]:
        """Logits after the prompt, and the moves made.

        Args:
            before, after: text tokens around the picture.
            picture: (gap before the run, rows) for each run.
            after_gap: positions between the last run and the text after it.
            total: sum of all gaps.
        """
        llama_cpp.llama_memory_clear(self.memory, True)
        end = self.decode(total, tokens=before)
        moves = 0
        for gap, rows in picture:
            start, end = end, self.decode(end, rows=rows)
            if gap:
                llama_cpp.llama_memory_seq_add(self.memory, 0, 0, start, -gap)
                moves += 1
        start, end = end, self.decode(end, tokens=after[:1])
        if after_gap:
            llama_cpp.llama_memory_seq_add(self.memory, 0, 0, start, -after_gap)
            moves += 1
        self.decode(end, tokens=after[1:])
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(int(self.llama.n_vocab()),)).copy(), moves


def runs(indices: IndexArray, width: int, way: str) -> list[tuple[int, int, int]]:
    """(gap before it, first, end) of each run of kept tokens, in numbers of the kept ones.

    Example:
        >>> runs(np.array([0, 1, 4, 9], np.int32), 4, "gap"), runs(np.array([0, 2, 4, 9], np.int32), 4, "row")
        ([(0, 0, 2), (2, 2, 3), (4, 3, 4)], [(0, 0, 2), (2, 2, 3), (4, 3, 4)])
        >>> runs(np.array([2, 9], np.int32), 4, "none")
        [(0, 0, 2)]
    """
    if way == "none":
        return [(0, 0, len(indices))]
    out: list[tuple[int, int, int]] = []
    at = first = 0  # the position that comes next
    for i in range(1, len(indices) + 1):
        if i < len(indices):
            same_row = indices[i] // width == indices[i - 1] // width
            if indices[i] == indices[i - 1] + 1 or (way == "row" and same_row):
                continue
        gap = int(indices[first]) - at
        out.append((gap, first, i))
        at = at + gap + (i - first)
        first = i
    return out


def kl(exact: FloatArray, other: FloatArray) -> float:
    """Divergence of the answer's distribution from the exact one, in nats."""
    logs = []
    for logits in (exact, other):
        wide = logits.astype(np.float64) - logits.max()
        logs.append(wide - np.log(np.exp(wide).sum()))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The three ways over the questions."""
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()][: args.limit]
    shifter = Shifter(args.model, 2048, args.threads)
    found: dict[str, dict[str, list[float]]] = {
        way: {"nmse": [], "kl": [], "same": [], "time": [], "moves": []} for way in WAYS
    }
    with qap.VisionModel(args.mmproj, args.relabelled, n_threads=args.threads) as vlm:
        for row in rows:
            image = vlm.encode(args.questions.parent / row["image"])
            cfg = qap.PruneConfig(n_keep=args.n_keep, select=args.select, positions="keep")
            kept = vlm.prune(image, cfg)
            vlm.language_model.reset()  # type: ignore[no-untyped-call]
            started = time.perf_counter()
            vlm.generate([image, row["question"]], prune=cfg, stream=True)
            usual = time.perf_counter() - started
            exact = vlm.last_logits()
            turns = read_messages([{"role": "user", "content": [image, row["question"]]}])
            prompt = vlm._template.render(turns)
            chunks = vlm._encoder.tokenize(prompt.text, [image.size], add_special=True)
            texts = [list(chunk.tokens) for chunk in chunks if not chunk.is_image]
            indices, features = kept.indices, kept.pieces[0].features
            for way in WAYS:
                parts = runs(indices, image.grid[1], way)
                used = sum(gap for gap, _, _ in parts) + len(indices)
                left = 0 if way == "none" else image.n_tokens - used
                total = used - len(indices) + left
                started = time.perf_counter()
                picture = ((gap, features[first:end]) for gap, first, end in parts)
                logits, moves = shifter.answer(texts[0], picture, texts[1], left, total)
                spent = time.perf_counter() - started
                error = float(((logits - exact) ** 2).sum() / (exact**2).sum())
                for name, value in zip(
                    found[way],
                    (error, kl(exact, logits), logits.argmax() == exact.argmax(), spent / usual, moves),
                    strict=True,
                ):
                    found[way][name].append(float(value))
    return {
        way: {
            "kl": statistics.mean(values["kl"]),
            "nmse": statistics.median(values["nmse"]),
            "same_token_percent": 100 * statistics.mean(values["same"]),
            "prefill_ratio": statistics.median(values["time"]),
            "moves": statistics.mean(values["moves"]),
        }
        for way, values in found.items()
    }


def speed(args: argparse.Namespace, n_prompt: int = 256, n_answer: int = 64) -> dict[str, float]:
    """Time of the relabelled file over that of the original, in turns: prefill of text, and decoding."""
    llamas = [
        open_llama(path, n_ctx=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False, n_batch=512)
        for path in (args.model, args.relabelled)
    ]
    prompt = [7 + i % 200 for i in range(n_prompt)]
    times: dict[str, list[list[float]]] = {"prefill": [[], []], "decode": [[], []]}
    for turn in range(args.rounds + 1):
        for which, llama in enumerate(llamas):
            llama.reset()  # type: ignore[no-untyped-call]
            started = time.perf_counter()
            llama.eval(prompt)
            middle = time.perf_counter()
            for token in prompt[:n_answer]:
                llama.eval([token])
            if turn:  # the first is a warm-up
                times["prefill"][which].append(middle - started)
                times["decode"][which].append(time.perf_counter() - middle)
    for llama in llamas:
        llama.close()
    pairs = {name: zip(new, old, strict=True) for name, (old, new) in times.items()}
    return {name: statistics.median(new / old for new, old in found) for name, found in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("questions", type=Path, nargs="?", help="without them, only the speed of the two files")
    parser.add_argument("-m", "--model", type=Path, required=True, help="the file as it was, one position per token")
    parser.add_argument("--relabelled", type=Path, required=True, help="its relabelled copy")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--n-keep", type=int, default=32)
    parser.add_argument("--select", default="coverage")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ratios = speed(args)
    print(f"relabelled / original, median of {args.rounds} rounds in turns: {json.dumps(ratios)}")
    if args.questions is None:
        return
    print("| moves | moves a picture | KL to kept | NMSE | same first token | prefill, ratio |")
    print("| :-- | --: | --: | --: | --: | --: |")
    found = measure(args)
    for way, v in found.items():
        figures = f"{v['moves']:.1f} | {v['kl']:.4f} | {v['nmse']:.2e} | {v['same_token_percent']:.1f} %"
        print(f"| {way} | {figures} | {v['prefill_ratio']:.2f} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
