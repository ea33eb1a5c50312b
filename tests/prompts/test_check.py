"""What the check after rendering takes for kept, and what for dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.generation.messages import read_messages
from qap_gguf.generation.prompt_check import check_complete

HARD = 'say "yes"\nor \\no to Zürich'


def turns(role: str, content: Any, **fields: Any) -> Any:
    return read_messages([{"role": role, "content": content, **fields}])


@pytest.mark.parametrize(
    "prompt",
    [HARD, HARD.replace("\n", " "), json.dumps(HARD), json.dumps(HARD, ensure_ascii=False), "x " + HARD + "\n"],
    ids=["as it is", "wrapped", "JSON", "JSON, no ASCII", "amid others"],
)
def test_kept(prompt: str) -> None:
    check_complete(f"tool: {prompt}", turns("tool", f"  {HARD} \n"))


def test_json_that_was_written_anew_is_kept() -> None:
    check_complete('{"output": {"b": 1, "a": "x"}}', turns("tool", '{"b":1,\n "a":"x"}'))


def test_order_does_not_matter_and_repetition_neither() -> None:
    messages = [{"role": "user", "content": text} for text in ("one", "two", "one", "three", "two")]
    check_complete("three two one", read_messages(messages))


def test_reasoning_of_earlier_answers_may_go() -> None:
    check_complete("assistant: 4", turns("assistant", "<think>two and two</think>4"))
    with pytest.raises(ModelFileError, match="role 'assistant'"):
        check_complete("assistant: 5", turns("assistant", "<think>two and two</think>4"))


def test_calls() -> None:
    arguments = json.dumps({"city": "São 'Paulo'", "nested": {"list": ["deep one"]}})
    call = {"function": {"name": "look_up", "arguments": arguments}}
    messages = turns("assistant", None, tool_calls=[call])
    check_complete("<call>look_up(city='São \\'Paulo\\'', nested={'list': ['deep one']})", messages)
    for prompt in ("look_up()", "city Paulo deep one"):
        with pytest.raises(ModelFileError, match="role 'assistant'"):
            check_complete(prompt, messages)


def test_images_are_counted() -> None:
    marker = _core.media_marker()
    messages = turns("user", [b"a", b"b"])
    check_complete(f"{marker} {marker}", messages)
    for n in (0, 1, 3):
        with pytest.raises(ModelFileError, match=f"{n} of 2"):
            check_complete(marker * n, messages)
