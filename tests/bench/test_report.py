"""Medians, ratios and the bound, by hand, without a model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qap_gguf.bench.measure import Pass
from qap_gguf.bench.report import summarise

DENSE = Pass(
    n_tokens=90, n_kept=90, n_text=10, encode_s=2.0, score_s=0.0, select_s=0.0, prefill_s=10.0, first_s=12.0,
    decode_s=0.5, n_kv=100, kv_bytes=1000,
)  # fmt: skip
PRUNED = dataclasses.replace(DENSE, n_kept=10, score_s=0.1, prefill_s=2.5, first_s=4.8, n_kv=20, kv_bytes=200)


def slow(one: Pass, factor: float) -> Pass:
    """The same pass on a machine that other jobs slow down."""
    times = {name: factor * getattr(one, name) for name in ("encode_s", "score_s", "prefill_s", "first_s", "decode_s")}
    return dataclasses.replace(one, **times)


def test_ratios_and_the_bound_by_hand() -> None:
    dense, pruned = summarise([[DENSE, PRUNED]]).rows
    assert (dense.first_ms, pruned.first_ms, pruned.prefill_ms, pruned.score_ms) == (12000, 4800, 2500, 100)
    assert pruned.first_speedup == pytest.approx(12 / 4.8)
    assert pruned.prefill_speedup == pytest.approx(4)
    # 0.1 s a token: 2 s of encode and 20 tokens are 4 s, where dense takes 12 s
    assert pruned.bound_ms == pytest.approx(4000)
    assert pruned.bound_speedup == pytest.approx(3)
    assert pruned.of_bound == pytest.approx(2.5 / 3)
    assert (dense.first_speedup, dense.bound_speedup) == (1, 1)
    assert dense.n_kv - pruned.n_kv == 80


def test_an_early_drop_has_a_bound_with_its_own_encode() -> None:
    early = dataclasses.replace(PRUNED, encode_s=1.0, first_s=3.8, encoder_keep=0.5)
    report = summarise([[DENSE, early, PRUNED]])
    dense, pruned, dropped = report.rows  # the same K, by falling encoder_keep
    assert (dense.encoder_keep, pruned.encoder_keep, dropped.encoder_keep) == (1, 1, 0.5)
    assert pruned.bound_ms == pytest.approx(4000)
    assert dropped.bound_ms == pytest.approx(3000)
    assert dropped.of_bound == pytest.approx((12 / 3.8) / (12 / 3))
    header, rows = report.table()
    assert [row[header.index("encoder keep")] for row in rows] == ["-", "-", "0.5"]


def test_a_slow_round_changes_no_ratio() -> None:
    rounds = [[DENSE, PRUNED], [slow(DENSE, 3), slow(PRUNED, 3)], [DENSE, PRUNED]]
    _, pruned = summarise(rounds).rows
    low, high = pruned.first_speedup_range
    assert low == pytest.approx(2.5)
    assert high == pytest.approx(2.5)
    assert pruned.first_ms == 4800


def test_rows_fall_in_k_and_each_has_its_own_peak() -> None:
    wide = dataclasses.replace(PRUNED, n_kept=45)
    report = summarise([[DENSE, PRUNED, wide]] * 2, [9_000_000, 6_000_000, 7_000_000])
    assert [row.n_kept for row in report.rows] == [90, 45, 10]
    assert [row.peak_bytes for row in report.rows] == [9_000_000, 7_000_000, 6_000_000]
    assert (report.n_tokens, report.n_text, report.rounds) == (90, 10, 2)


def test_table_has_a_cell_for_each_column_and_says_where_nothing_is_known() -> None:
    unknown = dataclasses.replace(PRUNED, decode_s=None)
    report = summarise([[DENSE, unknown]])
    header, rows = report.table()
    assert all(len(row) == len(header) for row in rows)
    cells = dict(zip(header, rows[1], strict=True))
    assert (cells["K"], cells["peak MB"], cells["decode ms/token"]) == ("10", "-", "-")
    assert (cells["first token x"], cells["bound x"], cells["of the bound %"]) == ("2.50", "3.00", "83.3")
    assert rows[0][0] == "90 (dense)"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"][1]["n_kv"] == 20
