"""What a row asks: its keys, the defaults, what is wrong with it, and OpenAI's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qap_gguf.batch.results import BatchResult, answered, failed
from qap_gguf.batch.rows import Defaults, Given, Row, read_row

ALL = Defaults("What?", None, {"max_tokens": 5, "temperature": 0.0})


def test_a_row_over_the_defaults() -> None:
    row = read_row({"image": Path("a.png"), "prompt": "Where?", "system": "Be brief.", "max_tokens": 9}, 3, ALL)
    assert (row.id, row.name, row.images) == ("3", "a.png", (Path("a.png"),))
    assert row.body["max_tokens"] == 9
    assert row.body["temperature"] == 0.0
    system, user = row.body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"][-1] == {"type": "text", "text": "Where?"}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]


@pytest.mark.parametrize(
    ("given", "prune"),
    [
        ({}, None),
        ({"n_keep": 36.0, "select": "dpp"}, {"n_keep": 36, "select": "dpp"}),
        ({"n_keep": np.int64(5)}, {"n_keep": 5}),
        ({"n_keep": float("nan"), "keep_ratio": 0.5}, {"keep_ratio": 0.5}),
        ({"prune": {"alpha": 0.5}, "n_keep": 5}, {"alpha": 0.5, "n_keep": 5}),
        ({"dense": True}, False),
        ({"prune": False}, False),
        ({"dense": False}, None),
    ],
)
def test_settings_of_the_pruning(given: dict[str, Any], prune: Any) -> None:
    row = read_row({"image": "a.png", **given}, 1, ALL)
    assert row.error is None
    assert row.body.get("prune") == prune


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"image": None}, "image: expected a picture, got none"),
        ({"image": 5}, "image: expected a path, bytes or an array, got int"),
        ({"image": "a", "prompt": "  "}, "prompt: expected a question"),
        ({"image": "a", "max_token": 3}, "expected known keys, got 'max_token'"),
        ({"image": "a", "dense": True, "n_keep": 3}, "dense: expected no settings"),
        ({"image": "a", "prune": 3, "n_keep": 3}, "prune: expected an object beside n_keep"),
        ({"image": "a", "id": 1.5}, "id: expected a text or a whole number in row 7"),
        (Given({}, error="line 3: expected a JSON object"), "line 3"),
        (Given({"image": "a.png"}, is_openai=True), "row 7: expected custom_id and body"),
    ],
)
def test_a_row_that_cannot_be_asked(given: Any, why: str) -> None:
    row = read_row(given, 7, ALL)
    assert row.error is not None
    assert why in row.error
    assert "\n" not in row.error
    assert row.id


def test_a_question_for_every_row_or_none() -> None:
    assert read_row({"image": "a"}, 1, Defaults()).error is not None
    assert read_row("a", 1, ALL).error is None
    assert read_row(Path("b/a"), 1, ALL).id == "b/a"


def test_pictures_beside_their_table() -> None:
    table = Path("folder")
    assert read_row(Given({"image": "a.png"}, table), 1, ALL).images == (table / "a.png",)
    assert read_row(Given({"image": "a.png"}, table), 1, ALL).name == "a.png"
    assert read_row(Given({"image": ["a.png", "data:,"]}, table), 1, ALL).images == (table / "a.png", "data:,")
    hugging = {"image": {"bytes": b"xyz", "path": "a.png"}}
    assert read_row(Given(hugging, table), 1, ALL).images == (b"xyz",)
    assert read_row(Given({"image": {"bytes": None, "path": "a.png"}}, table), 1, ALL).images == (table / "a.png",)


def openai(**change: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": None}
    return {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body, **change}


def test_rows_of_openai() -> None:
    row = read_row(openai(), 1, ALL)
    assert (row.id, row.error) == ("r-1", None)
    assert row.body["stream"] is False
    assert "n" not in row.body
    assert "max_tokens" not in row.body
    changes: tuple[dict[str, Any], ...] = (
        {"method": "GET"},
        {"url": "/v1/embeddings"},
        {"body": []},
        {"custom_id": {}},
    )
    for change in changes:
        assert read_row(openai(**change), 1, ALL).error


def test_results_in_openais_form() -> None:
    row = Row("r-1")
    whole = {"choices": [{"message": {"content": "Yes"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    found = json.loads(answered(row, 200, json.dumps(whole).encode()).to_line(is_openai=True))
    assert (found["custom_id"], found["error"], found["response"]["status_code"]) == ("r-1", None, 200)
    assert found["response"]["body"] == whole
    found = failed(row, "messages: expected\na list").to_openai()
    assert (found["error"], found["response"]["status_code"]) == (None, 400)
    assert found["response"]["body"]["error"]["message"] == "messages: expected a list"
    found = failed(row, "gone", 500).to_openai()
    assert (found["response"], found["error"]) == (None, {"code": "server_error", "message": "gone"})


def test_an_error_of_llama_server() -> None:
    found = answered(Row("1"), 400, b'{"error": {"code": 400, "message": "too long", "type": "x"}}')
    assert (found.error, found.answer) == ("too long", None)
    assert set(found.to_dict()) == {"id", "image", "error"}
    assert set(BatchResult("1", answer="").to_dict()) >= {"answer", "kept", "encode_s"}
