"""`qap-gguf bench` on the packaged model: what it counts is exact; a table for people, JSON when asked for."""

from __future__ import annotations

import json
import re

import pytest

import qap_gguf as qap
from qap_gguf.cli import main

Said = pytest.CaptureFixture[str]
QUICK = ["--rounds", "1", "--decode", "2", "--threads", "1", "--no-memory"]


def test_a_table_for_people(capsys: Said) -> None:
    assert main(["bench", *QUICK, "--n-keep", "18"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith("| K ")
    assert "{" not in said
    assert re.search(r"; load before: (\d+\.\d\d \(of \d+ CPUs, last minute\)|not known here)$", lines[-1])


def test_cells_and_tokens_are_exact(capsys: Said) -> None:
    assert main(["bench", *QUICK, "--n-keep", "18", "--n-keep", "72", "--text-tokens", "33", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    dense, half, eighth = got["rows"]
    assert [row["n_kept"] for row in got["rows"]] == [144, 72, 18]
    assert (got["n_tokens"], got["n_text"]) == (144, 33)
    assert dense["n_kv"] == 144 + 33
    assert dense["n_kv"] - half["n_kv"] == 72
    assert dense["n_kv"] - eighth["n_kv"] == 126
    # four layers, keys and values of 256 numbers in f16, and a little for each cell
    per_cell = (dense["kv_bytes"] - eighth["kv_bytes"]) / 126
    assert 4 * 2 * 256 * 2 <= per_cell <= 4 * 2 * 256 * 2 + 64
    assert dense["first_speedup"] == dense["bound_speedup"] == 1
    assert all(row["first_ms"] >= row["encode_ms"] + row["prefill_ms"] for row in got["rows"])
    assert got["why_not_prunable"] is None


def test_json_is_one_line_and_a_quantized_cache_is_smaller(capsys: Said) -> None:
    sizes = {}
    for kv in ("f16", "q4_0"):
        assert main(["bench", *QUICK, "--n-keep", "18", "--kv", kv, "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        sizes[kv] = json.loads(line)["rows"][0]["kv_bytes"]
    assert 3 < sizes["f16"] / sizes["q4_0"] < 4  # 16 bits against 4.5


def test_peak_memory_is_that_of_a_process_with_the_model_in_it(capsys: Said) -> None:
    assert main(["bench", *QUICK, "--memory", "--n-keep", "18", "--json"]) == 0
    dense, pruned = json.loads(capsys.readouterr().out)["rows"]
    size = sum(path.stat().st_size for path in (qap.packaged_model().model, qap.packaged_model().mmproj))
    assert dense["peak_bytes"] > size
    assert pruned["peak_bytes"] == pytest.approx(dense["peak_bytes"], rel=0.2)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--n-keep", "3", "--keep-ratio", "0.5"], 2, "exclude each other"),
        (["--shape", "llava-1.5-7b", "-m", "m.gguf", "--mmproj", "p.gguf"], 2, "makes its own files"),
        (["--keep-ratio", "2"], 2, "keep_ratio must be"),
        (["--shape", "gpt-9"], 2, "Invalid value"),
        (["--n-keep", "18", "--keep-ratio", "0.125"], 2, "exclude"),
        (["--n-keep", "145", "--n-keep", "144"], 1, "numbers that differ"),
        (["--n-keep", "18", "--n-keep", "18"], 1, "numbers that differ"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], status: int, says: str, capsys: Said) -> None:
    assert main(["bench", *QUICK, *words]) == status
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""
