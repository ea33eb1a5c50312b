"""`run` without a question: a conversation, its memory, its commands, and Ctrl-C."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.cli import main, run
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError

Said = pytest.CaptureFixture[str]


def converse(monkeypatch: pytest.MonkeyPatch, text: str, *words: str, terminal: bool = False) -> int:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    return main(["run", "--image", "a.png", *words])


def test_a_conversation_has_a_memory_and_encodes_once(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    fake.says = [["a ", "dog"], ["row 1"]]
    assert converse(monkeypatch, "What?\n\n  Where is it? \n", "--n-keep", "18") == 0
    said = capsys.readouterr()
    assert said.out == "a dog\nrow 1\n"
    assert said.err.count("18 of 144") == 2
    assert fake.only().encoded == [Path("a.png")]
    first, second = fake.only().calls
    assert first["messages"] == [{"role": "user", "content": ["a.png", "What?"]}]
    assert second["messages"] == [
        {"role": "user", "content": ["a.png", "What?"]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "Where is it?"},
    ]
    assert first["prune"] == PruneConfig(n_keep=18)
    assert first["stream"] is True


def test_quit_ends_and_unknown_commands_do_not(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    assert converse(monkeypatch, "/help\n/quit\nWhat?\n") == 0
    assert "unknown command /help" in capsys.readouterr().err
    assert fake.only().calls == []


def test_another_picture_starts_anew_and_a_broken_one_changes_nothing(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    fake.says = [["one"], ["two"], ["three"]]
    script = "A?\n/image broken.png\nB?\n/image\n/image my cat.png\nC?\n"
    assert converse(monkeypatch, script) == 0
    said = capsys.readouterr()
    assert "qap-gguf: error: expected a picture, got broken.png; choose another file; the picture stays" in said.err
    assert "/image needs the path" in said.err
    assert fake.only().encoded == [Path("a.png"), Path("my cat.png")]
    assert [len(call["messages"]) for call in fake.only().calls] == [1, 3, 1]
    assert fake.only().calls[2]["messages"][0]["content"] == ["my cat.png", "C?"]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    fake.says = [["a "], [KeyboardInterrupt()], ["b ", KeyboardInterrupt()], ["c"]]
    assert converse(monkeypatch, "1?\n2?\n3?\n4?\n", terminal=True) == 0
    said = capsys.readouterr()
    assert said.err.count("stopped\n") == 2
    assert said.err.startswith("/image PATH takes another picture")
    texts = [turn["content"] for turn in fake.only().calls[3]["messages"][1:]]
    assert texts == ["a ", "3?", "b ", "4?"]  # the question without a word of answer is gone
    assert said.out == "a \n\nb \nc\n"


def test_ctrl_c_ends_questions_that_come_by_pipe(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.says = [[KeyboardInterrupt()], ["b"]]
    assert converse(monkeypatch, "1?\n2?\n") == 130
    assert len(fake.only().calls) == 1


def test_an_error_does_not_end_the_conversation(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    fake.says = [ConfigError("too long; ask less"), ["fine"]]
    assert converse(monkeypatch, "1?\n2?\n") == 0
    said = capsys.readouterr()
    assert "qap-gguf: error: too long; ask less" in said.err
    assert said.out == "fine\n"
    assert fake.only().calls[1]["messages"] == [{"role": "user", "content": ["a.png", "2?"]}]


def test_ctrl_c_at_the_prompt_ends_with_130(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "read_line", interrupted)
    assert main(["run", "--image", "a.png"]) == 130
    assert fake.only().closed
