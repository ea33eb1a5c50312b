"""Fresh interpreters for tests: the order of imports is under test, and a signal must be seen.

`run_probe` calls a function of probe.py in a child and gives back what it returned; `outcome` runs any command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("probe.py")
MARK = "PROBE-RESULT "
_OURS = ("QAP_", "MTMD_CPP_LIB", "PYTHONPATH")
_TESTS = str(PROBE.parents[1])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this process without the switches that are under test."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_OURS)} | dict(extra or {})


def outcome(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, stdin: str = "", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command; a signal that ends it fails the test at once."""
    done = subprocess.run(
        [str(word) for word in command],
        env=environment(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        errors="replace",
    )
    assert done.returncode >= 0, f"ended by signal {-done.returncode}:\n{done.stderr[-2000:]}"
    return done


def python(code: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a fresh interpreter."""
    return outcome([sys.executable, "-c", code, *arguments], env=env)


def run_probe(name: str, *, env: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """Call `name` of probe.py with JSON arguments in a fresh interpreter, and return its result."""
    done = outcome(
        [sys.executable, "-m", "dropin.probe", name, json.dumps(arguments, default=str)],
        env={"PYTHONPATH": _TESTS, **(env or {})},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert done.returncode == 0, done.stderr[-4000:]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix(MARK))
