"""ggml's operation tables (docs/ops/*.csv of llama.cpp) and whether a backend supports a graph's node by them.

A row of a table is one case of upstream's test-backend-ops: an operation, its parameters as text
("type=f32,ne=[10,5,4,3],v=0"), and whether the backend says that it can run it. A node is supported when the table has
rows like it, and every such row is supported. Like it means: of the same types, and equal in what `expected` knows of
the node (masks, strides, ...); sizes and constants do not matter.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKENDS = ("CPU", "CUDA", "Metal", "Vulkan")
#: Nodes without a kernel: another look at the same memory.
VIEWS = {"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}

_PARAMETER = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]*)")
_BINARY = {"ADD", "SUB", "MUL", "DIV"}


@dataclass(frozen=True)
class Row:
    """One case of a table."""

    parameters: Mapping[str, str]
    supported: bool


Tables = dict[str, dict[str, list[Row]]]  # backend -> operation -> rows


@dataclass(frozen=True)
class Case:
    """A node as far as the tables can tell nodes apart."""

    op: str
    types: tuple[str, ...]  # of the sources and the result
    expected: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.op} {', '.join(self.types[:-1])} -> {self.types[-1]}"


def read_tables(folder: Path) -> Tables:
    """The tables of BACKENDS in docs/ops."""
    tables: Tables = {}
    for backend in BACKENDS:
        rows: dict[str, list[Row]] = {}
        with open(folder / f"{backend}.csv", newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if line["test_mode"] == "support":
                    row = Row(dict(_PARAMETER.findall(line["op_params"])), line["supported"] == "1")
                    rows.setdefault(line["op_name"], []).append(row)
        tables[backend] = rows
    return tables


def case_of(node: Mapping[str, Any]) -> Case:
    """What `qap_gguf._core` tells of a node, in the words of the tables."""
    op, dst, src = str(node["name"]), node["dst"], node["src"]
    first = src[0] if src else dst
    second = src[1] if len(src) > 1 else first
    same_order = "[0,0,0,0]"
    expected = {"type": first["type"]}
    if op in _BINARY:
        if not (first["rows_contiguous"] and second["rows_contiguous"]):
            raise ValueError(f"{op} of a tensor whose rows are not contiguous: the tables do not know such a case")
        expected |= {"perm1": str(int(second["permuted"])), "nf": "1", "src_overlap": "0"}
    elif op == "MUL_MAT":
        expected = {"type_a": first["type"], "type_b": second["type"], "k_v": "0"}
        expected["nr"] = "[" + ",".join(str(second["shape"][i] // first["shape"][i]) for i in (2, 3)) + "]"
        expected["per"] = "[0,2,1,3]" if first["permuted"] else "[0,1,2,3]"
    elif op == "CPY":
        expected = {"type_src": first["type"], "type_dst": dst["type"], "_src_transpose": "0"}
        expected |= {"permute_src": same_order, "permute_dst": same_order}
    elif op == "POOL_1D":
        kind = ("max", "avg")[node["params"][0]]
        expected = {"type_input": first["type"], "pool_type": kind, "p0": str(node["params"][3])}
    elif op == "SOFT_MAX":
        expected |= {"mask": str(int(len(src) > 1)), "sinks": str(int(len(src) > 2)), "inplace": "0"}
    elif op == "ARGSORT":
        expected["order"] = str(node["params"][0])
    elif op == "CONCAT":
        expected["dim"] = str(node["params"][0])
    elif op == "SET_ROWS":
        expected |= {"type_src": first["type"], "type_dst": dst["type"], "type_idx": second["type"]}
    elif op == "PAD":
        left = node["params"][0:8:2]
        expected |= {f"lp{i}": "0" for i in range(4)} | {"circular": str(node["params"][8]), "tfrm": "0"}
        if any(left):
            raise ValueError("PAD on the left: not every backend has it")
    elif op == "SUM_ROWS":
        expected |= {"permute": str(int(first["permuted"])), "slice": str(int(not first["contiguous"]))}
    if op not in ("CONT", "GET_ROWS", *_BINARY):
        expected["v"] = str(int(not first["contiguous"]))
    return Case(op, (*(s["type"] for s in src), dst["type"]), expected)


def cases_of(nodes: Iterable[Mapping[str, Any]]) -> list[Case]:
    """The different cases among the nodes of graphs."""
    found: list[Case] = []
    for case in (case_of(node) for node in nodes if node["name"] not in VIEWS):
        if case not in found:
            found.append(case)
    return found


def _alike(name: str, found: str | None, wanted: str) -> bool:
    """Whether a row's parameter fits; None: the row does not tell.

    How often MUL_MAT repeats a matrix is a size; whether it does is a case of its own.
    """
    if name == "nr" and found is not None:
        return [n == "1" for n in found[1:-1].split(",")] == [n == "1" for n in wanted[1:-1].split(",")]
    return found in (None, wanted)


def why_unsupported(case: Case, rows: Mapping[str, list[Row]]) -> str | None:
    """None when a backend's table supports the case, else what is wrong."""
    if case.op not in rows:
        return "not in the table"
    like = [
        row
        for row in rows[case.op]
        if all(_alike(key, row.parameters.get(key), value) for key, value in case.expected.items())
    ]
    # a row that names no type at all would be like anything
    like = [row for row in like if any(key.startswith("type") for key in row.parameters)]
    if not like:
        return "no row for these types"
    if not all(row.supported for row in like):
        return f"{sum(not row.supported for row in like)} of {len(like)} rows are not supported"
    return None
