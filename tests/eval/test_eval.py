"""Evaluation without a model: questions, methods, outcomes of a scripted model, intervals and tables."""

from __future__ import annotations

import doctest
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qap_gguf.eval as qe
from qap_gguf import eval as package
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError, DataError, NativeError, UnsupportedError
from qap_gguf.eval import data, methods, report, runner, scoring, stats

N_TOKENS = 144


class Generation:
    """Pieces of an answer, with statistics, as VisionModel.generate returns it."""

    def __init__(self, text: str, kept: int) -> None:
        self.text, self.stats = text, SimpleNamespace(n_image_kept=kept, prefill_s=0.002 * kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self.text)


@dataclass(frozen=True)
class Embedding:
    n_tokens: int
    grid: tuple[int, int]
    features: Any
    attention: Any

    @property
    def n_rows(self) -> int:
        return len(self.features)

    @property
    def n_real(self) -> int:
        return self.n_tokens

    @property
    def n_left(self) -> int:
        return self.n_tokens

    @property
    def padding(self) -> Any:
        return np.zeros(self.n_tokens, np.bool_)

    dropped = padding
    kept_early = None


@dataclass
class ScriptedModel:
    """Right when dense, or when it keeps at least 18 tokens by another way than at random; counts what was asked.

    Every config keeps other tokens, but those that differ by their error only.
    """

    answers: dict[str, str]
    attention: Any = (1.0,)
    lies_about_kept: bool = False
    encoded: list[Any] = field(default_factory=list)
    asked: list[tuple[str, PruneConfig | None]] = field(default_factory=list)
    configs: dict[PruneConfig, int] = field(default_factory=dict)

    def encode(self, image: Any, prune: PruneConfig | None = None) -> Any:
        self.encoded.append(image if prune is None else (image, prune.encoder_keep))
        return Embedding(N_TOKENS, (12, 12), np.eye(N_TOKENS, dtype=np.float32), self.attention)

    def prune(self, image: Any, config: PruneConfig, prompt: str | None = None) -> Any:
        kept = config.count(N_TOKENS)
        first = self.configs.setdefault(config.replace(error="int4"), len(self.configs)) % (N_TOKENS - kept + 1)
        return SimpleNamespace(indices=np.arange(first, first + kept, dtype=np.int32))

    def generate(self, parts: Any, *, prune: Any, max_tokens: int, temperature: float, stream: bool) -> Any:
        assert temperature == 0.0
        assert stream
        assert max_tokens == runner.MAX_TOKENS
        _, text = parts
        self.asked.append((text, prune))
        kept = N_TOKENS if prune is None else prune.count(N_TOKENS)
        right = prune is None or (kept >= 18 and prune.select != "random") or prune.seed == 1
        said = f" {self.answers[text].upper()}.\n" if right else "no idea"
        return Generation(said, kept - 1 if self.lies_about_kept else kept)


@pytest.fixture
def questions(tmp_path: Path) -> list[qe.Question]:
    found = []
    for i in range(4):
        (tmp_path / f"{i}.png").touch()
        found += [
            qe.Question(tmp_path / f"{i}.png", f"{i}{j}?", f"answer {i}{j}", kind)
            for j, kind in enumerate(("at", "is", "at"))
        ]
    return found


def model_for(questions: list[qe.Question], **kwargs: Any) -> ScriptedModel:
    return ScriptedModel({q.text: q.answer for q in questions}, **kwargs)


# --- questions --------------------------------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


ROW = {"image": "a.png", "question": "What?", "answer": "dog"}


def test_questions_are_read_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    file = write(tmp_path / "q.jsonl", ROW | {"kind": "at"}, "", ROW | {"extra": 1, "answer": "\u2028x"})
    assert qe.load_questions(file) == [
        qe.Question(tmp_path / "a.png", "What?", "dog", "at"),
        qe.Question(tmp_path / "a.png", "What?", "\u2028x", "any"),
    ]
    assert len(qe.load_questions(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "at least one question"),
        (["", " "], "at least one question"),
        ([ROW, "{oops"], "line 2: expected a JSON object"),
        ([[1, 2]], "line 1: expected an object with the texts"),
        ([{"image": "a.png", "question": "What?"}], "line 1: expected an object with the texts"),
        ([ROW | {"answer": 3}], "line 1: expected an object with the texts"),
        ([ROW | {"question": ""}], "line 1: expected an object with the texts"),
        ([ROW | {"kind": 3}], "line 1: kind must be a text"),
        ([ROW | {"image": "b.png"}], "line 1: no picture at"),
    ],
)
def test_a_bad_file_of_questions_is_one_line_that_says_where(tmp_path: Path, rows: list[Any], says: str) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=says) as caught:
        qe.load_questions(write(tmp_path / "q.jsonl", *rows))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        qe.load_questions(tmp_path / "none.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="check the path"):
        qe.load_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        (" Dog.\n", "dog", True),
        ("dog!?", "Dog", True),
        ("row 2, column 3.", "Row 2, column 3", True),
        ("hot dog", "dog", False),
        ("dog, cat", "dog", False),
        ("", "dog", False),
        ("...", "dog", False),
    ],
)
def test_what_counts_as_right(said: str, answer: str, right: bool) -> None:
    assert qe.is_right(said, answer) is right


@given(st.text(string.printable))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = qe.normalise(text)
    assert qe.normalise(once) == once
    assert qe.is_right(f" {once}. ", text)


# --- methods ----------------------------------------------------------------------------------------------------------


def test_each_method_is_the_config_that_its_name_says() -> None:
    base = PruneConfig(group_size=64, alpha=0.6, select="uniform", seed=2**64 - 1)
    found = {v.method: v for v in qe.variants(qe.METHODS, [qe.Budget(n_keep=18)], base)}
    assert list(found) == list(qe.METHODS)
    assert found["dense"].configs == (None,)
    (qap,), (semantic,) = found["qap"].configs, found["semantic"].configs
    (numeric,), (uniform,) = found["numeric"].configs, found["uniform"].configs
    assert qap == base.replace(n_keep=18, select="topk")
    assert semantic == base.replace(n_keep=18, select="topk", alpha=1.0, semantic="cls")
    assert numeric == base.replace(n_keep=18, select="topk", alpha=0.0, semantic="none")
    assert uniform == base.replace(n_keep=18, select="uniform")
    seeds = [config.seed for config in found["random"].configs if config is not None and config.select == "random"]
    assert seeds == [2**64 - 1, 0, 1]
    assert found["coverage"].configs == (base.replace(n_keep=18, select="coverage"),)
    assert found["coverage-semantic"].configs == (semantic.replace(select="coverage"),)
    assert [m for m, v in found.items() if v.needs_attention] == ["semantic", "dpp-semantic", "coverage-semantic"]
    assert {name for names in methods.BASELINES.values() for name in names} <= set(report._VERSUS)  # each has a column


def test_methods_times_budgets_without_repetition() -> None:
    budgets = [qe.Budget(n_keep=18), qe.Budget(keep_ratio=0.5), qe.Budget(n_keep=18)]
    rows = [(v.method, v.budget) for v in qe.variants(["qap", "dense", "qap", "uniform"], budgets)]
    assert rows == [
        ("dense", None), ("qap", budgets[0]), ("uniform", budgets[0]), ("qap", budgets[1]), ("uniform", budgets[1]),
    ]  # fmt: skip


def test_a_ratio_takes_the_place_of_a_count_in_the_base() -> None:
    (variant,) = qe.variants(["qap"], [qe.Budget(keep_ratio=0.5)], PruneConfig(n_keep=3))
    assert variant.configs[0] is not None
    assert variant.configs[0].count(144) == 72


def test_bad_methods_and_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match="got best; choose"):
        qe.variants(["qap", "best"], [qe.Budget(n_keep=1)])
    with pytest.raises(ConfigError, match="got none; choose"):
        qe.variants([], [qe.Budget(n_keep=1)])
    with pytest.raises(ConfigError, match="give n_keep or keep_ratio"):
        qe.variants(["qap"], [])
    for both in ({}, {"n_keep": 1, "keep_ratio": 0.5}):
        with pytest.raises(ConfigError, match="either n_keep or keep_ratio"):
            qe.Budget(**both)  # type: ignore[arg-type]
    assert [v.method for v in qe.variants(["dense"], [])] == ["dense"]


# --- asking -----------------------------------------------------------------------------------------------------------


def test_each_picture_is_encoded_once_and_each_question_asked_in_every_way(questions: list[qe.Question]) -> None:
    model = model_for(questions)
    ticks: list[tuple[int, int]] = []
    methods = [method for method in qe.METHODS if method != "resize"]  # it reads pictures: test_smaller.py
    compared = qe.variants(methods, [qe.Budget(n_keep=18), qe.Budget(n_keep=4)])
    outcomes = qe.evaluate(model, questions, compared, progress=lambda done, total: ticks.append((done, total)))
    assert model.encoded == sorted({q.image for q in questions})
    once = len(methods) - 2  # all but dense, which is asked at no budget, and random, which is asked three times
    assert len(model.asked) == len(questions) * (1 + 2 * (once + 3))
    assert len(outcomes) == len(questions) * (1 + 2 * (once + 1))
    assert ticks == [(i + 1, 12) for i in range(12)]
    shares = {(o.variant.method, o.variant.budget): o.share_right for o in outcomes}
    assert shares["dense", None] == 1
    assert shares["qap", qe.Budget(n_keep=18)] == 1
    assert shares["qap", qe.Budget(n_keep=4)] == 0
    assert shares["random", qe.Budget(n_keep=18)] == pytest.approx(1 / 3)
    assert {o.n_kept for o in outcomes if o.variant.budget == qe.Budget(n_keep=4)} == {4}


def test_the_same_tokens_are_not_asked_about_twice(questions: list[qe.Question]) -> None:
    model = model_for(questions)
    compared = qe.variants(["qap"], [qe.Budget(n_keep=18)], errors=["int4", "q4_0"], alphas=[0.3, 0.7])
    outcomes = qe.evaluate(model, questions, compared)
    assert len(outcomes) == 4 * len(questions)
    assert len(model.asked) == 2 * len(questions)
    first = [text for text, _ in model.asked[:6]]
    assert first == ["00?", "01?", "02?"] * 2  # a variant's questions in a row
    assert [len(o.prefill_s) for o in outcomes] == [1, 0, 0] * 16  # the image was in the KV cache
    assert {o.share_right for o in outcomes} == {1.0}


def test_pictures_that_are_not_in_a_row_are_still_encoded_once(questions: list[qe.Question]) -> None:
    model = model_for(questions)
    qe.evaluate(model, questions[::2] + questions[1::2], qe.variants(["dense"], []))
    assert len(model.encoded) == 4


def test_a_model_without_attention_has_no_semantic_row(questions: list[qe.Question]) -> None:
    model = model_for(questions, attention=None)
    with pytest.raises(UnsupportedError, match="leave that method out"):
        qe.evaluate(model, questions, qe.variants(["dense", "semantic"], [qe.Budget(n_keep=18)]))
    assert model.asked == []
    assert qe.evaluate(model, questions, qe.variants(["numeric"], [qe.Budget(n_keep=18)]))


def test_a_budget_above_the_tokens_keeps_all_and_a_lie_about_them_is_an_error(questions: list[qe.Question]) -> None:
    found = qe.evaluate(model_for(questions), questions, qe.variants(["qap"], [qe.Budget(n_keep=145)]))
    assert {outcome.n_kept for outcome in found} == {144}
    with pytest.raises(NativeError, match="was to keep 18 image tokens, got 17"):
        qe.evaluate(model_for(questions, lies_about_kept=True), questions, qe.variants(["qap"], [qe.Budget(n_keep=18)]))
    with pytest.raises(ConfigError, match="got none"):
        qe.evaluate(model_for([]), [], qe.variants(["dense"], []))


# --- numbers ----------------------------------------------------------------------------------------------------------


def outcome(picture: int, right: bool, method: str = "dense", kind: str = "at") -> qe.Outcome:
    budget = None if method == "dense" else qe.Budget(n_keep=18)
    config = None if budget is None else PruneConfig(n_keep=18)
    question = qe.Question(Path(f"{picture}.png"), "q?", "yes", kind)
    return qe.Outcome(question, qe.Variant(method, budget, (config,)), ("yes" if right else "no",), 18, (0.01,))


def test_summary_counts_by_hand() -> None:
    rows = [outcome(0, True), outcome(0, False, kind="is"), outcome(1, True), outcome(1, True)]
    (summary,) = qe.summarise(rows)
    assert (summary.accuracy.n_right, summary.accuracy.n_total, summary.accuracy.value) == (3, 4, 0.75)
    assert {kind: (a.n_right, a.n_total) for kind, a in summary.by_kind.items()} == {"at": (3, 3), "is": (0, 1)}
    # Two pictures of two questions: a resample has both (1/4 + 1/2 + 1/4 of the cases): 0.5, 0.75 or 1.
    assert (summary.accuracy.low, summary.accuracy.high) == (0.5, 1.0)
    assert summary.by_kind["is"].low is None  # one picture has such a question: no interval
    assert summary.difference is None
    assert summary.prefill_ms == pytest.approx(10)


def test_the_interval_follows_pictures_not_questions() -> None:
    # 40 pictures of 10 questions, all right or all wrong: as uncertain as 40 coins, not as 400.
    rows = [outcome(i, i % 2 == 0) for i in range(40) for _ in range(10)]
    accuracy = qe.summarise(rows)[0].accuracy
    assert accuracy.low is not None
    assert accuracy.high is not None
    half = (accuracy.high - accuracy.low) / 2
    assert half == pytest.approx(1.96 * np.sqrt(0.25 / 40), rel=0.15)


def test_intervals_are_reproducible_and_change_with_the_seed() -> None:
    rows = [outcome(i, i % 3 == 0) for i in range(37) for _ in range(i % 4 + 1)]
    assert qe.summarise(rows, seed=4) == qe.summarise(rows, seed=4)
    assert qe.summarise(rows, seed=4) != qe.summarise(rows, seed=5)


def test_the_difference_to_dense_is_paired() -> None:
    # The same pictures are right in both: however pictures are drawn, the difference is zero.
    rows = [outcome(i, i % 2 == 0, method) for i in range(10) for method in ("dense", "qap")]
    dense, qap = qe.summarise(rows)
    assert dense.difference is None
    assert qap.difference == (0.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40), st.integers(0, 9))
def test_intervals_are_in_range_and_hold_together(rows: list[tuple[int, bool]], seed: int) -> None:
    (summary,) = stats.summarise([outcome(*row) for row in rows], seed=seed, resamples=50)
    accuracy = summary.accuracy
    if accuracy.low is None or accuracy.high is None:
        assert len({picture for picture, _ in rows}) == 1
    else:
        assert 0 <= accuracy.low <= accuracy.high <= 1
    assert accuracy.n_right == sum(right for _, right in rows)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_show_what_was_measured(questions: list[qe.Question]) -> None:
    compared = qe.variants(["dense", "random"], [qe.Budget(n_keep=18)])
    outcomes = qe.evaluate(model_for(questions), questions, compared)
    result = qe.Evaluation(qe.summarise(outcomes), 12, 4)
    header, rows = result.main_table()
    assert dict(zip(header, rows[0], strict=True)) == {
        "method": "dense", "K": "all", "tokens": "144", "right": "12/12", "accuracy %": "100.0",
        "95 % interval": "100.0 to 100.0", "vs dense, points": "-", "prefill ms": "288.0",
    }  # fmt: skip
    assert rows[1][:5] == ("random", "18", "18", "4/12", "33.3")
    assert rows[1][6].startswith("-66.7 (-66.7 to -66.7")
    assert result.csv().splitlines()[0].startswith("model,kv,method,settings,n_keep,")
    assert len(result.csv().splitlines()) == 3
    header, rows = result.kind_table()
    assert header == ("method", "K", "at", "is")
    assert rows[1] == ("random", "18", "33.3 (2.7/8)", "33.3 (1.3/4)")
    assert "bootstrap over pictures" in result.note
    assert "not independent" in result.note
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [r["method"] for r in plain["results"]] == ["dense", "random"]
    assert len(plain["results"][1]["configs"]) == 3


def test_markdown_lines_have_one_width() -> None:
    text = qe.markdown((("method", "K"), [("qap", "18"), ("semantic alone", "12.5 %")]))
    assert len({len(line) for line in text.splitlines()}) == 1
    assert text.splitlines()[-1] == "| semantic alone | 12.5 % |"


def test_one_picture_gives_no_interval() -> None:
    result = qe.Evaluation(qe.summarise([outcome(0, True), outcome(0, True, "qap")]), 1, 1)
    dense, pruned = result.main_table()[1]
    assert (dense[5], pruned[6]) == ("- (one picture)", "+0.0")
    assert json.loads(json.dumps(result.to_dict()))["results"][1]["versus"]["dense"]["low"] is None


@pytest.mark.parametrize("module", [data, methods, report, scoring, stats])
def test_the_examples_in_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_name_is_there() -> None:
    assert all(hasattr(package, name) for name in package.__all__)
