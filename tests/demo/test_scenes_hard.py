"""Harder scenes: every answer is true, every kind has its own difficulty, choices hold the answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import emoji_scenes as es
import emoji_scenes_hard as eh
import make_scenes as ms

OF_NAME = {name: emoji for emoji, name in es.NAMES.items()}
HARD = [kind for kind in eh.SCENE_KINDS if kind != "plain"]


def block(emoji: str, pixels: int) -> Image.Image:
    """A sprite that needs no font: a square in a colour of its own."""
    return Image.new("RGBA", (pixels, pixels), (es.EMOJI.index(emoji) * 3, 0, 255, 255))


def true_answer(text: str, scene: es.Scene) -> str:
    """What a reader of the question would answer, from the list of objects."""
    words = text.rstrip("?").split()
    at = {(placed.row, placed.column): placed.emoji for placed in scene.objects}
    if text.startswith("How many times"):
        name = text.removeprefix("How many times does the ").removesuffix(" appear?")
        return es.NUMBERS[sum(placed.emoji == OF_NAME[name] for placed in scene.objects)]
    if text.startswith("What is directly"):
        relation = next(r for r in eh.RELATIONS if text.startswith(f"What is directly {r} the "))
        name = text.removeprefix(f"What is directly {relation} the ").rstrip("?")
        (here,) = [place for place, emoji in at.items() if emoji == OF_NAME[name]]
        step = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[relation]
        found = at.get((here[0] + step[0], here[1] + step[1]))
        return es.NAMES[found] if found else "nothing"
    if text.startswith("What is the"):
        return es.NAMES[at[eh.ORDINALS.index(words[7]), eh.ORDINALS.index(words[3])]]
    line = eh.ORDINALS.index(words[-2])
    return eh.COUNTS[sum(row == line for row, _ in at)]


@given(st.sampled_from([kind for kind in HARD if kind not in ("small", "wide")]), st.integers(0, 2**63))
def test_every_answer_is_true(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    draw, ask = eh.SCENE_KINDS[kind]
    scene = draw(rng, block)
    assert scene.pixels.shape == (192, 192, 3)
    assert scene.pixels.dtype == np.uint8
    places = [(placed.row, placed.column) for placed in scene.objects]
    assert len(set(places)) == len(places)
    for _ in range(5):
        question = ask(rng, scene)
        assert question.kind.startswith(kind)
        assert question.answer == true_answer(question.text, scene)


def test_small_objects_are_about_one_patch_and_asked_about_as_plain_ones() -> None:
    rng = random.Random(1)
    for _ in range(20):
        scene = eh.make_small(rng, block)
        question = eh.ask_small(rng, scene)
        assert question.kind.removeprefix("small-") in es.KINDS
        background = np.array(es.COLORS[scene.background])
        changed = (np.abs(scene.pixels.astype(int) - background).max(axis=2) > 6).sum()
        assert changed <= 20 * 20 * len(scene.objects)


def test_wide_scenes_are_the_middle_rows_of_a_square() -> None:
    rng = random.Random(4)
    for _ in range(20):
        scene = eh.make_wide(rng, block)
        assert scene.pixels.shape == (96, 192, 3)
        assert {placed.row for placed in scene.objects} <= {1, 2}
        question = eh.ask_wide(rng, scene)
        assert question.kind.removeprefix("wide-") in es.KINDS
        for placed in scene.objects:
            cell = scene.pixels[(placed.row - 1) * 48 :][:48, placed.column * 48 :][:, :48].reshape(-1, 3)
            assert (np.abs(cell.astype(int) - np.array(es.COLORS[scene.background])).max(axis=1) > 6).any()


def test_rows_stay_in_the_picture_and_do_not_overlap() -> None:
    rng = random.Random(2)
    for _ in range(50):
        scene = eh.make_rows(rng, block)
        background = np.array(es.COLORS[scene.background])
        changed = (np.abs(scene.pixels.astype(int) - background).max(axis=2) > 6).sum()
        assert changed == 16 * 16 * len(scene.objects)


def test_counting_and_relations_are_not_all_alike() -> None:
    rng = random.Random(3)
    counts = {eh.ask_distractors(rng, eh.make_distractors(rng, block)).answer for _ in range(200)}
    assert counts >= {"zero", "one", "two", "three", "four", "five"}
    answers = [eh.ask_relations(rng, eh.make_relations(rng, block)).answer for _ in range(200)]
    assert 10 < answers.count("nothing") < 120


@given(st.sampled_from(list(eh.SCENE_KINDS)), st.integers(0, 2**32), st.integers(2, 6))
def test_choices_hold_the_answer_once(kind: str, seed: int, n: int) -> None:
    rng = random.Random(seed)
    draw, ask = eh.SCENE_KINDS[kind]
    question = ask(rng, draw(rng, block))
    choices = eh.add_choices(rng, question, n)
    assert choices.count(question.answer) == 1
    assert len(set(choices)) == len(choices) == min(n, 2 if question.answer in ("yes", "no") else n)


def test_kinds_take_turns_and_choices_change_no_scene(tmp_path: Path) -> None:
    kinds = list(eh.SCENE_KINDS)
    for name, choices in (("a", 0), ("b", 4)):
        assert ms.write_scenes(tmp_path / name, 12, 3, 5, block, kinds=kinds, choices=choices) == 36
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "questions.jsonl").read_text().splitlines()]
        for name in ("a", "b")
    }
    assert [{k: v for k, v in row.items() if k != "choices"} for row in rows["b"]] == rows["a"]
    assert all(row["answer"] in row["choices"] for row in rows["b"])
    found = [rows["a"][3 * i]["kind"].split("-")[0] for i in range(12)]
    assert [kind if kind in HARD else "plain" for kind in found] == kinds * 2
    assert (tmp_path / "a" / "00003.png").read_bytes() == (tmp_path / "b" / "00003.png").read_bytes()


@pytest.mark.parametrize("wrong", [["--kinds", "easy"], ["--kinds", ","], ["--choices", "1"]])
def test_wrong_usage_ends_with_2(tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ms.main([*wrong, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
