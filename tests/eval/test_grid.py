"""Grids and journals: one encode for each picture, nothing asked twice, nothing of another run taken for ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
import qap_gguf.eval as qe
from qap_gguf.cli import main
from qap_gguf.errors import ConfigError, DataError

Said = pytest.CaptureFixture[str]
ASKED = {"How many objects are there?": "four", "What is in row 1, column 2?": "house"}


@pytest.fixture
def questions() -> list[qe.Question]:
    sample = qap.packaged_model().sample
    return [qe.Question(sample, text, answer) for text, answer in ASKED.items()]


class Counting:
    """A VisionModel that counts."""

    def __init__(self, vlm: qap.VisionModel, counts: dict[str, int]) -> None:
        self._vlm, self._counts = vlm, counts

    def encode(self, image: Any, prune: Any = None) -> Any:
        self._counts["encode"] += 1
        return self._vlm.encode(image, prune)

    def generate(self, parts: Any, **settings: Any) -> Any:
        self._counts["generate"] += 1
        if self._counts["generate"] > self._counts.get("stop", 10**9):
            raise KeyboardInterrupt
        return self._vlm.generate(parts, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)


@pytest.fixture
def counts() -> dict[str, int]:
    return {"encode": 0, "generate": 0, "open": 0}


@pytest.fixture
def opener(counts: dict[str, int]) -> Any:
    @contextlib.contextmanager
    def opened(setup: qe.Setup) -> Iterator[Any]:
        counts["open"] += 1
        files = qap.packaged_model()
        with qap.VisionModel(files.mmproj, files.model, kv=setup.kv or None, n_threads=1) as vlm:
            yield Counting(vlm, counts)

    return opened


SETUPS = [qe.Setup("m", "f16"), qe.Setup("m", "q4_0")]
VARIANTS = qe.variants(["dense", "qap", "random"], [qe.Budget(n_keep=36)])


def test_one_encode_for_each_picture_over_the_whole_grid(
    questions: list[qe.Question], counts: dict[str, int], opener: Any
) -> None:
    ticks: list[tuple[int, int]] = []
    outcomes = qe.evaluate_grid(opener, SETUPS, questions, VARIANTS, progress=lambda *at: ticks.append(at))
    assert counts == {"encode": 1, "generate": 2 * 2 * 5, "open": 2}
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [s.setup for s in qe.summarise(outcomes)] == [SETUPS[0]] * 3 + [SETUPS[1]] * 3
    result = qe.Evaluation(qe.summarise(outcomes), 2, 1)
    header, rows = result.main_table()
    assert header[:3] == ("method", "kv", "K")
    assert [row[1] for row in rows] == ["f16"] * 3 + ["q4_0"] * 3
    with pytest.raises(ConfigError, match="name each once"):
        qe.evaluate_grid(opener, [SETUPS[0]] * 2, questions, VARIANTS)


def test_a_run_goes_on_where_it_was_stopped_and_gives_the_same(
    questions: list[qe.Question], counts: dict[str, int], opener: Any, tmp_path: Path
) -> None:
    plain = qe.evaluate_grid(opener, SETUPS, questions, VARIANTS)
    counts |= {"encode": 0, "generate": 0, "open": 0, "stop": 13}
    with qe.Journal(tmp_path / "j.jsonl", {"data": 1}) as journal, pytest.raises(KeyboardInterrupt):
        qe.evaluate_grid(opener, SETUPS, questions, VARIANTS, journal=journal)
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"model": "m", "kv"')  # a crash in the middle of a line
    counts |= {"encode": 0, "generate": 0, "open": 0, "stop": 10**9}
    with qe.Journal(tmp_path / "j.jsonl", {"data": 1}) as journal:
        assert journal.n_known == 8  # 10 answers are 6 outcomes, then both of dense under the second setup
        again = qe.evaluate_grid(opener, SETUPS, questions, VARIANTS, journal=journal)
    assert counts["generate"] == 20 - 12
    assert counts["open"] == 1
    key = [(o.setup, o.variant, o.question, o.said, o.n_kept) for o in plain]
    assert [(o.setup, o.variant, o.question, o.said, o.n_kept) for o in again] == key
    counts |= {"open": 0}
    with qe.Journal(tmp_path / "j.jsonl", {"data": 1}) as journal:
        assert journal.n_known == 12
        qe.evaluate_grid(opener, SETUPS, questions, VARIANTS, journal=journal)
    assert counts["open"] == 0


def test_a_journal_of_another_run_or_a_damaged_one_is_refused(
    questions: list[qe.Question], opener: Any, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "j.jsonl"
    with qe.Journal(path, {"data": "a", "max_tokens": 3}, {"m": "1"}) as journal:
        qe.evaluate_grid(opener, SETUPS[:1], questions, VARIANTS[:1], journal=journal)
    with pytest.raises(DataError, match="another data; choose another folder, or say --force"):
        qe.Journal(path, {"data": "b", "max_tokens": 3})
    with qe.Journal(path, {"data": "a", "max_tokens": 3}, {"m": "2"}) as journal:  # the model's file was changed
        assert journal.get(SETUPS[0], VARIANTS[0], 0, questions[0]) is None
    with qe.Journal(path, {"data": "a", "max_tokens": 3}, {"m": "1"}) as journal:
        assert journal.get(SETUPS[0], VARIANTS[0], 0, questions[0]) is not None
        assert journal.get(SETUPS[1], VARIANTS[0], 0, questions[0]) is None
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "nonsense", *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="line 2: no answer"):
        qe.Journal(path, {"data": "a", "max_tokens": 3})
    with qe.Journal(path, {"data": "b"}, force=True) as journal:
        assert journal.n_known == 0
    assert len(path.read_text().splitlines()) == 1


def test_a_journal_that_was_cut_anywhere_goes_on(tmp_path: Path) -> None:
    """As a full disk or a killed process leaves it, within a letter of two bytes too."""
    path = tmp_path / "j.jsonl"
    question = qe.Question(qap.packaged_model().sample, "Qu'est-ce ?", "caf\u00e9")
    outcome = qe.Outcome(question, VARIANTS[0], ("caf\u00e9",), 144, (0.5,), SETUPS[0])
    with qe.Journal(path, {"data": "\u00e9"}) as journal:
        for number in range(2):
            journal.add(outcome, number)
    whole = path.read_bytes()
    first, second = (i + 1 for i, byte in enumerate(whole[:-1]) if byte == 10)
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        with qe.Journal(path, {"data": "\u00e9"}) as journal:
            assert journal.n_known == (cut >= second) + (cut == len(whole)), cut
            for number in range(2):
                known = journal.get(SETUPS[0], VARIANTS[0], number, question)
                assert known in (None, outcome)
                if known is None:
                    journal.add(outcome, number)
        assert path.read_bytes() == whole, cut


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x" * 5_000_000)
    other.write_bytes(b"x" * 2_500_000 + b"y" + b"x" * 2_499_999)
    assert qe.fingerprint(one) != qe.fingerprint(other)
    assert qe.fingerprint(one) == qe.fingerprint(one)
    with pytest.raises(DataError, match="check the path"):
        qe.fingerprint(tmp_path / "none")


def test_the_command_writes_tables_and_a_plot_and_goes_on(tmp_path: Path, capsys: Said) -> None:
    pytest.importorskip("matplotlib")
    sample = qap.packaged_model().sample
    rows = [{"image": str(sample), "question": q, "answer": a} for q, a in ASKED.items()]
    rows.append({"image": str(sample), "question": "Is there a dog?", "answer": "no", "kind": "is"})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["eval", str(tmp_path / "q.jsonl"), "--threads", "1", "--out", str(tmp_path / "out"), "--kv", "f16"]
    words += ["--methods", "dense,qap,semantic,pool", "--n-keep", "72", "--n-keep", "18"]
    assert main([*words, "--limit", "2"]) == 0
    assert main([*words, "--kv", "q8_0"]) == 0
    said = capsys.readouterr()
    assert "14 answers are known" in said.err
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "accuracy.png", "journal.jsonl", "results.csv", "results.json", "results.md",
    ]  # fmt: skip
    got = json.loads((out / "results.json").read_text())
    assert len(got["results"]) == 2 * 7
    qap_row = next(row for row in got["results"] if row["method"] == "qap")
    assert set(qap_row["versus"]) == {"dense", "semantic"}
    assert qap_row["yes_no"]["n"] == 1
    assert len((out / "results.csv").read_text().splitlines()) == 15
    assert "| recall % |" in (out / "results.md").read_text()
    from PIL import Image

    with Image.open(out / "accuracy.png") as picture:
        assert picture.size[0] > 800
    assert main([*words, "--max-tokens", "3"]) == 1
    assert "another max_tokens" in capsys.readouterr().err
