#!/usr/bin/env python3
"""Resolve requirements with pip's own index, and write them with the digests of the files that it would install.

    python tools/build/lock_requirements.py build --also twine -o build.lock   # words as for requirements.py
    python -m pip install --require-hashes -r build.lock
    python tools/build/lock_requirements.py build --check build.lock           # exit 1 where it is not for these words

Nothing is installed. pip tells one file for each package, the one for this Python and system, so that a lock holds for
these alone, which its first line names; --check refuses others, and a lock whose pins no longer meet pyproject.toml.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from requirements import ROOT, expand, load

_PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})\n")


def where() -> str:
    """The Python and system that a lock is for."""
    return f"Python {platform.python_version().rpartition('.')[0]}, {sys.platform}, {platform.machine()}"


def resolve(rows: Sequence[str]) -> dict[str, Any]:
    """pip's report of what it would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *rows], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no words"]
        raise SystemExit(f"lock_requirements: expected an index with all of {', '.join(rows)}, pip says: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def lock(report: dict[str, Any]) -> str:
    """The lines of a lock, by name."""
    rows = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise SystemExit(f"lock_requirements: expected a sha256 of {name} {version}, the index gives none")
        rows.append((re.sub(r"[-_.]+", "-", name).lower(), f"{name}=={version} \\\n    --hash=sha256:{digest}\n"))
    return f"# for {where()}\n" + "".join(line for _, line in sorted(rows))


def faults(text: str, rows: Sequence[str]) -> Iterator[str]:
    """What is wrong with a lock for these requirements, here."""
    first, _, rest = text.partition("\n")
    if first != f"# for {where()}":
        yield f"expected a lock for {where()}, got {first[6:]!r}"
    pins = {match[1].lower().replace("_", "-"): match[2] for match in _PIN.finditer(rest)}
    if _PIN.sub("", rest):
        yield f"expected pins with one digest each, got {_PIN.sub('', rest)[:60]!r}"
    from pip._vendor.packaging.requirements import Requirement  # what pip itself reads them with

    for row in rows:
        wanted = Requirement(row)
        pin = pins.get(wanted.name.lower().replace("_", "-"))
        if (wanted.marker is None or wanted.marker.evaluate()) and (pin is None or not wanted.specifier.contains(pin)):
            yield f"expected {row}, got {'none' if pin is None else pin}"


def main(argv: list[str] | None = None) -> int:
    """Write or check a lock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="WORD", help="build, run or an extra, as for requirements.py")
    parser.add_argument("--also", action="append", default=[], metavar="REQUIREMENT", help="one more; repeatable")
    parser.add_argument("-o", type=Path, metavar="FILE", help="write here, not to stdout")
    parser.add_argument("--check", type=Path, metavar="FILE", help="check this lock")
    args = parser.parse_args(argv)
    project = load(ROOT / "pyproject.toml")
    rows = list(dict.fromkeys([*(row for word in args.words for row in expand(project, word)), *args.also]))
    if args.check is not None:
        found = list(faults(args.check.read_text(), rows))
        for line in found:
            print(f"lock_requirements: {args.check}: {line}; write it anew", file=sys.stderr)
        return 1 if found else 0
    text = lock(resolve(rows))
    if args.o is None:
        sys.stdout.write(text)
    else:
        args.o.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
