#!/usr/bin/env python3
"""One method against another over a whole grid, from the results.json that `qap-gguf eval --out` wrote.

    python benchmarks/compare.py results/results.json --method qap --versus semantic
    python benchmarks/compare.py results/results.json --method dpp --versus dense

A row for each language model and KV cache type (and setting of the method), a column for each K; a cell is the
difference in points with its paired 95 % interval, in bold where that excludes 0. One cell in twenty does so by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qap_gguf.eval import markdown
from qap_gguf.eval.report import Table

Row = Mapping[str, Any]


def is_certain(difference: Mapping[str, float | None]) -> int:
    """1 where the interval lies above 0, -1 where it lies below, else 0."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def cell(difference: Mapping[str, Any]) -> str:
    """The difference in points and its interval.

    Example:
        >>> cell({"value": 0.012, "low": 0.004, "high": 0.02})
        '**+1.2** (+0.4 to +2.0)'
    """
    value = f"{100 * difference['value']:+.1f}"
    if difference["low"] is None:
        return value
    value = f"**{value}**" if is_certain(difference) else value
    return f"{value} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"


def compare(results: Sequence[Row], method: str, versus: str) -> tuple[Table, list[Mapping[str, Any]]]:
    """(table, differences) of `method` against `versus`; the differences are those of its cells."""
    rows = [row for row in results if row["method"] == method and versus in row["versus"]]
    sizes = sorted({row["n_kept"] for row in rows}, reverse=True)
    lines: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in rows:
        names = [row["model"], row["kv"] or "f16", *([row["settings"]] if row["settings"] else [])]
        lines.setdefault(tuple(names), {})[row["n_kept"]] = row
    width = max((len(names) for names in lines), default=2)
    header = (*("model", "KV", "setting")[:width], *(f"K = {size:g}" for size in sizes))
    body = [
        (*names, *[""] * (width - len(names)),
         *(cell(found[size]["versus"][versus]) if size in found else "-" for size in sizes))
        for names, found in lines.items()
    ]  # fmt: skip
    return (header, body), [row["versus"][versus] for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json")
    parser.add_argument("--method", default="qap", help="what is compared (default: qap)")
    parser.add_argument("--versus", default="semantic", help="with what: dense, semantic, dpp-semantic, random")
    args = parser.parse_args(argv)
    try:
        results = json.loads(args.results.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError) as err:
        print(f"compare: error: expected results.json of qap-gguf eval, got {err}; check the path", file=sys.stderr)
        return 1
    table, differences = compare(results, args.method, args.versus)
    if not differences:
        print(f"compare: error: no row of {args.method} against {args.versus}; run eval with both", file=sys.stderr)
        return 1
    certain, n = [is_certain(difference) for difference in differences], len(differences)
    mean = 100 * sum(difference["value"] for difference in differences) / n
    print(markdown(table))
    print(
        f"\n{args.method} minus {args.versus}, points: above 0 in {certain.count(1)}, below 0 in {certain.count(-1)} "
        f"of {n} cells, mean {mean:+.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
