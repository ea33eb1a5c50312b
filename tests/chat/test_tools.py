"""Tools: the loop of OpenAI's clients, and calls read out of answers, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import llama_cpp
import pytest

import qap_gguf as qap
from chat.conftest import user
from prompts.published import TEMPLATES
from qap_gguf import _core
from qap_gguf.chat.tool_answers import convert, convert_stream
from qap_gguf.errors import ConfigError
from qap_gguf.generation.chat_formats import ChatFormat
from qap_gguf.generation.chat_template import ChatTemplate
from qap_gguf.generation.messages import read_messages

PARAMETERS = {"type": "object", "properties": {"row": {"enum": [1, 2]}}, "required": ["row"]}
TOOL = {"type": "function", "function": {"name": "place", "description": "Places.", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
LOOP: list[dict[str, Any]] = [
    *user("Place it."),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "place", "arguments": '{"row": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "placed in the corner"},
]
QWEN = TEMPLATES["Qwen2.5-VL"].source


def test_the_loop_of_openai_clients(handler: qap.ChatHandler, llama: llama_cpp.Llama) -> None:
    """``content: null`` and calls, then a tool's result; older clients say the same with ``function_call``."""
    old = [*LOOP]
    old[1] = {"role": "assistant", "content": None, "function_call": LOOP[1]["tool_calls"][0]["function"]}
    old[2] = {"role": "function", "name": "place", "content": "placed in the corner"}
    _, template = handler._prepare(llama)
    for messages in (LOOP, old):
        prompt = template.render(read_messages(messages), tools=[TOOL]).text
        assert '"name": "place"' in prompt
        assert "placed in the corner" in prompt
        answer = handler(llama=llama, messages=messages, tools=[TOOL], max_tokens=2)
        assert isinstance(answer["choices"][0]["message"]["content"], str)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tool_calls": "x"}, "tool_calls"),
        ({"tool_calls": [{"function": {}}]}, "tool_calls"),
        ({"tool_calls": [{"function": {"name": "a", "arguments": {1, 2}}}]}, "arguments"),
        ({"name": 5}, "name"),
        ({"role": "tool"}, "content"),
    ],
    ids=["text", "no name", "no JSON", "a number", "nothing said"],
)
def test_bad_calls_are_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_messages([{"role": "assistant", "content": None, **change}])


def beginning(llama: llama_cpp.Llama, words: str) -> Any:
    """Makes an answer begin with these words: the packaged model has not learnt to call tools."""
    left = llama.tokenize(words.encode(), add_bos=False, special=True)

    def push(_ids: Any, logits: Any) -> Any:
        out = logits.copy()
        if left:
            out[left.pop(0)] = 1e4
        return out

    return llama_cpp.LogitsProcessorList([push])


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "place"}}], ids=["any", "one"]
)
def test_a_template_with_tools_calls_them(packaged: qap.PackagedModel, llama: llama_cpp.Llama, choice: Any) -> None:
    with qap.ChatHandler(packaged.mmproj, chat_template=QWEN) as handler:
        settings: dict[str, Any] = {"tools": [TOOL, OTHER], "tool_choice": choice, "temperature": 0, "max_tokens": 120}
        whole, chunks = (
            handler(
                llama=llama,
                messages=user("Place it."),
                stream=stream,
                logits_processor=beginning(llama, '<tool_call>\n{"name"'),
                **settings,
            )
            for stream in (False, True)
        )
        whole, chunks = whole["choices"][0], list(chunks)
    call, *_ = whole["message"]["tool_calls"]  # this model goes on calling
    assert whole["finish_reason"] in ("tool_calls", "length")
    assert call["function"]["name"] in ("place", "other")
    assert call["function"]["name"] == "place" or choice == "required"
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] != "place" or arguments["row"] in (1, 2)

    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ()) if part["index"] == 0]
    assert deltas[0] == {"role": "assistant"}
    assert parts[0]["id"]
    assert "".join(part["function"].get("name", "") for part in parts) == call["function"]["name"]
    assert json.loads("".join(part["function"].get("arguments", "") for part in parts)) == arguments
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def native() -> _core.ChatPrompt:
    template = ChatTemplate(0, ChatFormat(QWEN), bos="<s>", eos="</s>")
    return template.render(read_messages(user("Place it.")), tools=[TOOL]).native


def completion(text: str, reason: str | None = "stop") -> dict[str, Any]:
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": {}}


CALL = '<tool_call>\n{"name": "place", "arguments": {"row": 2}}\n</tool_call>'


def test_a_free_answer_that_calls_a_tool() -> None:
    prompt = native()
    assert prompt.grammar_lazy
    assert prompt.triggers
    choice = convert(completion("I will. " + CALL), prompt)["choices"][0]
    assert choice["message"]["content"].strip() == "I will."
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"row": 2}
    plain = convert(completion("Just words."), native())["choices"][0]
    assert (plain["message"]["content"], plain["finish_reason"]) == ("Just words.", "stop")


def test_a_stream_of_letters_gives_the_same_call() -> None:
    text = "I will. " + CALL
    pieces = [completion(letter, None) for letter in text] + [completion("")]
    chunks = list(convert_stream(iter(pieces), native()))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "I will."
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert "".join(part["function"].get("name", "") for part in parts) == "place"
    assert json.loads("".join(part["function"].get("arguments", "") for part in parts)) == {"row": 2}
    assert len({part["id"] for part in parts if "id" in part}) == 1


def test_an_answer_that_ends_within_a_call_is_text() -> None:
    choice = convert(completion(CALL[:30], "length"), native())["choices"][0]
    assert choice["finish_reason"] == "length"
