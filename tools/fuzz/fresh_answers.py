#!/usr/bin/env python3
"""Do the caches change an answer? Random sequences of questions with all caches on, against a new process for each.

    python tools/fuzz/fresh_answers.py --n 200    # counts on stdout; exit 1 where an answer differs

One model, with embeddings kept in memory (room for two of three pictures), in a folder, and with the KV cache reused as
far as it is equal, answers sequences of (pictures, question, system prompt, K, alpha, signal, method, merging). For
each of these a process is forked from one that has imported the package and loaded nothing; it loads the model,
encodes, answers this one question with no cache, and ends. Compared are the text and the bits of the logits after the
prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import qap_gguf as qap
from qap_gguf.config import SELECTORS

N_CTX = 448
ROOM = 2 * 144 * 260 * 4  # bytes of two pictures: rows of 256 numbers, and what is kept beside each
QUESTIONS = ("How many objects are there?", "What is in row 1, column 2?", "What is in row 1, column 1?")
SYSTEMS = (None, "Be brief.")
FIELDS: dict[str, tuple[Any, ...]] = {
    "n_keep": (1, 18, 36, 144),
    "alpha": (0.0, 0.7, 1.0, "dynamic"),
    "semantic": ("auto", "text"),
    "error": ("int4", "q4_0"),
    "select": SELECTORS,
    "merge": ("none", "average"),
}
#: numbers of pictures, question, system prompt, fields of a PruneConfig or None for all tokens
Asked = tuple[tuple[int, ...], str, "str | None", "dict[str, Any] | None"]


def pictures() -> list[npt.NDArray[np.uint8]]:
    """The packaged picture, its mirror image, and one of another size."""
    with Image.open(qap.packaged_model().sample) as image:
        sample = np.asarray(image.convert("RGB"))
    return [sample, np.ascontiguousarray(sample[:, ::-1]), np.ascontiguousarray(sample[:128])]


PICTURES = pictures()


def answer(vlm: qap.VisionModel, what: Asked) -> tuple[str, str, qap.GenerationStats]:
    """(text, digest of the logits after the prompt, statistics) of one question."""
    numbers, question, system, fields = what
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": [*(PICTURES[i] for i in numbers), question]})
    prune = None if fields is None else qap.PruneConfig(**fields)
    said = vlm.chat(messages, prune=prune, max_tokens=4, stream=True)
    digest = hashlib.sha256(vlm.last_logits().tobytes()).hexdigest()
    return "".join(said), digest, said.stats


def some_sequence(rng: random.Random) -> list[Asked]:
    """Two to five questions; each next one differs from the last in one thing or two, as in a conversation."""
    numbers: tuple[int, ...] = (rng.randrange(3),)
    question, system = rng.choice(QUESTIONS), rng.choice(SYSTEMS)
    fields: dict[str, Any] | None = {name: rng.choice(values) for name, values in FIELDS.items()}
    found: list[Asked] = []
    for _ in range(rng.randrange(2, 6)):
        found.append((numbers, question, system, fields))
        for _ in range(rng.choice((1, 1, 2))):
            what = rng.randrange(8)
            if what == 0:
                numbers = tuple(rng.randrange(3) for _ in range(rng.randrange(3)))
            elif what == 1:
                system = rng.choice(SYSTEMS)
            elif what < 4:
                question = rng.choice(QUESTIONS)
            elif what == 4:
                fields = None
            else:
                name = rng.choice(list(FIELDS))
                fields = {**(fields or {"n_keep": 36}), name: rng.choice(FIELDS[name])}
    return found


class FreshProcesses:
    """Answers questions, each in a process that has loaded nothing before; equal questions are asked once.

    Attributes:
        n_processes: how many there were.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}
        self.n_processes = 0
        words = [sys.executable, __file__, "--answer"]
        self._child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, what: Asked) -> tuple[str, str]:
        """(text, digest of the logits)."""
        line = json.dumps(what)
        if line not in self._known:
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
            text, digest = json.loads(self._child.stdout.readline())
            self._known[line] = text, digest
            self.n_processes += 1
        return self._known[line]

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(60)
        if self._child.stdout is not None:
            self._child.stdout.close()


def answer_lines() -> None:
    """What the process behind FreshProcesses does: a fork for each line."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                numbers, question, system, fields = json.loads(line)
                with qap.VisionModel(n_ctx=N_CTX, n_threads=1, cache=qap.EmbeddingCache(0)) as vlm:
                    text, digest, stats = answer(vlm, (tuple(numbers), question, system, fields))
                    assert stats.n_reused == 0
                    assert vlm.n_encodes == len(numbers)  # a picture that comes twice is encoded twice
                print(json.dumps([text, digest]), flush=True)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1] != 0:
            print(json.dumps([f"the process of {line[:200]} failed", ""]), flush=True)


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="sequences (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer_lines()
        return 0
    rng, started = random.Random(args.seed), time.perf_counter()
    asked = differ = reused = cells = 0
    with tempfile.TemporaryDirectory() as folder, FreshProcesses() as fresh:
        cache = qap.EmbeddingCache(ROOM, folder)
        with qap.VisionModel(n_ctx=N_CTX, n_threads=1, cache=cache) as vlm:
            for number in range(args.n):
                for what in some_sequence(rng):
                    text, digest, stats = answer(vlm, what)
                    asked, reused, cells = asked + 1, reused + stats.n_reused, cells + stats.n_kv
                    if (text, digest) != fresh.answer(what):
                        differ += 1
                        print(f"sequence {number}: {what}: {text!r}, {fresh.answer(what)}", file=sys.stderr)
            stored = cache.stats
            print(
                f"{args.n} sequences, {asked} questions, {fresh.n_processes} fresh processes: {differ} answers differ; "
                f"{reused} of {cells} cells reused, {vlm.n_encodes} encodes, {stored.hits} images from memory, "
                f"{stored.store_hits} from the folder"
            )
    print(f"fresh_answers: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 1 if differ or not reused else 0


if __name__ == "__main__":
    sys.exit(main())
