"""OpenAI-style messages taken apart: texts, images in the order of the prompt, and the question that is asked.

A content part is a text (str, or ``{"type": "text"}``), an image in one of the forms that clients use
(``{"type": "image_url", "image_url": {"url": ...}}``, the same with a plain str, ``input_image``, ``image``), or an
image as it is (see :mod:`qap_gguf.vision.sources`). All else is refused: a part that is dropped in silence is a wrong
answer later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf import _core
from qap_gguf.arguments import is_unicode
from qap_gguf.errors import ConfigError
from qap_gguf.vision.sources import ChatImage, is_image

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image_url", "input_image", "image")
_IMAGE_KEYS = ("image_url", "image", "url", "path")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
#: Fields of a message, beside its content, that llama.cpp's chat code knows; it leaves the others out.
_TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        fields: the message without its content: role, name, tool_calls, tool_call_id, reasoning_content.
        parts: texts (str) and images (:class:`ImagePart`) in their order; None where the content is null.
        is_list: the content came as a list of parts.
    """

    fields: Mapping[str, Any]
    parts: tuple[str | ImagePart, ...] | None
    is_list: bool = False

    @property
    def role(self) -> str:
        """Who says it."""
        return str(self.fields["role"])

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        """The calls of tools, each ``{"type": "function", "function": {"name": ..., "arguments": JSON text}}``."""
        calls: Sequence[Mapping[str, Any]] = self.fields.get("tool_calls") or ()
        return calls

    @property
    def text(self) -> str:
        """All its texts."""
        return "\n".join(part for part in self.parts or () if isinstance(part, str))


@dataclass(frozen=True, eq=False)
class ImagePart:
    """An image of a message.

    Attributes:
        source: what the caller gave.
    """

    source: ChatImage


def _check_text(text: str) -> str:
    if _core.media_marker() in text:
        raise ConfigError(f"messages: expected text without the reserved marker {_core.media_marker()}; take it out")
    if "\x00" in text:
        raise ConfigError("messages: expected text, got a null character in it; take it out")
    if not is_unicode(text):
        raise ConfigError("messages: expected Unicode text, got a lone surrogate; take it out")
    return text


def _check_no_picture(text: str) -> str:
    """A str is text; one that names a picture of this machine was meant as the picture."""
    if len(text) < 1024 and text.lower().endswith(_IMAGE_SUFFIXES) and "\n" not in text:
        try:
            is_file = Path(text).is_file()
        except (OSError, ValueError):
            is_file = False
        if is_file:
            raise ConfigError(
                f"messages: expected text or an image, got a str that names the picture {text!r}; "
                "pass pathlib.Path(...), for a str is text"
            )
    return text


def _image_of(part: Mapping[str, Any]) -> ImagePart:
    value: Any = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(value, Mapping):
        value = value.get("url")
    if not (isinstance(value, str) and value) and not is_image(value):
        raise ConfigError(
            'messages: expected {"type": "image_url", "image_url": {"url": ...}} with a data URI, a path or an image, '
            f"got {str(part)[:80]!r}; see docs/chat.md"
        )
    return ImagePart(value)


def _part(part: Any, look_for_files: bool) -> str | ImagePart:
    if isinstance(part, str):
        return _check_no_picture(_check_text(part)) if look_for_files else _check_text(part)
    if is_image(part):
        return ImagePart(part)
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in _IMAGE_TYPES:
        return _image_of(part)
    if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
        return _check_text(part["text"])
    raise ConfigError(
        f"messages: expected parts of type text or image_url, got {str(kind)[:80]!r}; leave such parts out"
    )


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ConfigError(
            'messages: expected tool_calls of the form {"type": "function", "function": {"name": ..., "arguments": '
            f"...}}}}, got {str(call)[:80]!r}; correct them"
        )
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as err:
            raise ConfigError(f"messages: expected arguments of {name!r} that are JSON; correct them") from err
    out = {"type": "function", "function": {"name": _check_text(name), "arguments": _check_text(arguments or "{}")}}
    return out | ({"id": _check_text(call["id"])} if isinstance(call.get("id"), str) else {})


def _fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields beside the content, older forms (``function_call``, role ``function``) put into today's."""
    role = message["role"]
    fields: dict[str, Any] = {"role": "tool" if role == "function" else _check_text(role)}
    for name in _TEXT_FIELDS:
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise ConfigError(f"messages: expected {name} as text, got {str(message[name])[:80]!r}; correct it")
            fields[name] = _check_text(message[name])
    calls = message.get("tool_calls")
    if calls is None and message.get("function_call") is not None:
        calls = [{"function": message["function_call"]}]
    if calls:
        if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
            raise ConfigError(f"messages: expected tool_calls as a list, got {str(calls)[:80]!r}; correct them")
        fields["tool_calls"] = [_tool_call(call) for call in calls]
    return fields


def read_messages(messages: Sequence[Mapping[str, Any]], *, look_for_files: bool = True) -> list[Turn]:
    """Messages as turns.

    Args:
        messages: OpenAI-style.
        look_for_files: refuse a str among the parts that names a picture of this machine; False for requests from a
            network, which must not learn what files there are.

    Raises:
        ConfigError: no messages, a message or part of another form, or a text that cannot go into a prompt.

    Example:
        >>> turns = read_messages([{"role": "user", "content": [b"...", {"type": "text", "text": "What is it?"}]}])
        >>> turns[0].text, len(turns[0].parts)
        ('What is it?', 2)
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(
            f'messages: expected a list such as [{{"role": "user", "content": "..."}}], got {str(messages)[:80]!r}'
        )
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f'messages: expected {{"role": ..., "content": ...}}, got {str(message)[:80]!r}; name the role'
            )
        content, fields = message.get("content"), _fields(message)
        if content is None and "tool_calls" not in fields and message["role"] != "assistant":
            raise ConfigError(f"messages: expected content in a message of role {message['role']!r}, got none; add it")
        is_list = False
        parts: tuple[str | ImagePart, ...] | None = None
        if isinstance(content, (list, tuple)):
            is_list = True
            parts = tuple(_part(part, look_for_files) for part in content)
        elif content is not None:
            parts = (_part(content, look_for_files=False),)
        turns.append(Turn(fields, parts, is_list))
    return turns


def images_of(turns: Sequence[Turn]) -> list[ChatImage]:
    """What stands for the images, in the order of the messages."""
    return [part.source for turn in turns for part in turn.parts or () if isinstance(part, ImagePart)]


def question_of(turns: Sequence[Turn]) -> str:
    """The text of the last user message: what signals that look at the prompt compare with."""
    users = [turn for turn in turns if turn.role == "user"]
    return users[-1].text.strip() if users else ""
