"""Work that is struck at any line of Python, and what must hold after it: writes of the embedding cache, evaluations.

faults.py runs it. A signal comes between two lines of the files that write (a trace function sends it), or no
file may grow above a size, as on a full disk. What holds: under a final name there is a whole file or none, the next
run ends as if nothing had happened, and what is left is hidden and removed in time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

import qap_gguf as qap
import qap_gguf.eval as qe
from qap_gguf.eval import grid, journal, output, runner
from qap_gguf.files import atomic
from qap_gguf.vision import store as embedding_store
from qap_gguf.vision.store import EmbeddingStore, pack, unpack

Act = Callable[[Path], None]


@contextlib.contextmanager
def each_line(files: set[str], call: Callable[[int], None]) -> Iterator[None]:
    """Within the block, `call(n)` in front of the n-th line that is run in one of these source files."""
    n = 0

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal n
        if event == "line":
            n += 1
            call(n)
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in files else None)
    try:
        yield
    finally:
        sys.settrace(before)


def count_lines(act: Act, out: Path, files: set[str]) -> int:
    """How many lines of these files an undisturbed run takes."""
    seen: list[int] = [0]
    with each_line(files, seen.append):
        act(out)
    return seen[-1]


def struck(act: Act, line: int, number: int, files: set[str]) -> Act:
    """The same work, which gets the signal `number` at that line."""

    def strike(at: int) -> None:
        if at == line:
            os.kill(os.getpid(), number)

    def run(out: Path) -> None:
        with each_line(files, strike):
            act(out)

    return run


def starved(act: Act, limit: int) -> Act:
    """The same work where no file grows above `limit` bytes: the system refuses the write, as a full disk does."""

    def run(out: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        act(out)

    return run


class Work(Protocol):
    """Something that writes files, and its laws."""

    name: str
    files: set[str]
    largest: int

    def run(self, out: Path) -> None:
        """Do it in a folder, from whatever is there."""

    def check(self, out: Path) -> None:
        """Raise AssertionError where something half or wrong is found."""

    def check_done(self, out: Path) -> None:
        """The same, and all is there."""


class CacheWrites:
    """Four embeddings saved in a folder with room for three, one of them there already; each is read back."""

    name = "cache writes"

    def __init__(self) -> None:
        self.files = {str(module.__file__) for module in (embedding_store, atomic)}
        self._keys = [f"{number:064x}" for number in range(4)]
        self._whole = {key: pack(key, self._image(number)) for number, key in enumerate(self._keys)}
        self.largest = max(map(len, self._whole.values()))

    @staticmethod
    def _image(number: int) -> qap.ImageEmbedding:
        return qap.ImageEmbedding(np.full((9, 16), number, np.float32), (3, 3), None, (30, 20), 0.25)

    def run(self, out: Path) -> None:
        """Save and load."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the full disk, which the work survives
            store = EmbeddingStore(out, 3 * self.largest + 100)
            for number, key in enumerate(self._keys):
                store.load(key)
                store.save(key, self._image(number))
                store.load(key)

    def check(self, out: Path) -> None:
        """A file of the store is whole and its own; others are hidden."""
        for path in out.iterdir() if out.is_dir() else ():
            if path.name.endswith(".qap-tmp"):
                continue
            assert path.suffix == ".qapemb", path.name
            assert path.read_bytes() == self._whole[path.stem], path.name
            unpack(path.stem, path.read_bytes())

    def check_done(self, out: Path) -> None:
        """As many files as there is room for, and the next writer removes what killed ones left."""
        self.check(out)
        EmbeddingStore(out, 3 * self.largest + 100).save(self._keys[3], self._image(3))
        names = sorted(path.name for path in out.iterdir())
        assert len(names) == 3, names
        assert not [name for name in names if name.startswith(".")], names


def _without_times(data: bytes) -> list[Any]:
    """Lines; those of a journal as objects without the seconds."""
    lines = data.decode().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "prefill_s"} if '"prefill_s"' in line else line
        for line in lines
    ]


class _Scripted:
    """A model of an evaluation that gives the same answers always."""

    def encode(self, image: Any) -> Any:
        return qap.ImageEmbedding(np.zeros((9, 16), np.float32), (3, 3), None, (30, 20), 0.25)

    def generate(self, parts: Any, **settings: Any) -> Any:
        return _Said([parts[1][::-1]])


class _Said(list[str]):
    stats = qap.GenerationStats(n_image_tokens=9, n_image_kept=9, prefill_s=0.5)


class Evaluation:
    """Six questions answered by a script, noted in a journal, and the tables: what `qap-gguf eval --out` does."""

    name = "eval --out"

    def __init__(self, folder: Path) -> None:
        modules = (journal, output, grid, runner, atomic)
        self.files = {str(module.__file__) for module in modules}
        sample = qap.packaged_model().sample
        self._questions = [qe.Question(sample, f"question {i}", f"answer {i}") for i in range(6)]
        self.run(folder)
        self._want = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.largest = max(map(len, self._want.values()))

    def run(self, out: Path) -> None:
        """From the beginning, or from where the journal ends."""
        with qe.Journal(out / "journal.jsonl", {"data": 1}, {"m": "1"}) as notes:
            outcomes = qe.evaluate_grid(
                lambda _: contextlib.nullcontext(_Scripted()),
                [qe.Setup("m")],
                self._questions,
                qe.variants(["dense"], [qe.Budget(n_keep=3)]),
                journal=notes,
            )
        result = qe.Evaluation(qe.summarise(outcomes), 6, 1)
        output.write_results(out, result, result.to_dict())

    def check(self, out: Path) -> None:
        """Tables are whole or not there; the journal's whole lines are those of an undisturbed run."""
        for path in out.iterdir() if out.is_dir() else ():
            if path.name == "journal.jsonl":
                lines, want = path.read_bytes().split(b"\n"), self._want[path.name].split(b"\n")
                assert lines[:-1] == want[: len(lines) - 1], path.name
                for line in lines[:-1]:
                    json.loads(line)
            elif not path.name.startswith("."):
                assert path.read_bytes() == self._want[path.name], path.name

    def check_done(self, out: Path) -> None:
        """All files and no other, byte for byte, but for which of the equal answers had the picture's prefill."""
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        assert found.keys() == self._want.keys(), sorted(found)
        for name, data in found.items():
            assert _without_times(data) == _without_times(self._want[name]), name
