#!/usr/bin/env python3
"""Does a cache of llama-server change an answer? Random requests to one server, against a new process for each.

    make programs && python tools/fuzz/server_answers.py --n 200    # counts on stdout; exit 1 where an answer differs

The server has three slots, its prompt cache and our cache of encoded pictures. Requests come one at a time (with
--at-once 3 several are decoded as one batch, whose sums round otherwise: near ties may fall the other way), to slots
of their choice: a picture of three (or two of them), a question, and a field `prune` over K, alpha, error, signal,
method, merging and the early drop, or none. Between them slots are saved to files and restored, into any slot. Each
different request is also asked of a llama-server that has just started and gets nothing else. Compared are the text
of the answer and the number of the prompt's tokens.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

import qap_gguf as qap
from qap_gguf.serve.child import find_program

SLOTS, CELLS = 3, 512
QUESTIONS = ("How many objects are there?", "What is in row 1, column 2?", "What is in row 2, column 4?")
FIELDS: dict[str, tuple[Any, ...]] = {
    "n_keep": (18, 36),
    "alpha": (0.0, 0.7, 1.0, "dynamic"),
    "error": ("int4", "q4_0"),
    "semantic": ("auto", "none"),
    "select": ("coverage", "dpp", "topk", "uniform", "divprune"),
    "merge": ("none", "average"),
    "encoder_keep": (1, 0.5),
    "duplicates": ("off", 3, 16),
}
#: numbers of pictures, question, the field `prune`
Asked = tuple[tuple[int, ...], str, "dict[str, Any] | None"]


@functools.cache
def pictures() -> list[str]:
    """The packaged picture, its mirror image, and its upper part, as data URIs."""
    with Image.open(qap.packaged_model().sample) as image:
        sample = image.convert("RGB")
    width, height = sample.size
    found = []
    for made in (
        sample,
        sample.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        sample.crop((0, 0, width, height * 2 // 3)),
    ):
        buffer = io.BytesIO()
        made.save(buffer, "PNG")
        found.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return found


def call(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """(status, answer) of a POST, or of a GET where there is no body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        text, headers = None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, text, headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


def answer(port: int, what: Asked, slot: int = -1) -> tuple[str, int, int]:
    """(text, tokens of the prompt, those of them that were in the KV cache)."""
    numbers, question, prune = what
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": pictures()[i]}} for i in numbers]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        "max_tokens": 8, "temperature": 0, "id_slot": slot,
    }  # fmt: skip
    if prune is not None:
        body["prune"] = prune
    status, found = call(port, "/v1/chat/completions", body)
    if status != 200:
        raise SystemExit(f"server_answers: expected an answer to {what} in slot {slot}, got {status}: {found}")
    usage = found["usage"]
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return found["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


@contextlib.contextmanager
def running(folder: Path, *words: str, **env: str) -> Iterator[int]:
    """A llama-server with the packaged model for a block; gives its port. `env` are variables of its environment."""
    files = qap.packaged_model()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [str(find_program()), "-m", str(files.model), "--mmproj", str(files.mmproj)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--threads", "1", *words]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 30
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"expected llama-server to answer, got status {process.poll()}: {tail}")
            with contextlib.suppress(OSError):
                if call(port, "/health")[0] == 200:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


def with_slots(n_slots: int, folder: Path) -> contextlib.AbstractContextManager[int]:
    """A server with so many slots, which can be saved to `folder`, and with all caches."""
    words = ["--parallel", str(n_slots), "--ctx-size", str(n_slots * CELLS), "--no-kv-unified", "--no-warmup"]
    return running(folder, *words, "--slot-save-path", str(folder), "--cache-ram", "64")


def draw(order: random.Random) -> Asked:
    """A request; one in five has two pictures, one in five is dense."""
    numbers = tuple(order.sample(range(len(pictures())), 2 if order.random() < 0.2 else 1))
    question = order.choice(QUESTIONS)
    if order.random() < 0.2:
        return numbers, question, None
    prune = {name: order.choice(values) for name, values in FIELDS.items() if order.random() < 0.5}
    if prune.get("alpha") == 1.0 and prune.get("semantic") == "none":
        del prune["alpha"]  # nothing to rank by: refused
    if prune.get("encoder_keep", 1) < 1:
        prune.pop("duplicates", None)  # one of the two
    return numbers, question, {"n_keep": order.choice(FIELDS["n_keep"]), **prune}


def ask_all(
    order: random.Random, n: int, at_once: int, folder: Path, counts: dict[str, int]
) -> list[tuple[Asked, str, int]]:
    """Random requests to one server, with slots saved and restored in between: (request, text, tokens) of each."""
    found: list[tuple[Asked, str, int]] = []
    seen: list[Asked] = []
    with with_slots(SLOTS, folder) as port, ThreadPoolExecutor(SLOTS) as pool:
        while len(found) < n:
            # half of the requests were asked before, for that is what caches are for
            asked = [
                order.choice(seen) if seen and order.random() < 0.5 else draw(order)
                for _ in range(order.randint(1, at_once))
            ]
            seen += asked
            slots = [order.choice((-1, *range(SLOTS))) for _ in asked]
            for what, (text, n_prompt, cached) in zip(
                asked, pool.map(answer, [port] * len(asked), asked, slots), strict=True
            ):
                found.append((what, text, n_prompt))
                counts["cells_reused"] += cached
                counts["cells"] += n_prompt
            action, slot = order.choice(("save", "restore", "neither", "neither")), order.randrange(SLOTS)
            name = f"slot{order.randrange(4)}.bin"
            if action == "save" or (action == "restore" and (folder / name).exists()):
                status, reply = call(port, f"/slots/{slot}?action={action}", {"filename": name})
                if status == 200:
                    counts[action + "d"] += 1
                elif "error" not in reply:
                    raise SystemExit(f"server_answers: expected {action} or an error, got {status}: {reply}")
                else:
                    counts["refused"] += 1
    return found


def main() -> int:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=60, help="requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, choices=range(1, SLOTS + 1), help="most requests at a time")
    args = parser.parse_args()
    counts = dict.fromkeys(("cells", "cells_reused", "saved", "restored", "refused"), 0)
    with tempfile.TemporaryDirectory(prefix="qap-gguf-") as name:
        folder = Path(name)
        found = ask_all(random.Random(args.seed), args.n, args.at_once, folder, counts)
        expected: dict[str, tuple[str, int]] = {}
        differ = 0
        for number, (what, text, n_prompt) in enumerate(found):
            key = json.dumps(what)
            if key not in expected:
                with with_slots(1, folder) as port:
                    expected[key] = answer(port, what)[:2]
            if expected[key] != (text, n_prompt):
                differ += 1
                print(f"differs: {what}: {(text, n_prompt)}, new process {expected[key]}", file=sys.stderr)
            print(f"\r{number + 1}/{len(found)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(json.dumps({"requests": len(found), "new_processes": len(expected), "differ": differ, **counts}))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
