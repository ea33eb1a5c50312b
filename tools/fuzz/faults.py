#!/usr/bin/env python3
"""Interrupt, kill and starve work that writes files, at every point, and count what survived.

    python tools/fuzz/faults.py                   # writes of the embedding cache, evaluations
    python tools/fuzz/faults.py CHECKPOINT        # conversions of a small LLaVA checkpoint too

Each fault hits a forked process. Afterwards: a file under a final name is whole or not there; the same work, done
again, gives the same bytes as one that nothing disturbed; and no temporary file is left. Exit 1 where that is not so.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from fault_points import Act, CacheWrites, Evaluation, Work, count_lines, starved, struck
from qap_gguf.convert import api, convert
from qap_gguf.convert.output import writer
from qap_gguf.errors import QapError
from qap_gguf.files import atomic
from qap_gguf.files.gguf import read_gguf

DONE, REFUSED = 0, 10
ENDS = {DONE: "done", REFUSED: "refused", 130: "interrupted"}
LINES = 100  #: of a conversion, which repeats them for each tensor: so many are struck
Hashes = dict[str, str]
Found = dict[str, collections.Counter[str]]


def hashes(folder: Path) -> Hashes:
    """Digest of each file of a folder, hidden ones too."""
    if not folder.is_dir():
        return {}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def in_child(act: Act, out: Path) -> int:
    """Run `act(out)` in a fork: its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            with Path(os.devnull).open("w") as null:
                os.dup2(null.fileno(), 2)
            act(out)
            status = DONE
        except QapError as err:
            status = REFUSED if "\n" not in str(err) else 98
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Conversion:
    """One checkpoint, converted to one type; `want` is what an undisturbed run writes."""

    files: ClassVar[set[str]] = {str(module.__file__) for module in (api, atomic, writer)}

    def __init__(self, checkpoint: Path, kind: str, folder: Path) -> None:
        self.checkpoint, self.kind = checkpoint, kind
        self.steps = 0

        def count(done: int, total: int, _: str) -> None:
            self.steps = max(self.steps, done)

        self.run(folder / "want", progress=count)
        self.want = hashes(folder / "want")
        self.lines = count_lines(self.run, folder / "count", self.files)

    def run(self, out: Path, *, force: bool = False, progress: Callable[[int, int, str], None] | None = None) -> None:
        convert(self.checkpoint, out, quantize=self.kind, name="m", force=force, progress=progress)

    def struck_by(self, number: int, step: int) -> Act:
        """A run that gets the signal when `step` tensors are written."""

        def strike(done: int, total: int, _: str) -> None:
            if done == step:
                os.kill(os.getpid(), number)

        return lambda out: self.run(out, progress=strike)

    def killed_between_names(self, out: Path) -> None:
        """A run that dies when its first file has its final name and its second has not."""
        real = os.link

        def link(source: Path, target: Path) -> None:
            real(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.link = link  # type: ignore[assignment]
        self.run(out)

    def faults(self, every: int) -> Iterator[tuple[str, Act]]:
        """(kind of fault, what to run), at each `every`-th step or size."""
        for step in range(1, self.steps + 1, every):
            yield f"SIGKILL {self.kind}", self.struck_by(signal.SIGKILL, step)
            yield f"SIGINT {self.kind}", self.struck_by(signal.SIGINT, step)
        largest = max((path.stat().st_size for path in [self.checkpoint / "model.safetensors"]), default=0)
        for part in range(1, 40, every):
            yield f"full disk {self.kind}", starved(self.run, largest * part // 40)
        for line in range(1, self.lines + 1, max(1, every * self.lines // LINES)):
            yield f"SIGKILL at a line {self.kind}", struck(self.run, line, signal.SIGKILL, self.files)
            yield f"SIGINT at a line {self.kind}", struck(self.run, line, signal.SIGINT, self.files)
        yield f"SIGKILL between two names {self.kind}", self.killed_between_names

    def survived(self, act: Act, out: Path) -> str:
        """Strike once, look, run again, look again; returns what became of the run that was struck."""
        status = in_child(act, out)
        for name, digest in hashes(out).items():
            if name.endswith(".gguf") and digest != self.want[name]:
                read_gguf(out / name)
                raise AssertionError(f"{name} is whole and another than expected")
            if name.startswith(".") and status >= 0:
                raise AssertionError(f"{name} was left behind by a process that could clean up (status {status})")
        if status in (98, 99):
            raise AssertionError("the run ended with an error of several lines, or one that is none of ours")
        again = in_child(lambda folder: self.run(folder, force=True), out)
        if again != DONE or hashes(out) != self.want:
            raise AssertionError(f"run again: status {again}, files {sorted(hashes(out))}")
        return end_of(status)


def end_of(status: int) -> str:
    """A status of :func:`in_child` in words."""
    return ENDS.get(status, f"ended by {signal.Signals(-status).name}" if status < 0 else f"status {status}")


def strike_work(work: Work, every: int) -> Found:
    """Faults at each `every`-th line and size; raises AssertionError for the first that leaves harm."""
    found: Found = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        acts = [
            (f"{name} {work.name}", struck(work.run, line, number, work.files))
            for line in range(1, count_lines(work.run, place / "count", work.files) + 1, every)
            for name, number in (("SIGKILL", signal.SIGKILL), ("SIGINT", signal.SIGINT))
        ]
        sizes = [*range(0, work.largest, max(1, every * work.largest // 40)), work.largest]  # the last suffices
        acts += [(f"full disk {work.name}", starved(work.run, size)) for size in sizes]
        for number, (what, act) in enumerate(acts):
            out = place / str(number)
            status = in_child(act, out)
            if status in (98, 99):
                raise AssertionError(f"{what}: an error of several lines, or one that is none of ours")
            work.check(out)
            again = in_child(work.run, out)
            if again != DONE:
                raise AssertionError(f"{what}: run again: status {again}")
            work.check_done(out)
            found[what][end_of(status)] += 1
    return dict(found)


def strike(checkpoint: Path, kinds: tuple[str, ...], every: int) -> Found:
    """All faults on conversions to `kinds`; raises AssertionError for the first that leaves harm."""
    found: Found = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as work:
        for kind in kinds:
            case = Conversion(checkpoint, kind, Path(work) / kind)
            for number, (what, act) in enumerate(case.faults(every)):
                found[what][case.survived(act, Path(work) / f"{kind}-{number}")] += 1
    return dict(found)


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="strike at each N-th step (default 1)")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = strike_work(CacheWrites(), args.every) | strike_work(Evaluation(Path(folder)), args.every)
        if args.checkpoint is not None:
            found |= strike(args.checkpoint, ("F16", "Q8_0"), args.every)
    except AssertionError as err:
        print(f"harm: {err}")
        return 1
    for what, counts in found.items():
        print(f"{what}: {sum(counts.values())} faults ({', '.join(f'{n} {name}' for name, n in counts.items())})")
    total = sum(sum(counts.values()) for counts in found.values())
    print(f"{total} faults: no half file under a final name, every run again was complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
