"""OpenAI-style messages taken apart: texts, images in the order of the prompt, and the question that is asked.

A content part is a text (str, or ``{"type": "text"}``), an image in one of the forms that clients use
(``{"type": "image_url", "image_url": {"url": ...}}``, the same with a plain str, ``input_image``, ``image``), or an
image as it is (see :mod:`qap_gguf.chat.sources`). All else is refused: a part that is dropped in silence is a wrong
answer later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qap_gguf import _core
from qap_gguf.arguments import is_unicode
from qap_gguf.chat.sources import ChatImage, is_image
from qap_gguf.errors import ConfigError

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image_url", "input_image", "image")
_IMAGE_KEYS = ("image_url", "image", "url", "path")


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        fields: the message without its content: role, name, tool_calls, and what else the template may read.
        parts: texts (str) and images (:class:`ImagePart`) in their order; None where the content is null.
    """

    fields: Mapping[str, Any]
    parts: tuple[str | ImagePart, ...] | None

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


def _part(part: Any) -> str | ImagePart:
    if isinstance(part, str):
        return _check_text(part)
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


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Messages as turns.

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
        content = message.get("content")
        parts: tuple[str | ImagePart, ...] | None
        if content is None:
            parts = None
        elif isinstance(content, (list, tuple)):
            parts = tuple(_part(part) for part in content)
        else:
            parts = (_part(content),)
        turns.append(Turn({key: value for key, value in message.items() if key != "content"}, parts))
    return turns


def images_of(turns: Sequence[Turn]) -> list[ChatImage]:
    """What stands for the images, in the order of the messages."""
    return [part.source for turn in turns for part in turn.parts or () if isinstance(part, ImagePart)]


def question_of(turns: Sequence[Turn]) -> str:
    """The text of the last user message: what signals that look at the prompt compare with."""
    users = [turn for turn in turns if turn.fields["role"] == "user"]
    return users[-1].text.strip() if users else ""
