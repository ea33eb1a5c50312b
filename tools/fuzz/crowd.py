#!/usr/bin/env python3
"""A good client among hostile ones: are its answers the same, and how long does it wait for the first word?

    python tools/fuzz/crowd.py --minutes 15          # tables on stdout; exit 1 if it was harmed
    python tools/fuzz/crowd.py --minutes 1 --rate 8  # more bombs

Starts `qap-gguf serve` with the packaged model. A client asks fixed questions in a loop, streamed and with seed 0,
first alone, for a fifth of the time, then beside what bombs.py sends: `--rate` requests a second, of kinds drawn at
random, and as many connections as `--held` that ask for nothing or send byte by byte. Every prompt is read anew
(cache_prompt: false), so that each question costs the same. The client is harmed by an answer that differs from the one
in the quiet time, by an error, by a slowest first word above `--factor` times the quiet one (0: not judged), and a bomb
harms the server where it is answered with anything but a 4xx or "come back later", or llama-server is started again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bombs
import qap_gguf as qap

#: question, prune
QUESTIONS: list[tuple[str, Any]] = [
    ("What is in row 1, column 2?", {"n_keep": 72}),
    ("How many objects are there?", None),
    ("What is in row 1, column 1?", {"keep_ratio": 0.5, "select": "dpp"}),
    ("List the objects in row order.", {"n_keep": 36}),
]
PAUSE = 0.1  # seconds of the good client between its questions
ALLOWED = {"503", "the client left", "the server hung up", "left at once", "left while it was answered"}


Requests = dict[str, list[bombs.Request]]


@dataclass
class Server:
    """`qap-gguf serve` in a child process."""

    address: bombs.Address
    process: subprocess.Popen[str]

    def resident(self) -> int:
        """Bytes of memory that guard and llama-server hold."""
        found = 0
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (str(self.process.pid), *children):
            with contextlib.suppress(OSError):  # one that is being started again
                found += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return found * os.sysconf("SC_PAGE_SIZE")

    def restarts(self) -> int:
        """How often llama-server was started again."""
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("qap_restarts_total "))


@contextlib.contextmanager
def serving(threads: int) -> Iterator[Server]:
    """The server, on a free port; its log is shown where it ends by itself."""
    words = [sys.executable, "-m", "qap_gguf", "serve", "--port", "0", "--threads", str(threads), "--json"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*words, *bombs.LIMITS], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while not lines or lines[-1] != "}\n":
                lines.append(process.stdout.readline())
                if not lines[-1]:
                    raise SystemExit(f"crowd: expected a server, it ended: {_tail(log)}")
            host, _, port = json.loads("".join(lines))["url"].rpartition("/")[2].partition(":")
            yield Server((host, int(port)), process)
            if process.poll() is not None:
                raise SystemExit(f"crowd: the server ended with status {process.returncode}: {_tail(log)}")
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _tail(log: Any) -> str:
    log.seek(0)
    return str(log.read()[-2000:])


# --- the good client ---


@dataclass
class Period:
    """What the good client saw: seconds to each first word, and what was not as it should be."""

    firsts: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def row(self, name: str) -> str:
        """A line of the table."""
        median, slowest = 1000 * statistics.median(self.firsts), 1000 * max(self.firsts)
        n_right = len(self.firsts) - len(self.wrong)
        return f"| {name} | {len(self.firsts)} | {n_right} | {len(self.wrong)} | {median:.0f} ms | {slowest:.0f} ms |"


def answer(address: bombs.Address, url: str, question: str, prune: Any) -> tuple[str, float]:
    """The text of a streamed answer, and the seconds until its first word."""
    body = bombs.ask(url, question=question, prune=prune, stream=True, cache_prompt=False)
    begun, first, text = time.perf_counter(), 0.0, ""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=600)) as connection:
        connection.request("POST", bombs.CHAT, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            return f"status {reply.status}: {reply.read()[:200].decode()}", time.perf_counter() - begun
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            words = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
            if words and not first:
                first = time.perf_counter() - begun
            text += words if "error" not in event else f"error: {event['error']}"
    return text, first or time.perf_counter() - begun


def ask_for(seconds: float, address: bombs.Address, url: str, right: dict[int, str]) -> Period:
    """Ask for so long, each question at least twice; `right` gets the answers that it has not yet."""
    period, end, number = Period(), time.monotonic() + seconds, 0
    while time.monotonic() < end or number < 2 * len(QUESTIONS):
        which = number % len(QUESTIONS)
        try:
            text, first = answer(address, url, *QUESTIONS[which])
        except (OSError, http.client.HTTPException) as err:
            text, first = repr(err), 0.0
        period.firsts.append(first)
        if text != right.setdefault(which, text):
            period.wrong.append(f"{QUESTIONS[which][0]} expected {right[which]!r}, got {text!r}")
        number += 1
        time.sleep(PAUSE)
    return period


# --- the others ---


class Other(threading.Thread):
    """Somebody beside the good client, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()  # (kind, end) of what it sent
        self.stopped = threading.Event()


class Hostile(Other):
    """Sends bombs, `rate` a second."""

    def __init__(self, requests: Requests, address: bombs.Address, url: str, rate: float, seed: int) -> None:
        super().__init__()
        self.requests, self.rng = requests, random.Random(seed)
        self.address, self.url, self.rate = address, url, rate

    def run(self) -> None:
        """Wait, draw a kind, send one of it, note the end."""
        kinds = [*self.requests, "clients that leave"]
        while not self.stopped.wait(self.rng.expovariate(self.rate)):
            kind = self.rng.choice(kinds)
            try:
                if kind in self.requests:
                    end = self.rng.choice(self.requests[kind]).send(self.address)
                else:
                    end = bombs.leave(self.address, self.url, self.rng)
            except (OSError, http.client.HTTPException) as err:
                end = repr(err)
            self.found[kind, end] += 1


class Holder(Other):
    """Holds connections, a third of each kind."""

    def __init__(self, address: bombs.Address, n_held: int) -> None:
        super().__init__()
        self.address, self.n_held = address, n_held

    def run(self) -> None:
        """Open what is missing, let each send a byte, note the ends."""
        held: list[bombs.Held] = []
        number = 0
        while not self.stopped.wait(0.25):
            while len(held) < self.n_held:
                kind = bombs.HELD[number % len(bombs.HELD)]
                held.append(bombs.Held.open(self.address, kind, most=20.0 + 60.0 * (number % 2)))
                number += 1
            for connection in list(held):
                end = connection.step()
                if end is not None:
                    connection.raw.close()
                    held.remove(connection)
                    self.found[connection.kind, end] += 1
        for connection in held:
            connection.raw.close()
            self.found[connection.kind, "the client left"] += 1


def attack(
    requests: Requests, address: bombs.Address, url: str, rate: float, n_held: int, seed: int, until: Connection
) -> None:
    """What the hostile clients do, in a process of their own, until a word comes; sends back what they found.

    It takes the processor only when nobody else wants it: they have machines of their own.
    """
    os.nice(19)
    others: list[Other] = [Hostile(requests, address, url, rate / 3, seed + i) for i in range(3)]
    others.append(Holder(address, n_held))
    for other in others:
        other.start()
    until.send("begun")
    until.recv()
    for other in others:
        other.stopped.set()
    for other in others:
        other.join(300)
    until.send(sum((other.found for other in others), collections.Counter()))


@contextlib.contextmanager
def attacked(*args: Any) -> Iterator[collections.Counter[tuple[str, str]]]:
    """The block runs among hostile clients; afterwards the counter has what they found."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=attack, args=(*args, there), daemon=True)
    process.start()
    try:
        here.recv()
        yield found
        here.send("enough")
        found.update(here.recv())
    finally:
        process.kill()
        process.join()


class Sampler(Other):
    """Looks how much memory the server holds."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server, self.peak = server, 0

    def run(self) -> None:
        """Look twice a second."""
        while not self.stopped.wait(0.5):
            with contextlib.suppress(OSError):
                self.peak = max(self.peak, self.server.resident())


def run(minutes: float, rate: float, n_held: int, factor: float, seed: int, threads: int) -> int:
    """The two periods and the tables; 1 where the client or the server was harmed."""
    url = bombs.data_uri(qap.packaged_model().sample.read_bytes())
    right: dict[int, str] = {}
    with serving(threads) as server:
        ask_for(0, server.address, url, right)  # the first encode, allocators, thread pools
        quiet = ask_for(12 * minutes, server.address, url, right)
        before = server.resident()
        sampler = Sampler(server)
        sampler.start()
        with attacked(bombs.REQUESTS, server.address, url, rate, n_held, seed) as found:
            mixed = ask_for(60 * minutes, server.address, url, right)
        sampler.stopped.set()
        sampler.join()
        restarts, after = server.restarts(), server.resident()
    print(f"{minutes:g} minutes, {rate:g} bombs a second, {n_held} connections held, seed {seed}, {threads} threads\n")
    print("| the good client | questions | equal | different | first word, median | slowest |")
    print("| :-- | --: | --: | --: | --: | --: |")
    print(quiet.row("alone"))
    print(mixed.row("among bombs"))
    print("\n| bombs | sent | ends |\n| :-- | --: | :-- |")
    for kind in sorted({kind for kind, _ in found}):
        ends = {end: n for (of, end), n in sorted(found.items()) if of == kind}
        print(f"| {kind} | {sum(ends.values())} | {', '.join(f'{n} x {end}' for end, n in ends.items())} |")
    ratio = max(mixed.firsts) / max(quiet.firsts)
    print(
        f"\nslowest first word {ratio:.2f} x that without bombs; guard and llama-server held {before / 2**20:.0f} MiB "
        f"before, {sampler.peak / 2**20:.0f} at most, {after / 2**20:.0f} after; {restarts} restarts of llama-server"
    )
    bad = [*quiet.wrong, *mixed.wrong]
    bad += [f"{kind}: {end}" for kind, end in found if end not in ALLOWED and not (end.isdigit() and end[0] == "4")]
    bad += [f"llama-server was started again {restarts} times"] if restarts else []
    bad += [f"the slowest first word: expected at most {factor:g} x, got {ratio:.2f}"] if 0 < factor < ratio else []
    for line in bad:
        print(f"crowd: {line}", file=sys.stderr)
    return 1 if bad else 0


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="of mixed traffic (default 15)")
    parser.add_argument("--rate", type=float, default=3.0, help="bombs a second (default 3)")
    parser.add_argument("--held", type=int, default=60, help="connections that ask for nothing (default 60)")
    parser.add_argument("--factor", type=float, default=2.0, help="slowest first word, against the quiet time; 0: any")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of llama-server (default 1)")
    args = parser.parse_args()
    return run(args.minutes, args.rate, args.held, args.factor, args.seed, args.threads)


if __name__ == "__main__":
    sys.exit(main())
