"""benchmarks/adaptive_keep.py: where its rules stop, and what it asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import adaptive_keep
import qap_gguf as qap
from imatrix_tables import Answers
from qap_gguf.eval import Question
from qap_gguf.reference.scores import cosines
from qap_gguf.reference.selection import ranks, select

RNG = np.random.default_rng(5)


def test_greedy_takes_what_coverage_takes() -> None:
    x, scores = RNG.standard_normal((40, 8)), RNG.random(40)
    order, gains = adaptive_keep.greedy(cosines(x), ranks(scores))
    assert sorted(order) == list(range(40))
    assert gains.sum() == pytest.approx(1.0)
    for k in (1, 7, 20):
        assert sorted(order[:k]) == select(scores, k, "coverage", features=x).tolist()


@pytest.mark.parametrize("rule", adaptive_keep.RULES)
def test_a_plain_picture_needs_fewer_tokens(rule: str) -> None:
    flat = np.ones((30, 1)) @ RNG.standard_normal((1, 8)) + 0.01 * RNG.standard_normal((30, 8))
    busy = RNG.standard_normal((30, 8))
    curves = [adaptive_keep.RULES[rule](cosines(x), np.ones(30)) for x in (flat, busy)]
    assert all((np.diff(curve) >= 0).all() for curve in curves)
    few, many = adaptive_keep.counts_at(curves, 6.0)
    assert few < many
    assert (few + many) / 2 <= 6.0


def test_the_threshold_is_the_largest_that_the_mean_allows() -> None:
    curves = [np.sort(RNG.random(20)) for _ in range(9)]
    for most in (1.0, 4.3, 20.0):
        counts = adaptive_keep.counts_at(curves, most)
        larger = [
            means
            for level in np.unique(np.concatenate(curves))
            if (means := np.mean([adaptive_keep.first_at(curve, level) for curve in curves])) <= most
        ]
        assert counts.mean() == max(larger)
    with pytest.raises(ValueError, match="at least 1"):
        adaptive_keep.counts_at(curves, 0.5)


def test_questions_are_asked_once_for_each_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for number, noise in enumerate((3, 120)):
        pixels = np.clip(128 + rng.integers(-noise, noise + 1, (192, 192, 3)), 0, 255).astype(np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    questions = [Question(path, text, "no") for path in paths for text in ("Is there a cat?", "Is there a dog?")]
    with qap.VisionModel(n_threads=1) as vlm:
        study = adaptive_keep.Study(vlm, questions, [0.25, 0.125], qap.PruneConfig(select="coverage"))
        found = study.ask(vlm, Answers(tmp_path / "answers.jsonl"))
        again = study.ask(vlm, Answers(tmp_path / "answers.jsonl"))
    assert found == again
    asked = [{int(counts[number]) for counts in study.counts.values()} | {0} for number in range(4)]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == sum(map(len, asked))
    header, body = adaptive_keep.table_of(study, found)
    assert [row[:2] for row in body[:3]] == [("all", ""), ("0.25", "fixed"), ("0.25", "coverage")]
    assert len(body) == 9
    assert body[1][2:4] == ("36.0", "36 to 36")
    assert all(float(row[2]) <= 36.0 for row in body[2:5])
    assert all(float(row[2]) <= 18.0 for row in body[5:])
    assert header[-1] == "minus fixed"
