#!/usr/bin/env python3
"""Pictures a minute: stock llama-cpp-python one by one, ours one by one, slots side by side, two Ray actors.

    python benchmarks/batch_throughput.py                                          # the packaged model
    python benchmarks/batch_throughput.py --shape llava-1.5-7b --pictures 16 --slow-pictures 3 --threads 2

Each way runs in a process of its own, one after the other, in each round; its model is loaded and one picture answered
before the time counts. Pictures are noise and all differ, so that no cache helps; every answer has --tokens tokens, for
the end of text is made unlikely. K is N / 8. Ways: `stock` (Llava15ChatHandler in a process without us), `one`
(ChatHandler, K), `slots-dense` and `slots` (a llama-server with --parallel slots, all tokens and K), `ray` (two actors,
half of the threads and of the slots each, K). Prints a table of medians and ratios to stock, then a line of JSON.

A slot has --ctx cells where all tokens are kept, and --pruned-ctx where K are: that is what pruning frees.

A shape has random weights: speed only. ggml holds weights in Q4_0 twice, so each process of llava-1.5-7b takes 9 GB;
with `--ctx 768 --pruned-ctx 256` its two actors fit into 20 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("stock", "one", "slots-dense", "slots", "ray")
SLOW = ("stock", "one")
# Short, for a shape has a token for each character.
SYSTEM, PROMPT = "Be brief.", "What is in it?"


def make_pictures(folder: Path, n: int, side: int) -> list[str]:
    """Pictures of noise, one more than `n`; the first one is for warming up."""
    import numpy as np
    from PIL import Image

    paths = []
    for number in range(n + 1):
        path = folder / f"{number:03}.png"
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, compress_level=1)
        paths.append(str(path))
    return paths


def no_end(model: str) -> int:
    """The token that ends a text."""
    from qap_gguf.files.gguf import read_gguf

    return int(read_gguf(model).metadata.get("tokenizer.ggml.eos_token_id") or 2)


# --- each way: (seconds, tokens of all answers) for the pictures after the first one ---


def timed(llm: Any, job: dict[str, Any], urls: list[str]) -> tuple[float, int]:
    """One picture after the other, by llama-cpp-python's own call."""

    def ask(url: str) -> int:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
        answer = llm.create_chat_completion(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}],
            temperature=0, max_tokens=job["tokens"], logit_bias={job["eos"]: -100.0},
        )  # fmt: skip
        return int(answer["usage"]["completion_tokens"])

    ask(urls[0])
    started = time.perf_counter()
    tokens = sum(map(ask, urls[1:]))
    return time.perf_counter() - started, tokens


def run_stock(job: dict[str, Any]) -> tuple[float, int]:
    """The handler as it comes, in a process that never imports qap_gguf."""
    import llama_cpp
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    handler = Llava15ChatHandler(clip_model_path=job["mmproj"], verbose=False)
    llm = llama_cpp.Llama(
        job["model"], chat_handler=handler, n_ctx=2048, n_threads=job["threads"], n_threads_batch=job["threads"],
        verbose=False,
    )  # fmt: skip
    assert "qap_gguf" not in sys.modules

    return timed(llm, job, [Path(path).as_uri() for path in job["pictures"]])


def run_one(job: dict[str, Any]) -> tuple[float, int]:
    """Ours, one picture after the other, in this process."""
    import llama_cpp

    import qap_gguf as qap

    llm = llama_cpp.Llama(
        job["model"], chat_handler=None, n_ctx=2048, n_threads=job["threads"], n_threads_batch=job["threads"],
        verbose=False,
    )  # fmt: skip
    with qap.ChatHandler(job["mmproj"], prune=qap.PruneConfig(keep_ratio=0.125)) as handler:
        llm.chat_handler = handler
        return timed(llm, job, job["pictures"])


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    import qap_gguf as qap

    prune = None if job["way"] == "slots-dense" else qap.PruneConfig(keep_ratio=0.125)
    return {
        "prompt": PROMPT, "system": SYSTEM, "prune": prune, "n_ctx": job["ctx" if prune is None else "pruned_ctx"],
        "max_tokens": job["tokens"], "n_threads": job["threads"], "parallel": job["parallel"],
    }  # fmt: skip


def rows_of(job: dict[str, Any], paths: list[str]) -> list[dict[str, Any]]:
    return [{"image": path, "logit_bias": {str(job["eos"]): -100}} for path in paths]


def run_slots(job: dict[str, Any]) -> tuple[float, int]:
    """A llama-server with slots."""
    from qap_gguf.batch import BatchModel

    with BatchModel(job["model"], job["mmproj"], **settings_of(job)) as model:
        list(model.run(rows_of(job, job["pictures"][:1])))
        started = time.perf_counter()
        found = list(model.run(rows_of(job, job["pictures"][1:])))
        seconds = time.perf_counter() - started
    errors = [result.error for result in found if result.error is not None]
    assert not errors, errors[0]
    return seconds, sum(result.tokens for result in found)


def run_ray(job: dict[str, Any]) -> tuple[float, int]:
    """Two actors; whichever is free takes the next pictures."""
    import numpy as np
    import ray

    from qap_gguf.ray import VisionPredictor

    half = {"n_threads": max(1, job["threads"] // 2), "parallel": max(1, job["parallel"] // 2)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    def batch_of(paths: list[str]) -> dict[str, Any]:
        bias = [{str(job["eos"]): -100}] * len(paths)
        return {"image": np.array(paths, dtype=object), "logit_bias": np.array(bias, dtype=object)}

    actor = ray.remote(num_cpus=1)(VisionPredictor)
    actors = [actor.remote(job["model"], job["mmproj"], **(settings_of(job) | half)) for _ in range(2)]
    ray.get([one.__call__.remote(batch_of(job["pictures"][:1])) for one in actors])
    size = half["parallel"]
    paths = job["pictures"][1:]
    waiting = [batch_of(paths[at : at + size]) for at in range(0, len(paths), size)]
    started, tokens = time.perf_counter(), 0
    running = {one.__call__.remote(waiting.pop()): one for one in actors if waiting}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        one, out = running.pop(done), ray.get(done)
        assert not any(out["error"]), out["error"]
        tokens += int(out["tokens"].sum())
        if waiting:
            running[one.__call__.remote(waiting.pop())] = one
    seconds = time.perf_counter() - started
    ray.shutdown()
    return seconds, tokens


def run_way(job: dict[str, Any]) -> dict[str, Any]:
    """One way in this process."""
    ways = {"stock": run_stock, "one": run_one, "slots-dense": run_slots, "slots": run_slots, "ray": run_ray}
    seconds, tokens = ways[job["way"]](job)
    n = len(job["pictures"]) - 1
    return {"pictures": n, "seconds": seconds, "per_minute": 60 * n / seconds, "tokens": tokens / n}


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"batch_throughput: {job['way']} failed\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "cpus": os.cpu_count(), "load": [round(load, 2) for load in os.getloadavg()]}


def table_of(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; ratios are taken within a round."""
    lines = ["| way | pictures a minute | times stock | times slots-dense | tokens of an answer |"]
    lines.append("| :-- | --: | --: | --: | --: |")
    for way, found in rows.items():
        cells = [f"{statistics.median(row['per_minute'] for row in found):.3g}"]
        for other in ("stock", "slots-dense"):
            pairs = zip(found, rows.get(other, ()), strict=False)
            ratios = [mine["per_minute"] / theirs["per_minute"] for mine, theirs in pairs]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "-")
        cells.append(f"{statistics.median(row['tokens'] for row in found):.3g}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the ways in turn."""
    parser = argparse.ArgumentParser(description="Pictures a minute, one by one and side by side.")
    parser.add_argument("--shape", help="of qap-gguf bench; files are made in the cache where they are missing")
    parser.add_argument("--model")
    parser.add_argument("--mmproj")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--slow-pictures", type=int, help="those of stock and one (default: --pictures)")
    parser.add_argument("--side", type=int, default=672, help="of a picture, in pixels")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--parallel", type=int, default=8, help="slots")
    parser.add_argument("--ctx", type=int, default=1024, help="cells of a slot with all tokens")
    parser.add_argument("--pruned-ctx", type=int, help="cells of a slot with K tokens (default: --ctx)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        print(json.dumps(run_way(json.loads(args.job))))
        return 0

    import qap_gguf as qap
    from qap_gguf.bench.random_files import make_random_model
    from qap_gguf.bench.shapes import find_shape

    ways = args.ways.split(",")
    if not set(ways) <= set(WAYS):
        parser.error(f"--ways: expected some of {', '.join(WAYS)}, got {args.ways}")
    packaged = qap.packaged_model()
    model, mmproj = args.model or packaged.model, args.mmproj or packaged.mmproj
    if args.shape is not None:
        made = make_random_model(find_shape(args.shape))
        model, mmproj = made.model, made.mmproj
    job: dict[str, Any] = {
        "model": str(model), "mmproj": str(mmproj), "threads": args.threads, "tokens": args.tokens, "ctx": args.ctx,
        "pruned_ctx": args.pruned_ctx or args.ctx, "parallel": args.parallel, "eos": no_end(str(model)),
    }  # fmt: skip
    result: dict[str, Any] = {"benchmark": "batch_throughput", **vars(args), "machine": machine()}
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="qap-gguf-") as folder:
        pictures = make_pictures(Path(folder), args.pictures, args.side)
        for _ in range(args.rounds):
            for way in ways:
                n = args.slow_pictures if way in SLOW and args.slow_pictures else args.pictures
                rows[way].append(in_a_process({**job, "way": way, "pictures": pictures[: n + 1]}))
                print(f"{way}: {rows[way][-1]['per_minute']:.3g} pictures a minute", file=sys.stderr, flush=True)
    print(table_of(rows))
    print(json.dumps(result | {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
