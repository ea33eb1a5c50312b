#!/usr/bin/env python3
"""Several clients at once: `qap-gguf serve` with all tokens and with few, against llama.cpp's own llama-server.

    python tools/build/upstream_server.py build/upstream-server            # once; prints the path
    python benchmarks/server_clients.py --upstream build/upstream-server/build/llama-server
    python benchmarks/server_clients.py --shape llava-1.5-7b --requests 1 --max-tokens 8 --ctx 768 --upstream ...

Three servers, one after the other, with the same files, threads, slots, contexts and batches (qap_gguf/serve/options.py
makes the options of all): ours with `--dense`, ours with `--keep-ratio` (an eighth), and upstream's, unpatched, which
clients reach without our guard. Upstream's is left out without `--upstream`.

Each client sends its requests one after the other. Every request has a picture of its own, the same ones for each
server, so that no cache of pictures or prompts helps; answers are greedy and streamed, and the end of the answer is
forbidden, so that all have `--max-tokens` tokens. Times are those of the client, from sending to the first words and
to the end; counts are the server's (`usage`). Shapes have random weights, made once (python/qap_gguf/bench).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from PIL import Image

import qap_gguf as qap
from qap_gguf.arguments import n_threads_default
from qap_gguf.bench.random_files import make_random_model
from qap_gguf.bench.shapes import SHAPES
from qap_gguf.files.gguf import read_gguf
from qap_gguf.generation.chat_template import fallback_form
from qap_gguf.language.vocabulary import Vocabulary
from qap_gguf.serve.options import model_options, server_options, template_options

# Short, for a shape has a token for each character, and a template's own system text is long.
SYSTEM, QUESTION = "Be brief.", "What is in it?"


@dataclass(frozen=True)
class Call:
    """One request: seconds to its first words and to its end, and the counts of `usage`."""

    first: float
    seconds: float
    n_prompt: int
    n_answer: int


@dataclass(frozen=True)
class Row:
    """One server with a number of clients."""

    server: str
    n_clients: int
    calls: list[Call]
    seconds: float

    @property
    def cells(self) -> int:
        """KV cells of the largest answer: its prompt and its tokens."""
        return max(call.n_prompt + call.n_answer for call in self.calls)

    def line(self) -> str:
        """The row of the table."""
        first = [call.first for call in self.calls]
        rate = sum(call.n_answer for call in self.calls) / self.seconds
        return (
            f"| {self.server} | {self.n_clients} | {statistics.median(first):.2f} | {max(first):.2f} "
            f"| {rate:.2f} | {self.cells} |"
        )


def picture(seed: int) -> str:
    """The packaged sample with noise of its own, as a data URI."""
    with Image.open(qap.packaged_model().sample) as image:
        pixels = np.asarray(image.convert("RGB"), np.int16)
    noise = np.random.default_rng(seed).integers(-8, 9, pixels.shape, np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(port: int, uri: str, max_tokens: int, ends: Sequence[int]) -> Call:
    """Ask about a picture and wait for all of the answer."""
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]
    body = {
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logit_bias": {str(token): -1000 for token in ends},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, usage = time.perf_counter(), None, None
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=3600)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(f"server_clients: expected an answer, got {reply.status}: {reply.read()[:300].decode()}")
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"server_clients: expected an answer, got {event['error']}")
            if first is None and any("content" in choice["delta"] for choice in event["choices"]):
                first = time.perf_counter() - begun  # the first delta comes with the first token
            usage = event.get("usage") or usage
    if first is None or usage is None:
        raise SystemExit("server_clients: expected words and their count, got neither")
    return Call(first, time.perf_counter() - begun, usage["prompt_tokens"], usage["completion_tokens"])


def measure(server: str, port: int, n_clients: int, args: argparse.Namespace, ends: Sequence[int]) -> Row:
    """All requests of so many clients at once."""
    seeds = [[(n_clients * 100 + i) * 1000 + k for k in range(args.requests)] for i in range(n_clients)]
    uris = [[picture(seed) for seed in row] for row in seeds]
    calls: list[Call] = []
    failed: list[BaseException] = []

    def client(own: list[str]) -> None:
        try:
            calls.extend([ask(port, uri, args.max_tokens, ends) for uri in own])
        except BaseException as err:  # told by the thread that waits
            failed.append(err)

    threads = [threading.Thread(target=client, args=(own,)) for own in uris]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return Row(server, n_clients, calls, time.perf_counter() - begun)


# --- servers ---


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(words: Sequence[str], port: int) -> Iterator[None]:
    """A server for a block; its log is shown where it ends early."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("QAP_N_", "QAP_KEEP"))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*words, "--port", str(port)], env=clean, stdout=log, stderr=log)
        try:
            while not _answers(port):
                if process.poll() is not None:
                    log.seek(0)
                    tail = log.read()[-600:].decode("utf-8", "replace")
                    raise SystemExit(f"server_clients: {words[0]} ended with status {process.returncode}: {tail}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)


def _answers(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def servers(
    args: argparse.Namespace, model: Path, mmproj: Path, slots: int, template: list[str]
) -> dict[str, list[str]]:
    """Name -> command line, without the port."""
    ours = [sys.executable, "-m", "qap_gguf", "serve", "-m", str(model), "--mmproj", str(mmproj)]
    ours += ["--threads", str(args.threads), "--ctx", str(args.ctx), "--parallel", str(slots), "--max-seconds", "3600"]
    found = {
        "ours, all tokens": [*ours, "--dense"],
        f"ours, {args.keep_ratio:g}": [*ours, "--keep-ratio", str(args.keep_ratio)],
    }
    if args.upstream is not None:
        settings: dict[str, Any] = dict.fromkeys(("device", "model_device", "kv", "seed"))
        words = model_options(model, mmproj, n_ctx=args.ctx, n_parallel=slots, threads=args.threads, **settings)
        found["upstream"] = [str(args.upstream), *words, *server_options("model", 32), *template, "--host", "127.0.0.1"]
    return found


# --- memory ---


def cell_bytes(model: Path) -> int:
    """Bytes of a cell of the KV cache in f16: keys and values of all layers."""
    metadata = read_gguf(model).metadata
    arch = metadata["general.architecture"]

    def of(name: str) -> Any:
        return metadata.get(f"{arch}.{name}")

    heads = of("attention.head_count_kv") or of("attention.head_count")
    width = of("embedding_length") // of("attention.head_count")
    per_head = (of("attention.key_length") or width) + (of("attention.value_length") or width)
    layers = [heads] * of("block_count") if isinstance(heads, int) else list(heads)
    return 2 * sum(layers) * int(per_head)


def tell_slots(rows: Sequence[Row], model: Path, n_cells: int) -> None:
    """How many answers fit the memory of the KV cache that all servers had."""
    size = cell_bytes(model)
    print(
        f"\nThe KV cache of this run: {n_cells} cells of {size} bytes, {n_cells * size / 1e6:.1f} MB. What fits it:\n"
    )
    print("| server | cells of an answer | MB | slots |\n| :-- | --: | --: | --: |")
    for server in dict.fromkeys(row.server for row in rows):
        cells = max(row.cells for row in rows if row.server == server)
        print(f"| {server} | {cells} | {cells * size / 1e6:.2f} | {n_cells} / {cells} = {n_cells // cells} |")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="the language model [packaged]")
    parser.add_argument("--mmproj", type=Path, help="its mmproj [packaged]")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a shape with random weights instead")
    parser.add_argument("--upstream", type=Path, help="llama-server without our patches")
    parser.add_argument("--clients", default="1,4,8", help="numbers of clients at once")
    parser.add_argument("--requests", type=int, default=4, help="requests of each client, one after the other")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--keep-ratio", type=float, default=0.125)
    parser.add_argument("--ctx", type=int, help="tokens of a slot [1024; the packaged model 512]")
    parser.add_argument("--threads", type=int, default=n_threads_default())
    args = parser.parse_args()
    if (args.model is None) != (args.mmproj is None) or (args.model and args.shape):
        parser.error("expected --model with --mmproj, or --shape, or neither")
    if args.shape:
        made = make_random_model(SHAPES[args.shape], progress=lambda done, n, name: None)
        model, mmproj = made.model, made.mmproj
    else:
        files = qap.packaged_model()
        model, mmproj = args.model or files.model, args.mmproj or files.mmproj
    args.ctx = args.ctx or (512 if model == qap.packaged_model().model else 1024)
    counts = [int(word) for word in args.clients.split(",")]
    slots = max(counts)
    with contextlib.closing(Vocabulary(model)) as words:
        vocab = llama_cpp.llama_model_get_vocab(words.address)
        ends = [token for token in range(words.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, token)]
        form = fallback_form(words.metadata, str(mmproj))
    rows: list[Row] = []
    print(
        f"{model.name}, {slots} slots of {args.ctx} cells, {args.threads} threads, {args.requests} requests a client,"
    )
    print(f"{args.max_tokens} tokens an answer; load of the machine before: {os.getloadavg()[0]:.2f}\n")
    print("| server | clients | first token s, median | slowest | tokens/s in all | KV cells of an answer |")
    print("| :-- | --: | --: | --: | --: | --: |", flush=True)
    with template_options(form) as template:
        for name, command in servers(args, model, mmproj, slots, template).items():
            port = _free_port()
            with running(command, port):
                ask(port, picture(0), 2, ends)  # memory is there, weights are read
                for n_clients in counts:
                    rows.append(measure(name, port, n_clients, args, ends))
                    print(rows[-1].line(), flush=True)
    tell_slots(rows, model, slots * args.ctx)
    return 0


if __name__ == "__main__":
    sys.exit(main())
