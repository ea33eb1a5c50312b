"""Calls of a tool for models whose chat template writes no tools.

llama-server leaves tools out there. A tool that must be called is asked for through the JSON schema of its arguments,
as in llama-cpp-python's handlers, and the answer becomes the call here.
"""

from __future__ import annotations

import secrets
from typing import Any


class ForcedCall:
    """Turns one answer, or the chunks of one, into the call of a tool.

    Args:
        name: the tool's.

    Example:
        >>> answer = {"choices": [{"message": {"role": "assistant", "content": "{}"}, "finish_reason": "stop"}]}
        >>> ForcedCall("look")(answer)["choices"][0]["message"]["tool_calls"][0]["function"]
        {'name': 'look', 'arguments': '{}'}
    """

    def __init__(self, name: str) -> None:
        self._name, self._id, self._begun = name, f"call_{secrets.token_hex(8)}", False

    def __call__(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer or chunk, changed in place."""
        for choice in answer.get("choices", ()):
            for part in ("message", "delta"):
                if part in choice:
                    self._change(choice[part], part == "delta")
            if choice.get("finish_reason") == "stop":
                choice["finish_reason"] = "tool_calls"
        return answer

    def _change(self, message: dict[str, Any], is_delta: bool) -> None:
        text = message.pop("content", None)
        if text is None and is_delta:
            if "role" in message:
                message["content"] = None
            return
        call: dict[str, Any] = {"function": {"arguments": text or ""}}
        if not self._begun:
            self._begun = True
            call = {"id": self._id, "type": "function", "function": {"name": self._name, "arguments": text or ""}}
        if is_delta:
            call["index"] = 0
        else:
            message["content"] = None
        message["tool_calls"] = [call]
