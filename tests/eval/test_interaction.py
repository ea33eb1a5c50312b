"""Gains compared across setups: counted by hand, paired, and shown in the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qap_gguf.eval as qe
from qap_gguf.config import PruneConfig
from qap_gguf.eval.output import write_results

F16, Q2 = qe.Setup("m-F16"), qe.Setup("m-Q2_K")
N = 40


def outcome(setup: qe.Setup, method: str, k: int, picture: int, right: bool) -> qe.Outcome:
    budget = None if method == "dense" else qe.Budget(n_keep=k)
    config = None if budget is None else PruneConfig(n_keep=k)
    question = qe.Question(Path(f"{picture}.png"), "q?", "yes")
    return qe.Outcome(question, qe.Variant(method, budget, (config,)), ("yes" if right else "no",), k, (0.01,), setup)


def rows(right: dict[tuple[qe.Setup, str, int], int]) -> list[qe.Outcome]:
    """The first so many of N pictures are right."""
    return [outcome(*key, picture, picture < n) for key, n in right.items() for picture in range(N)]


RIGHT = {
    (F16, "dense", 144): 40, (F16, "qap", 18): 20, (F16, "semantic", 18): 16, (F16, "qap", 9): 10,
    (F16, "semantic", 9): 10, (Q2, "dense", 144): 30, (Q2, "qap", 18): 20, (Q2, "semantic", 18): 8,
    (Q2, "qap", 9): 8, (Q2, "semantic", 9): 4,
}  # fmt: skip


def found(outcomes: list[qe.Outcome], method: str, versus: str) -> qe.Interaction:
    (one,) = (i for i in qe.interactions(outcomes) if (i.method, i.versus) == (method, versus))
    return one


def test_differences_of_differences_by_hand() -> None:
    grown = found(rows(RIGHT), "qap", "semantic")
    assert (grown.setup, grown.reference) == (Q2, F16)
    # K = 18: 12 more of 40 with Q2_K, 4 with F16; K = 9: 4 more with Q2_K, none with F16.
    assert {label: value for label, (value, _, _) in grown.by_budget.items()} == pytest.approx({"18": 0.2, "9": 0.1})
    value, low, high = grown.mean
    assert value == pytest.approx(0.15)
    assert low is not None
    assert high is not None
    assert 0 < low < value < high
    lost = found(rows(RIGHT), "qap", "dense")
    assert lost.by_budget["18"][0] == pytest.approx((20 - 30) / 40 - (20 - 40) / 40)


def test_the_same_gain_in_both_setups_is_zero_without_doubt() -> None:
    same = {(setup, method, k): n for (_, method, k), n in RIGHT.items() for setup in (F16, Q2)}
    for interaction in qe.interactions(rows(same)):
        assert interaction.mean == (0.0, 0.0, 0.0)


def test_methods_without_a_counterpart_and_single_setups_are_left_out() -> None:
    outcomes = rows({key: n for key, n in RIGHT.items() if key[1] != "semantic" or key[0] == F16})
    assert {(i.method, i.versus) for i in qe.interactions(outcomes)} == {("qap", "dense")}
    assert qe.interactions([o for o in outcomes if o.setup == F16]) == []
    one_picture = [o for o in rows(RIGHT) if o.question.image == Path("0.png")]
    assert found(one_picture, "qap", "semantic").mean == (0.0, None, None)


def test_tables_and_json_have_them(tmp_path: Path) -> None:
    outcomes = rows(RIGHT)
    result = qe.Evaluation(qe.summarise(outcomes), N, N, interactions=qe.interactions(outcomes))
    header, table = result.interaction_table()
    assert header == ("method", "versus", "model", "K = 18", "K = 9", "mean")
    cells: dict[tuple[str, ...], Any] = {row[:3]: row[3:] for row in table}
    assert cells["qap", "semantic", "m-Q2_K"][0].startswith("+20.0 (+")
    assert cells["qap", "semantic", "m-Q2_K"][2].startswith("+15.0 (+")
    assert set(cells) == {(m, v, "m-Q2_K") for m, v in (("qap", "dense"), ("qap", "semantic"), ("semantic", "dense"))}
    write_results(tmp_path, result, result.to_dict())
    text = (tmp_path / "results.md").read_text()
    assert "minus the points that it gains with m-F16:" in text
    plain = json.loads((tmp_path / "results.json").read_text())["interactions"]
    assert plain[0]["reference"] == {"model": "m-F16", "kv": ""}
    assert plain[0]["by_budget"]["18"]["value"] == pytest.approx(0.25)
    assert qe.Evaluation(qe.summarise(outcomes), N, N).to_dict()["interactions"] == []
