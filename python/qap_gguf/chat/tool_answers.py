"""Calls of tools out of an answer's text, in the shape of OpenAI's API: llama.cpp's parser reads them.

Whole completions and streams are those of ``Llama.create_completion``. A stream's chunks carry what the parser has
found since the last one; as llama.cpp's server does it, the text so far is parsed again at each.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import llama_cpp
from llama_cpp import llama_chat_format

from qap_gguf import _core


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def convert(completion: Any, native: _core.ChatPrompt) -> dict[str, Any]:
    """A whole chat completion.

    Args:
        completion: what ``Llama.create_completion`` returned.
        native: the prompt that it answers.
    """
    plain: Any = llama_chat_format._convert_completion_to_chat(completion, stream=False)
    out: dict[str, Any] = dict(plain)
    choice = out["choices"][0]
    try:
        message = json.loads(native.parse(choice["message"]["content"] or "", False))
    except (RuntimeError, ValueError):  # the answer ended in the middle of a call, or is no call at all: text
        return out
    calls = message.get("tool_calls")
    if calls:
        choice["message"] = {"role": "assistant", "content": message.get("content") or None}
        choice["message"]["tool_calls"] = [{**call, "id": call.get("id") or _new_id()} for call in calls]
        if choice["finish_reason"] == "stop":
            choice["finish_reason"] = "tool_calls"
    return out


def convert_stream(chunks: Iterator[Any], native: _core.ChatPrompt) -> Iterator[dict[str, Any]]:
    """The chunks of a chat completion; see :func:`convert`."""
    text, first = "", True
    ids: dict[int, str] = {}
    for chunk in chunks:
        choice = chunk["choices"][0]
        base = {"id": f"chat{chunk['id']}", "model": chunk["model"], "created": chunk["created"]}
        base["object"] = "chat.completion.chunk"

        def made(delta: dict[str, Any], reason: str | None = None, base: dict[str, Any] = base) -> dict[str, Any]:
            choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
            return {**base, "choices": choices}

        if first:
            first = False
            yield made({"role": "assistant"})
        text += choice["text"]
        reason = choice["finish_reason"]
        for delta in _advance(native, text, reason is None, ids):
            yield made(delta)
        if reason is not None:
            yield made({}, "tool_calls" if ids and reason == "stop" else reason)


def _advance(native: _core.ChatPrompt, text: str, is_partial: bool, ids: dict[int, str]) -> list[dict[str, Any]]:
    try:
        diffs = native.advance(text, is_partial)
    except RuntimeError:  # cannot be read (yet)
        return []
    deltas: list[dict[str, Any]] = []
    for content, index, call_id, name, arguments in diffs:
        if content:
            deltas.append({"content": content})
        if index < 0:
            continue
        call: dict[str, Any] = {"index": index}
        if index not in ids:
            ids[index] = call_id or _new_id()
            call |= {"id": ids[index], "type": "function"}
        function = {"name": name, "arguments": arguments}
        deltas.append({"tool_calls": [{**call, "function": {k: v for k, v in function.items() if v or k != "name"}}]})
    return deltas


def special_as_text(llama: llama_cpp.Llama, texts: Sequence[str]) -> Callable[[], AbstractContextManager[None]]:
    """A block in which the special tokens that mark calls come out as text, so that the parser sees them."""
    kept: set[int] = set()
    for text in texts:
        tokens = llama.tokenize(text.encode(), add_bos=False, special=True)
        kept |= set(tokens) if len(tokens) == 1 else set()
    if not kept:
        return contextlib.nullcontext

    @contextlib.contextmanager
    def shown() -> Iterator[None]:
        plain, patched = llama.detokenize, llama

        def detokenize(tokens: Any, prev_tokens: Any = None, special: bool = False) -> bytes:
            return plain(tokens, prev_tokens, special or bool(kept.intersection(tokens)))

        patched.detokenize = detokenize  # type: ignore[method-assign]
        try:
            yield
        finally:
            del patched.detokenize

    return shown
