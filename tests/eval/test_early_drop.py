"""eval compares the same K with and without an early drop, on the packaged model."""

from __future__ import annotations

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
import qap_gguf.eval as qe
from qap_gguf.eval.grid import evaluate_grid

BUDGET = [qe.Budget(n_keep=18)]


def test_an_early_drop_is_a_row_of_its_own() -> None:
    base = qap.PruneConfig(encoder_layer=2)
    rows = qe.variants(["dense", "dpp", "pool"], BUDGET, base, encoder_keeps=[1.0, 0.5, 0.25])
    assert [row.label for row in rows] == ["dense", "dpp", "dpp, encoder_keep 0.5", "dpp, encoder_keep 0.25", "pool"]
    assert rows[1].key == qe.variants(["dpp"], BUDGET)[0].key  # a journal of an earlier run knows it
    assert rows[2].key == "dpp, alpha 0.7, int4, encoder_keep 0.5 after 2 @ 18"
    (one,) = qe.variants(["dpp"], BUDGET, base.replace(encoder_keep=0.5))
    assert (one.label, one.key) == ("dpp", rows[2].key)
    with pytest.raises(qap.ConfigError, match="encoder_keep must be a number"):
        qe.variants(["dpp"], BUDGET, encoder_keeps=[0.0])


def test_each_drop_is_encoded_once_and_keeps_k() -> None:
    files = qap.packaged_model()
    questions = [qe.Question(files.sample, text, "four") for text in ("How many objects are there?", "How many?")]
    rows = qe.variants(["dense", "dpp", "dpp-flat", "pool", "random"], BUDGET, encoder_keeps=[1.0, 0.5, 0.25])
    opened: list[qap.VisionModel] = []

    def model(setup: qe.Setup) -> qap.VisionModel:
        opened.append(qap.VisionModel(kv=setup.kv or None, n_threads=1))
        return opened[-1]

    found = evaluate_grid(model, [qe.Setup(), qe.Setup(kv="q8_0")], questions, rows)
    assert {(o.n_kept, o.variant.budget is None) for o in found} == {(18, False), (144, True)}
    assert len(found) == 2 * len(questions) * (1 + 3 * 3 + 1)
    assert [vlm.n_encodes for vlm in opened] == [3, 0]  # whole, a half, a quarter; the second model has them already


def test_what_pixels_leave_is_kept_where_it_is_less_than_k() -> None:
    files = qap.packaged_model()
    questions = [qe.Question(files.sample, "How many objects are there?", "four")]
    base = qap.PruneConfig(duplicates=16)
    rows = qe.variants(["dense", "qap", "dpp-flat", "pool", "random"], [qe.Budget(n_keep=72)], base)
    assert {row.method: {c.duplicates for c in row.configs if c} for row in rows} == {
        "dense": set(), "qap": {16}, "dpp-flat": {16}, "pool": {None}, "random": {16},
    }  # fmt: skip
    with qap.VisionModel(n_threads=1) as vlm:
        n_left = vlm.encode(files.sample, base).n_left
        assert 0 < n_left < 72
        found = qe.evaluate(vlm, questions, rows)
    assert {o.variant.method: o.n_kept for o in found} == {
        "dense": 144, "qap": n_left, "dpp-flat": n_left, "pool": 72, "random": n_left,
    }  # fmt: skip
