"""JSON schemas of clients: what they ask for is what comes; what no grammar can bear is refused before it is tried."""

from __future__ import annotations

import json
import time
from typing import Any

import llama_cpp
import pytest

import qap_gguf as qap
from chat.conftest import QUESTION, content, image_url, user
from qap_gguf.chat.schemas import schema_grammar
from qap_gguf.errors import ConfigError


def answer(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str, schema: Any, **settings: Any) -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    messages = user(image_url(uri), QUESTION)
    return content(handler(llama=llama, messages=messages, response_format=form, **settings))


@pytest.mark.parametrize("seed", range(3))
def test_ordinary_schemas(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str, seed: int) -> None:
    def ask(schema: Any) -> Any:
        text = answer(handler, llama, uri, schema, temperature=1.5, seed=seed + 1, max_tokens=100)
        return json.loads(text)

    assert ask({"type": "integer", "minimum": 3, "maximum": 5}) in (3, 4, 5)
    assert ask({"enum": ["\U0001f436"]}) == "\U0001f436"
    assert str(ask({"type": "string", "pattern": "^\\d{3}$"})).isdecimal()
    assert ask({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})["a"] in (True, False)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 255},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 250},
        {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}, "type": "object"}}},
    ],
    ids=["maxLength", "maxItems", "a list of nodes"],
)
def test_schemas_that_repeat(handler: qap.ChatHandler, llama: llama_cpp.Llama, uri: str, schema: Any) -> None:
    assert answer(handler, llama, uri, schema, temperature=0, max_tokens=4)[:1] in ('"', "[", "{")


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD: dict[str, tuple[Any, str]] = {
    "minLength": ({"type": "string", "minLength": 10**9}, "minLength of at most 2000, got 1000000000"),
    "maxLength": ({"type": "string", "maxLength": 10**9}, "maxLength"),
    "minItems": ({"type": "array", "items": {}, "minItems": 10**9}, "minItems"),
    "many": ({"allOf": [{"type": "string", "maxLength": 2000}] * 20}, "together"),
    "negative": ({"type": "string", "minLength": -1}, "minLength"),
    "deep": (nested(70), "levels"),
    "wide": ({"anyOf": [{"const": n} for n in range(20_000)]}, "objects"),
    "a loop": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
    "a loop of two": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
        "leads back to itself",
    ),
    "nowhere": ({"$ref": "#/$defs/a"}, "found none"),
    "elsewhere": ({"$ref": "http:" + "//host/schema"}, "begins with #"),
    "no anchors": ({"type": "string", "pattern": "abc"}, "pattern .*'abc'"),
    "look ahead": ({"type": "string", "pattern": "^(?=a)b$"}, "pattern"),
    "surrogate": ({"enum": ["\ud800"]}, "Unicode"),
    "a list": ([1], "JSON object"),
}


@pytest.mark.parametrize(("schema", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_schema_is_one_line(schema: Any, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=words) as caught:
        schema_grammar(schema)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


def test_the_largest_schema_that_passes_is_converted_soon(llama: llama_cpp.Llama) -> None:
    from qap_gguf.chat.grammars import check_grammar

    properties = {f"p{n}": {"type": "string", "maxLength": 10} for n in range(900)}
    started = time.monotonic()
    check_grammar(llama, schema_grammar({"type": "object", "properties": properties, "required": list(properties)}))
    assert time.monotonic() - started < 60
