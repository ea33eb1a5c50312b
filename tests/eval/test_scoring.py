"""Scorings against hand-made cases and their official definitions, and what a row of the file suggests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qap_gguf.eval as qe
from qap_gguf.errors import ConfigError, DataError
from qap_gguf.eval import scoring

WORDS = st.lists(st.sampled_from(["red", "a", "2", "two", "ball", "dog", "isn't", "Dog."]), max_size=5).map(" ".join)


@given(st.sampled_from(["2", "3", "4"]), st.lists(st.sampled_from(["2", "3", "4", "5"]), min_size=10, max_size=10))
def test_vqa_is_the_mean_over_all_sets_of_nine_people(said: str, people: list[str]) -> None:
    sets = list(itertools.combinations(people, 9))
    official = sum(min(1.0, sum(one == said for one in nine) / 3) for nine in sets) / len(sets)
    assert scoring.vqa(said, people) == pytest.approx(official)


def test_vqa_compares_as_people_write() -> None:
    assert scoring.vqa("The TWO dogs.", ["2 dogs"]) == 1
    assert scoring.vqa("isnt it", ["isn't it"]) == 1
    assert scoring.vqa("3.5", ["3 5"]) == 0


@given(WORDS, WORDS)
def test_f1_is_symmetric_between_0_and_1_and_1_for_the_same(one: str, other: str) -> None:
    value = scoring.f1(one, [other])
    assert 0 <= value <= 1
    assert value == pytest.approx(scoring.f1(other, [one]))
    assert scoring.f1(one, [one]) == 1


def test_f1_by_hand() -> None:
    assert scoring.f1("big red ball", ["red ball"]) == pytest.approx(2 * 2 / 5)
    assert scoring.f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert scoring.f1("", ["red"]) == 0


@pytest.mark.parametrize(
    ("said", "answer", "value"),
    [("Yes, a dog", "yes", 1), ("no", "yes", 0), ("There is", "no", 0), ("", "no", 0), ("NO.", "No", 1)],
)
def test_yesno_is_the_first_word(said: str, answer: str, value: float) -> None:
    assert scoring.yesno(said, [answer]) == value


def load(tmp_path: Path, row: dict[str, Any], asked: str = "auto") -> qe.Question:
    (tmp_path / "a.png").touch()
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.png", "question": "?"} | row))
    return qe.load_questions(tmp_path / "q.jsonl", scoring=asked)[0]


@pytest.mark.parametrize(
    ("row", "asked", "found"),
    [
        ({"answer": "dog"}, "auto", "exact"),
        ({"answer": "B", "choices": ["A", "B"]}, "auto", "choice"),
        ({"answers": ["dog", "cat"]}, "auto", "vqa"),
        ({"answers": ["dog"]}, "auto", "exact"),
        ({"answer": "yes"}, "yesno", "yesno"),
        ({"answer": "dog", "choices": ["dog", "cat"]}, "exact", "exact"),
    ],
)
def test_a_row_suggests_its_scoring(tmp_path: Path, row: dict[str, Any], asked: str, found: str) -> None:
    question = load(tmp_path, row, asked)
    assert question.scoring == found
    assert bool(question.choices) == (found == "choice")


@pytest.mark.parametrize(
    ("row", "asked", "says"),
    [
        ({"answer": "C", "choices": ["A", "B"]}, "auto", "one of the choices"),
        ({"answer": "dog"}, "choice", "needs choices"),
        ({"answer": "dog"}, "yesno", "needs the answer yes or no"),
        ({"answer": "dog", "choices": "AB"}, "auto", "list of texts"),
        ({"answers": ["dog", ""]}, "auto", "list of texts"),
        ({"answers": []}, "auto", "with the texts image, question and answer"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(
    tmp_path: Path, row: dict[str, Any], asked: str, says: str
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        load(tmp_path, row, asked)
    assert "line 1" in str(caught.value)


def test_an_unknown_scoring_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected auto"):
        load(tmp_path, {"answer": "x"}, "best")
