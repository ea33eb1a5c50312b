#!/usr/bin/env python3
"""The tables of docs/results.md, from the folders that `qap-gguf eval --out` and benchmarks/w4a4.py wrote.

    python benchmarks/results_tables.py RESULTS --write docs/results.md
    python benchmarks/results_tables.py RESULTS --only methods

RESULTS holds a folder for each run: methods, grid, flat, errors, alpha, w4a4, hard. A table stands between the lines
`<!-- table NAME -->` and `<!-- end -->`; what is between them is replaced. Tables whose run is not there stay as they
are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from compare import cell, compare, is_certain
from qap_gguf.eval import markdown
from qap_gguf.eval.report import Table

Row = Mapping[str, Any]
Run = Mapping[str, Any]
#: (method, the other), for the tables of gains.
PAIRS: Final = (("qap", "semantic"), ("dpp", "dpp-semantic"), ("dpp", "qap"), ("dpp", "dense"))


def accuracy(row: Row) -> str:
    """Percent and interval.

    Example:
        >>> accuracy({"accuracy": 0.511, "low": 0.48, "high": 0.54})
        '51.1 (48.0 to 54.0)'
    """
    interval = "" if row["low"] is None else f" ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    return f"{100 * row['accuracy']:.1f}{interval}"


def name_of(row: Row) -> str:
    """The method, with its settings."""
    return f"{row['method']}, {row['settings']}" if row["settings"] else str(row["method"])


def sizes(rows: Iterable[Row]) -> list[int]:
    """K of the pruned rows, falling."""
    return sorted({row["n_keep"] for row in rows if row["n_keep"] is not None}, reverse=True)


def by_method(run: Run) -> Table:
    """A row for each method, a column for each K; the row of dense has one number."""
    rows = run["results"]
    columns = sizes(rows)
    found: dict[str, dict[Any, str]] = {}
    for row in rows:
        found.setdefault(name_of(row), {})[row["n_keep"]] = accuracy(row)
    body = [
        (name, cells.get(None, ""), *(cells.get(k, "") for k in columns)) for name, cells in found.items()
    ]  # fmt: skip
    return ("method", "all tokens", *(f"K = {k}" for k in columns)), body


def versus(run: Run, others: Sequence[str]) -> Table:
    """A row for each method and what it is compared with, a column for each K; the cells are differences."""
    rows = [row for row in run["results"] if row["n_keep"] is not None]
    columns, found = sizes(rows), {}  # type: list[int], dict[tuple[str, str], dict[int, str]]
    for other in others:
        for row in rows:
            if other in row["versus"]:
                found.setdefault((name_of(row), other), {})[row["n_keep"]] = cell(row["versus"][other])
    body = [(*names, *(cells.get(k, "") for k in columns)) for names, cells in found.items()]
    return ("method", "minus", *(f"K = {k}" for k in columns)), body


def by_setup(run: Run, k: int) -> Table:
    """A row for each language model and KV cache, a column for each method at one K."""
    rows = [row for row in run["results"] if row["n_keep"] in (None, k)]
    methods = list(dict.fromkeys(map(name_of, rows)))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        found.setdefault((row["model"], row["kv"]), {})[name_of(row)] = accuracy(row)
    body = [(*names, *(cells.get(method, "") for method in methods)) for names, cells in found.items()]
    return ("model", "KV", *methods), body


def by_kind(run: Run, k: int) -> Table:
    """A row for each method at one K, a column for each kind of question: right answers in per cent, and how many."""
    rows = [row for row in run["results"] if row["n_keep"] in (None, k)]
    kinds = list(rows[0]["by_kind"])
    counts = [rows[0]["by_kind"][kind]["n_total"] for kind in kinds]
    body = [(name_of(row), *(f"{100 * row['by_kind'][kind]['accuracy']:.1f}" for kind in kinds)) for row in rows]
    return ("method", *(f"{kind} ({n})" for kind, n in zip(kinds, counts, strict=True))), body


def interactions(run: Run, pairs: Sequence[tuple[str, str]]) -> Table:
    """A row for each setup but the first: mean over K of how much more is gained there than under the first."""
    found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in run["interactions"]:
        found.setdefault((row["model"], row["kv"]), {})[row["method"], row["versus"]] = cell(row["mean"])
    body = [(*names, *(cells.get(pair, "") for pair in pairs)) for names, cells in found.items()]
    return ("model", "KV", *(f"{method} - {other}" for method, other in pairs)), body


def by_setting(run: Run, other: Mapping[str, str]) -> Table:
    """A row for each setting, columns for each method and K: accuracy, and the difference to another method."""
    rows = [row for row in run["results"] if row["settings"]]
    columns = list(dict.fromkeys((row["method"], row["n_keep"]) for row in rows))
    found: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        against = row["versus"].get(other.get(row["method"], ""))
        shown = f"{100 * row['accuracy']:.1f}" + ("" if against is None else f"; {cell(against)}")
        found.setdefault(row["settings"], {})[row["method"], row["n_keep"]] = shown
    several = len({k for _, k in columns}) > 1
    titles = [f"{method}{f', K = {k}' if several else ''}" for method, k in columns]
    return ("setting", *titles), [(name, *(cells.get(c, "") for c in columns)) for name, cells in found.items()]


def gains(run: Run, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A table of each pair over the grid, and how many of its cells are certain."""
    parts = []
    for method, other in pairs:
        table, differences = compare(run["results"], method, other)
        certain, n = [is_certain(difference) for difference in differences], len(differences)
        mean = 100 * sum(difference["value"] for difference in differences) / n
        parts += [
            f"{method} minus {other}, points:",
            markdown(table),
            f"Above 0 in {certain.count(1)}, below 0 in {certain.count(-1)} of {n} cells; mean {mean:+.1f}.",
        ]
    return parts


def settings(run: Run) -> list[str]:
    """The rows that have no settings, then those that have."""
    plain = {**run, "results": [row for row in run["results"] if not row["settings"]]}
    return [markdown(by_method(plain)), markdown(by_setting(run, _PAIRED))]


_BASELINES: Final = ("semantic", "dpp-semantic", "qap", "dpp-flat", "pool", "random")
_PAIRED: Final = {"qap": "semantic", "numeric": "semantic", "dpp": "dpp-semantic", "dpp-numeric": "dpp-semantic"}
_FLAT: Final = (("dpp", "dpp-flat"),)
_GROWN: Final = (*PAIRS, ("semantic", "dense"))

#: Name of a table -> (run, what makes its Markdown).
TABLES: Final[Mapping[str, tuple[str, Callable[[Run], list[str]]]]] = {
    "methods": ("methods", lambda run: [markdown(by_method(run))]),
    "methods-kinds": ("methods", lambda run: [markdown(by_kind(run, 18))]),
    "methods-versus": ("methods", lambda run: [markdown(versus(run, _BASELINES))]),
    "grid": ("grid", lambda run: [markdown(by_setup(run, 18))]),
    "grid-gains": ("grid", lambda run: gains(run, PAIRS)),
    "grid-interactions": ("grid", lambda run: [markdown(interactions(run, _GROWN))]),
    "flat": ("flat", lambda run: [*gains(run, _FLAT), markdown(interactions(run, _FLAT))]),
    "errors": ("errors", settings),
    "alpha": ("alpha", settings),
    "w4a4": ("w4a4", lambda run: [markdown(by_setup(run, 18))]),
    "w4a4-gains": ("w4a4", lambda run: gains(run, PAIRS)),
    "w4a4-interactions": ("w4a4", lambda run: [markdown(interactions(run, _GROWN))]),
    "hard": ("hard", lambda run: [markdown(by_kind(run, 18))]),
}


def replaced(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each table between its two lines.

    Raises:
        ValueError: a table has no place, or a place without end.
    """
    for name, content in tables.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"no lines '{begin.strip()}' and '{end}' around a table")
        text = f"{before}{begin}\n{content}\n\n{end}{rest.partition(end)[2]}"
    return text


def publish(text: str, file: Path, page: Path | None, name: str) -> None:
    """Print tables, write them to `file`, and where there is a page, to their place in it."""
    file.write_text(text + "\n", encoding="utf-8")
    print(text)
    if page is not None:
        write_tables(page, {name: text})


def write_tables(path: Path, tables: Mapping[str, str]) -> None:
    """Put the tables into a file, as :func:`replaced` does."""
    path.write_text(replaced(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of runs")
    parser.add_argument("--only", choices=TABLES, action="append", help="this table; repeatable (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into FILE instead of printing them")
    args = parser.parse_args(argv)
    tables: dict[str, str] = {}
    try:
        for name in args.only or TABLES:
            run, make = TABLES[name]
            path = args.results / run / "results.json"
            if not path.exists() and not args.only:
                print(f"results_tables: no {path}: table {name} is left alone", file=sys.stderr)
                continue
            found = json.loads(path.read_text(encoding="utf-8"))
            asked = f"{found['n_questions']} questions about {found['n_pictures']} pictures."
            tables[name] = "\n\n".join([*make(found), asked])
        if args.write is not None:
            write_tables(args.write, tables)
    except (OSError, ValueError, KeyError, ZeroDivisionError) as err:
        print(f"results_tables: error: expected folders of finished runs, got {err!r}; check the path", file=sys.stderr)
        return 1
    if args.write is None:
        print("\n\n".join(f"{name}:\n\n{content}" for name, content in tables.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
