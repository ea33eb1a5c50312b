"""After rendering: nothing of the conversation was dropped. A template that does so loses questions without a word.

Templates may trim and re-wrap white space, write a text as a JSON string (tool results in some), and leave the
reasoning of earlier answers out; all else that is missing is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.generation.messages import ImagePart, Turn

_WORD = re.compile(r"[A-Za-z0-9]{3,}")
_REASONING = re.compile(r"<(think|thinking|seed:think)>")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _forms(text: str) -> Iterator[str]:
    """How a text may stand in a prompt, without its white space."""
    yield _squeezed(text)
    for ascii_only in (False, True):
        yield _squeezed(json.dumps(text, ensure_ascii=ascii_only)[1:-1])
        try:
            yield _squeezed(json.dumps(json.loads(text), ensure_ascii=ascii_only))
        except (ValueError, RecursionError):
            continue


class _Rendered:
    def __init__(self, prompt: str) -> None:
        self._prompt, self._squeezed, self._at = prompt, "", 0

    def has(self, text: str) -> bool:
        """Whether a text stands there; mostly it does, after the one that was asked for before."""
        text = text.strip()
        at = self._prompt.find(text, self._at)
        if at >= 0:
            self._at = at
        if at >= 0 or text in self._prompt:
            return True
        self._squeezed = self._squeezed or _squeezed(self._prompt)
        return any(form in self._squeezed for form in _forms(text))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _argument_words(arguments: str) -> set[str]:
    """Words of the texts in a call's arguments; templates quote and escape what stands around them as they like."""
    try:
        texts = list(_leaves(json.loads(arguments)))
    except (ValueError, RecursionError):
        texts = [arguments]
    return {word for text in texts for word in _WORD.findall(text)}


def _without_reasoning(text: str) -> str:
    """An earlier answer without what templates leave out; each closing tag is looked for once, whatever the text.

    Example:
        >>> _without_reasoning("<think>two</think>4 <think>")
        '4 <think>'
        >>> _without_reasoning("two and two</think>4")
        '4'
    """
    kept, at, never_closed = [], 0, set[str]()
    first = _REASONING.match(text)
    if first is None or f"</{first[1]}>" not in text:
        at = text.find("</think>") + len("</think>") if "</think>" in text else 0
    while opening := _REASONING.search(text, at):
        tag = opening[1]
        end = -1 if tag in never_closed else text.find(f"</{tag}>", opening.end())
        if end < 0:
            never_closed.add(tag)
            kept.append(text[at : opening.end()])
            at = opening.end()
        else:
            kept.append(text[at : opening.start()])
            at = end + len(tag) + 3
    return "".join([*kept, text[at:]])


def check_complete(prompt: str, turns: Sequence[Turn]) -> None:
    """Every text, call and image of every turn stands in the prompt.

    Args:
        prompt: the rendered prompt.
        turns: what it was made from.

    Raises:
        ModelFileError: something is missing; names the role.

    Example:
        >>> check_complete("user: hello", [Turn({"role": "user"}, ("hello",))])
        >>> check_complete("assistant:", [Turn({"role": "tool"}, ("22 degrees",))])
        Traceback (most recent call last):
        qap_gguf.errors.ModelFileError: the chat template of this model drops text of role 'tool' ('22 degrees'); \
use a role that it knows, or choose another chat_format
    """
    asked = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts or ())
    found = prompt.count(_core.media_marker())
    if asked != found:
        raise ModelFileError(
            f"the chat template of this model drops images ({found} of {asked} are left); move them to a user "
            "message, or choose another chat_format"
        )
    rendered = _Rendered(prompt)
    for turn in turns:
        texts = [part for part in turn.parts or () if isinstance(part, str)]
        if turn.role == "assistant":
            texts = [_without_reasoning(text) for text in texts]
        for call in turn.tool_calls:
            texts += [call["function"]["name"], *_argument_words(call["function"]["arguments"])]
        lost = next((text for text in texts if text.strip() and not rendered.has(text)), None)
        if lost is not None:
            raise ModelFileError(
                f"the chat template of this model drops text of role {turn.role!r} ({lost.strip()[:40]!r}); "
                "use a role that it knows, or choose another chat_format"
            )
