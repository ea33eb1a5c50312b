"""Processes that try damaged files: the processor's time counts against a file, a busy machine does not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from process_limits import ending

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a Linux process")


def run(work: str, wall_seconds: int) -> int:
    """The end of a process that may use one second of the processor."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from process_limits import bound; bound(1, {wall_seconds}); {work}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode


@pytest.mark.parametrize(
    ("work", "wall_seconds", "end"),
    [
        ("sum(iter(int, 1))", 50, -signal.SIGXCPU),  # computes without end
        ("import time; time.sleep(40)", 1, -signal.SIGALRM),  # hangs
        ("import time; time.sleep(1.5)", 50, 0),  # waits for the processor
        ("bytearray(20 << 30)", 50, 1),  # MemoryError
    ],
)
def test_limits(work: str, wall_seconds: int, end: int) -> None:
    assert run(work, wall_seconds) == end


def test_endings_have_names() -> None:
    assert ending(3 << 8) == "exit status 3"
    assert ending(signal.SIGABRT) == "SIGABRT"
    assert ending(signal.SIGXCPU) == "SIGXCPU, too much processor time"
    assert ending(signal.SIGALRM) == "SIGALRM, too long by the clock"


def test_a_lost_process_says_why() -> None:
    """The same through strangers.py, which forks: in a process of its own here, for this one has threads."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import os, pathlib, tempfile, strangers; strangers.SECONDS = 1\n"
        "log = pathlib.Path(tempfile.mkdtemp()) / 'log'\n"
        "def judge(kind, path): sum(iter(int, 1)) if kind == 'busy' else None; return 'ran'\n"
        "strangers.judge = judge\n"
        "print(strangers.outcome('busy', log, log).splitlines()[0], '|', strangers.outcome('idle', log, log))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"lost: {ending(signal.SIGXCPU)} | ran\n", done.stderr
