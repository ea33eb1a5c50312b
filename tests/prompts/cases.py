"""Conversations of every kind that clients send, in our form and in that of transformers."""

from __future__ import annotations

from typing import Any

IMAGE = object()  # stands for a picture
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a thing up.",
        "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]},
    },
}
_CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "look_up", "arguments": {"thing": "a boat"}}}
_FIRST = {"role": "user", "content": [IMAGE, "What is it?"]}
_ANSWER = {"role": "assistant", "content": ["A boat."]}

CASES: dict[str, list[dict[str, Any]]] = {
    "single turn": [_FIRST],
    "follow-up without a picture": [_FIRST, _ANSWER, {"role": "user", "content": ["Which colour?"]}],
    "system": [{"role": "system", "content": ["Be brief."]}, _FIRST],
    "developer": [{"role": "developer", "content": ["Be brief."]}, _FIRST],
    "tool loop": [
        {"role": "user", "content": ["Look it up."]},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": ["It floats."], "tool_call_id": "a1b2c3d4e", "name": "look_up"},
    ],
    "typed parts": [{"role": "user", "content": ["What is a boat?"]}],
    "two pictures": [{"role": "user", "content": [IMAGE, IMAGE, "Which is larger?"]}],
}


def ours_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As clients of OpenAI send them: a text alone as str, parts as a list."""
    image = {"type": "image_url", "image_url": {"url": "data:,x"}}
    return [{**m, "content": _content(m["content"], image)} for m in messages]


def theirs_of(messages: list[dict[str, Any]], marker: str | None) -> list[dict[str, Any]]:
    """As ``apply_chat_template`` takes them: parts (tool results: str); or texts with a line `marker` for an image."""
    if marker is None:
        image = {"type": "image"}
        return [{**m, "content": (_content if m["role"] == "tool" else _parts)(m["content"], image)} for m in messages]
    texts = [m["content"] and [f"{marker}\n" if part is IMAGE else part for part in m["content"]] for m in messages]
    return [{**m, "content": text and "".join(text)} for m, text in zip(messages, texts, strict=True)]


def _parts(content: list[Any] | None, image: dict[str, Any]) -> Any:
    return content and [image if part is IMAGE else {"type": "text", "text": part} for part in content]


def _content(content: list[Any] | None, image: dict[str, Any]) -> Any:
    return content[0] if content and len(content) == 1 else _parts(content, image)
