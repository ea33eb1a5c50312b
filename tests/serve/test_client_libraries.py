"""The clients that people use: openai's helpers, structured outputs and tool loop; litellm; langchain-openai.

litellm and langchain-openai are not in the extra `test` (they bring some hundred megabytes); CONTRIBUTING.md says how
to run their tests. All of this goes through the base URL of a server alone.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from serve.conftest import URI, Served, ask
from serve.test_requests import client

WEATHER = {
    "type": "function",
    "function": {
        "name": "count_in_stock",
        "description": "How many of a thing the shop has.",
        "parameters": {
            "type": "object",
            "properties": {"thing": {"enum": ["house", "tree"]}},
            "required": ["thing"],
            "additionalProperties": False,
        },
    },
}

#: JSON schema of a whole answer -> does the parsed answer keep to it?
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "maxLength": ({"type": "string", "maxLength": 255}, lambda v: isinstance(v, str) and len(v) <= 255),
    "maxItems": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 250}, lambda v: 2 <= len(v) <= 250
    ),
    "range": ({"type": "integer", "minimum": 3, "maximum": 5}, lambda v: v in (3, 4, 5)),
    "emoji": ({"enum": ["\U0001f436", "\U0001f3e0"]}, lambda v: v in ("\U0001f436", "\U0001f3e0")),
    "digits": ({"type": "string", "pattern": "^\\d{3}$"}, lambda v: re.fullmatch(r"[0-9]{3}", v)),
    "words": ({"type": "string", "pattern": "^\\w{2}-[a-c]$"}, lambda v: re.fullmatch(r"[A-Za-z0-9_]{2}-[abc]", v)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_structured_outputs(server: Served, name: str) -> None:
    """An answer that was not cut short is what the schema says."""
    schema, keeps = SCHEMAS[name]
    whole = {"type": "object", "properties": {"value": schema}, "required": ["value"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": whole, "strict": True}}
    finished = 0
    with client(server) as api:
        for seed in range(6):
            made = api.chat.completions.create(
                model="m", **ask(URI, response_format=form, max_tokens=200, seed=seed, temperature=0.3 * seed)
            )
            text = made.choices[0].message.content
            if made.choices[0].finish_reason != "stop":
                continue
            assert keeps(json.loads(text)["value"]), text
            finished += 1
    assert finished > 0 or name in ("maxLength", "maxItems")


def test_a_schema_that_cannot_be_is_refused(server: Served) -> None:
    openai = pytest.importorskip("openai")
    for schema, words in (
        ({"type": "string", "minLength": 10**9}, "minLength"),
        ({"type": "array", "items": {}, "minItems": 10**9}, "minItems"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "pattern"),
    ):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        with client(server) as api, pytest.raises(openai.BadRequestError, match=words):
            api.chat.completions.create(model="m", **ask(URI, response_format=form))


def test_the_tool_loop(server: Served) -> None:
    """The client's own message objects go back as they came: content null, calls with ids, then the tool's turn."""
    with client(server) as api:
        messages: list[Any] = ask(URI)["messages"]
        first = api.chat.completions.create(
            model="m", messages=messages, tools=[WEATHER], temperature=0, max_tokens=60,
            tool_choice={"type": "function", "function": {"name": "count_in_stock"}},
        )  # fmt: skip
        assert first.choices[0].finish_reason == "tool_calls"
        (call,) = first.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["thing"] in ("house", "tree")
        messages.append(first.choices[0].message)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "12"})
        last = api.chat.completions.create(model="m", messages=messages, tools=[WEATHER], max_tokens=4, temperature=0)
        assert last.choices[0].finish_reason in ("stop", "length", "tool_calls")
        plain = [message.to_dict() if hasattr(message, "to_dict") else message for message in messages]
        plain[1]["content"] = None
        assert api.chat.completions.create(model="m", messages=plain, max_tokens=2, temperature=0).choices


def test_the_streaming_helper(server: Served) -> None:
    """Its events add up to its final completion, usage included."""
    with (
        client(server) as api,
        api.chat.completions.stream(model="m", stream_options={"include_usage": True}, **ask(URI)) as stream,
    ):
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == "house"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.total_tokens == final.usage.prompt_tokens + final.usage.completion_tokens > 0


@pytest.mark.filterwarnings("ignore")  # its own, of pydantic and of its price list
def test_litellm(server: Served) -> None:
    litellm = pytest.importorskip("litellm", reason="not in the extra test; pip install litellm")
    common = {"model": "openai/m", "api_base": server.url + "/v1", "api_key": "none", **ask(URI)}
    whole = litellm.completion(**common)
    assert whole.choices[0].message.content == "house"
    assert whole.usage.prompt_tokens > 72
    pieces = litellm.completion(stream=True, stream_options={"include_usage": True}, **common)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "house"


def test_langchain_openai(server: Served) -> None:
    library = pytest.importorskip("langchain_openai", reason="not in the extra test; pip install langchain-openai")
    model = library.ChatOpenAI(
        model="m", base_url=server.url + "/v1", api_key="none", temperature=0, max_tokens=4, max_retries=0
    )
    messages = [("user", ask(URI)["messages"][0]["content"])]
    answer = model.invoke(messages)
    assert answer.content == "house"
    assert answer.usage_metadata["input_tokens"] > 72
    assert "".join(piece.content for piece in model.stream(messages)) == "house"
