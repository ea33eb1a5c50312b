"""Schemas of some kilobytes that make llama.cpp's converter work without end, or end the process, are refused soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from qap_gguf.chat.schemas import schema_grammar
from qap_gguf.chat.tools import read_tools
from qap_gguf.errors import ConfigError

WORK, LEVELS = "less work", "levels in all"


def ref(i: int) -> dict[str, str]:
    return {"$ref": f"#/$defs/a{i}"}


def chain(n: int, link: Callable[[int], Any]) -> dict[str, Any]:
    """n definitions, each made from its number, and a string as the last."""
    return {**ref(0), "$defs": {**{f"a{i}": link(i) for i in range(n)}, f"a{n}": {"type": "string"}}}


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def optional(n: int) -> dict[str, Any]:
    return obj(**{f"p{i}": {"type": "integer"} for i in range(n)})


def types(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": ["object"] * 20, "properties": {"x": schema}}
    return schema


def all_of(schema: dict[str, Any], *parts: Any) -> dict[str, Any]:
    return {"allOf": list(parts), "$defs": {"a0": schema}}


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "references that double": (chain(40, lambda i: {"anyOf": [ref(i + 1)] * 2}), WORK),
    "references in a row": (chain(3000, lambda i: ref(i + 1)), WORK),
    "a long way through references": (chain(3000, lambda i: obj(x=ref(i + 1))), LEVELS),
    "optional properties": (optional(8000), WORK),
    "optional properties, of anything": (obj(**{f"p{i}": True for i in range(15_000)}), WORK),
    "types of types": (types(12), WORK),
    "allOf in allOf": (chain(12, lambda i: obj(x={"allOf": [ref(i + 1)] * 12})), WORK),
    "allOf of much": (all_of(optional(2000) | {"required": []}, *[ref(0)] * 3000), WORK),
    "allOf of alternatives": (all_of(optional(40), {"anyOf": [ref(0)] * 50}), WORK),
    "allOf of itself": (chain(1, lambda _: obj(x={"allOf": [ref(0)]})), "'#/\\$defs/a0' to end somewhere"),
    "allOf of two": (chain(2, lambda i: obj(x={"allOf": [ref(1 - i)]})), "to end somewhere"),
}


@pytest.mark.parametrize(("schema", "words"), BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_soon(schema: dict[str, Any], words: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match=words) as caught:
        schema_grammar(schema)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 5  # without the count: for ever, or the end of the process


LARGE: dict[str, dict[str, Any]] = {
    "optional properties": optional(400),
    "definitions": chain(300, lambda i: obj(x=ref(i + 1))),
    "a tree": chain(1, lambda _: obj(left=ref(0), right=ref(0), value=ref(1))),
    "types": types(3) | {"required": ["x"]},
    "allOf": all_of(optional(30), ref(0), optional(20), {"anyOf": [ref(0), optional(20)]}),
    "nothing but a reference": chain(1, lambda _: ref(1)),
    "anything": {},
}


@pytest.mark.parametrize("schema", LARGE.values(), ids=LARGE.keys())
def test_what_passes_is_converted_soon(schema: dict[str, Any]) -> None:
    started = time.process_time()
    assert "root ::=" in schema_grammar(schema)._grammar
    assert time.process_time() - started < 10


@pytest.mark.parametrize(("n", "parameters"), [(129, {}), (20, optional(250))], ids=["many", "large"])
def test_tools_are_counted_together(n: int, parameters: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": f"t{i}", "parameters": parameters}} for i in range(n)]
    with pytest.raises(ConfigError, match="tools: expected at most 128, with schemas that are little work together"):
        read_tools(None, None, tools, None)
    assert len(read_tools(None, None, tools[:5], None).tools) == 5
