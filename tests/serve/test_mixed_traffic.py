"""A good client among hostile ones (tools/fuzz/crowd.py), for some seconds: it gets its answers, they get a reason."""

from __future__ import annotations

import itertools

import pytest

from serve.conftest import find_program_or_skip

crowd = pytest.importorskip("crowd", reason="needs the installed package", exc_type=ImportError)
import bombs  # noqa: E402


def test_some_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Times are not judged: tests run on busy machines."""
    find_program_or_skip()
    status = crowd.run(minutes=0.08, rate=12.0, n_held=30, factor=0.0, seed=1, threads=1)
    shown = capsys.readouterr()
    assert status == 0, shown
    assert all(f"| {kind} |" in shown.out for kind in bombs.HELD), shown.out
    assert sum(f"| {kind} |" in shown.out for kind in bombs.REQUESTS) > len(bombs.REQUESTS) // 2, shown.out
    assert "0 restarts" in shown.out


def test_harm_is_seen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb that is answered, and an answer that changes, are told."""
    find_program_or_skip()
    monkeypatch.setattr(bombs, "REQUESTS", {"no bombs": [bombs.Request(bombs.ask(max_tokens=1))]})
    monkeypatch.setattr(crowd, "QUESTIONS", crowd.QUESTIONS[:1])
    numbers = itertools.count()
    monkeypatch.setattr(crowd, "answer", lambda *_words: (str(next(numbers)), 0.1))
    assert crowd.run(minutes=0.02, rate=20.0, n_held=0, factor=0.0, seed=1, threads=1) == 1
    shown = capsys.readouterr()
    assert "crowd: no bombs: 200" in shown.err
    assert "expected '0', got '2'" in shown.err  # 0 and 1 warm up
