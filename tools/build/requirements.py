#!/usr/bin/env python3
"""Print requirements from pyproject.toml, one a line: words are `build`, `run` or the names of extras.

    python tools/build/requirements.py build run              # what the Makefile installs before our own package
    python tools/build/requirements.py test --without torch   # an extra, less one package

`build` is [build-system].requires and what scikit-build-core would add by itself (cmake, ninja); `run` is
[project].dependencies; any other word names an extra, whose references to our own extras are followed.
Python 3.10 has no tomllib: there the copy inside pip serves.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> dict[str, Any]:
    """The parsed TOML file."""
    for name in ("tomllib", "tomli", "pip._vendor.tomli"):
        try:
            parser = importlib.import_module(name)
        except ImportError:
            continue
        result: dict[str, Any] = parser.loads(path.read_text(encoding="utf-8"))
        return result
    raise SystemExit("requirements: expected Python >= 3.11 or a pip with tomli, got neither; run pip install tomli")


def expand(project: dict[str, Any], word: str) -> list[str]:
    """The requirements that `word` stands for."""
    if word == "build":
        return [*project["build-system"]["requires"], "cmake>=3.21", "ninja>=1.10"]
    if word == "run":
        return list(project["project"].get("dependencies", []))
    extras = project["project"].get("optional-dependencies", {})
    if word not in extras:
        raise SystemExit(f"requirements: expected build, run or one of {sorted(extras)}, got '{word}'; check the name")
    rows: list[str] = []
    own = re.compile(rf"{re.sub('[-_]', '[-_]', project['project']['name'])}\[([^\]]+)\]$", re.IGNORECASE)
    for row in extras[word]:
        if match := own.match(row.replace(" ", "")):
            for extra in match[1].split(","):
                rows += expand(project, extra)
        else:
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the rows without repeats, in the order found."""
    parser = argparse.ArgumentParser(description="Print requirements from pyproject.toml, one a line.")
    parser.add_argument("words", nargs="+", metavar="WORD", help="build, run or an extra")
    parser.add_argument("--without", action="append", default=[], metavar="PACKAGE", help="leave this package out")
    args = parser.parse_args(argv)
    project = load(ROOT / "pyproject.toml")
    rows = [row for word in args.words for row in expand(project, word)]
    for row in dict.fromkeys(rows):
        if re.split(r"[^A-Za-z0-9._-]", row, maxsplit=1)[0].lower() not in args.without:
            print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
