"""From messages to the prompt that a model was trained on, with a marker where each image goes: the one place for it.

llama.cpp's own chat code (``_core.ChatTemplates``, common/chat.h) renders the template: it knows what kind of content
a template reads, maps developer turns to system ones, writes tools and tool results, and takes BOS away where the
tokenizer adds it. As in its server, an image is a marker in the text of its message, because libmtmd writes the model's
image tokens by itself. What is added here:

- the white space beside an image, and whether images stand in front of the text: read off the template, which is asked
  once to render an image between two words. Upstream writes none, but models were trained with it;
- tool calls of earlier turns as JSON text where the template would drop them;
- a check that nothing of the conversation was dropped (:mod:`qap_gguf.generation.prompt_check`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qap_gguf import _core
from qap_gguf.arguments import is_unicode
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.generation.chat_formats import VICUNA, ChatFormat
from qap_gguf.generation.messages import ImagePart, Turn
from qap_gguf.generation.prompt_check import check_complete
from qap_gguf.language.llama import LanguageModel

_BEFORE, _AFTER = "word-in-front", "word-after"
#: Words of a template's error that say where it stands, not what it is.
_NOISE = "Error: "


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: with a marker for each image, without the BOS that the tokenizer adds.
        stop: texts that end an answer, beside the model's own end tokens.
        native: what llama.cpp made of the conversation: grammar, triggers, the parser of the answer.
    """

    text: str
    stop: tuple[str, ...]
    native: _core.ChatPrompt


@dataclass(frozen=True)
class _ImageStyle:
    """White space around an image in a template's prompts, and whether images stand in front of a message's texts."""

    lead: str = ""
    trail: str = "\n"
    images_first: bool = False


class ChatTemplate:
    """A chat template, ready to render.

    Args:
        model: address of the native ``llama_model``, whose template and BOS are used; 0 for a template alone.
        form: a format that takes the place of the model's template.
        bos, eos: texts of these tokens, where there is no model.

    Attributes:
        source: the Jinja source.
        has_tool_calls: the template writes the calls of tools.

    Raises:
        ModelFileError: (of the constructor and :meth:`render`) the template is not valid, takes more time or memory
            than a template may, refuses the messages, or drops a part of them.

    Example:
        >>> from qap_gguf.generation.messages import read_messages
        >>> template = ChatTemplate(0, ChatFormat("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"))
        >>> template.render(read_messages([{"role": "user", "content": [b"...", "What is it?"]}])).text
        'user: <__media__>\\nWhat is it?'
    """

    def __init__(self, model: int, form: ChatFormat | None = None, *, bos: str = "", eos: str = "") -> None:
        self._form = form or ChatFormat()
        if not is_unicode(self._form.source):
            raise ModelFileError("chat template: expected Unicode text, got a lone surrogate; take it out")
        try:
            self._native = _core.ChatTemplates(model, self._form.source, bos, eos)
        except RuntimeError as err:
            raise ModelFileError(f"chat template: expected valid Jinja, got an error ({_reason(err)})") from err
        self.source = self._native.source
        caps = self._native.caps()
        jinja = self._form.kind == "jinja"
        self.has_tool_calls = jinja and caps["supports_tool_calls"]
        self._has_system = caps["supports_system_role"] or self._form.kind == "builtin"
        self._has_strings = caps["supports_string_content"]
        self._style = self._probe() if jinja else _ImageStyle()
        self._is_plain = jinja and self._try_plain()

    def render(
        self,
        turns: Sequence[Turn],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of a conversation.

        Args:
            turns: from :func:`~qap_gguf.generation.messages.read_messages`.
            tools: OpenAI-style; the template tells the model of them.
            tool_choice: "auto", "none", or "required" for a grammar that lets the model only call tools.
            variables: what else the template reads, as JSON values.

        Raises:
            ConfigError: tools or variables that are no JSON.
        """
        turns = self._with_system(turns)
        messages = self._messages(turns)
        try:
            native = self._native.apply(
                _json("messages", messages),
                tools=_json("tools", list(tools)) if tools else "",
                tool_choice=tool_choice,
                variables={key: _json(key, value) for key, value in (variables or {}).items() if value is not None},
                image_type="image_url" if self._form.kind == "urls" else "media_marker",
                jinja=self._form.kind != "builtin",
                pure=self._is_plain and not tools and not any(len(turn.fields) > 1 for turn in turns),
            )
            text = native.text
        except (RuntimeError, UnicodeDecodeError) as err:
            raise ModelFileError(
                f"the chat template of this model refuses these messages ({_reason(err)}); check their roles and order"
            ) from err
        check_complete(text, turns)
        return Prompt(text, tuple(native.stops), native)

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        system = self._form.system
        if system is None or any(t.role in ("system", "developer") and t.text for t in turns):
            return turns
        return (Turn({"role": "system"}, (system,)), *turns)

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        return [self._message(turn) for turn in (turns if self._has_system else _merge_system(turns))]

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """What :meth:`render` hands to llama.cpp's chat code, for a program that has this template too.

        An image is a marker (``_core.media_marker()``) in a text, with the white space that belongs beside it.

        Args:
            turns: from :func:`~qap_gguf.generation.messages.read_messages`.

        Returns:
            OpenAI-style messages; content is a text, None, or a list of ``{"type": ..., "text": ...}``.
        """
        return self._messages(self._with_system(turns))

    def _message(self, turn: Turn) -> dict[str, Any]:
        out = dict(turn.fields)
        if self._form.kind == "builtin" and out["role"] == "developer":
            out["role"] = "system"  # as upstream does for Jinja
        parts = list(turn.parts or ())
        if turn.tool_calls and not self.has_tool_calls:
            parts.append(_calls_as_text(out.pop("tool_calls")))
        if not parts:
            return out | {"content": None if "tool_calls" in out else ""}
        if self._form.kind == "urls" and out["role"] == "user":
            return out | {"content": [_typed(part, _core.media_marker()) for part in parts]}
        has_image = any(isinstance(part, ImagePart) for part in parts)
        as_list = turn.is_list and self._form.kind == "jinja" and (len(parts) > 1 or not self._has_strings)
        if not has_image and not as_list:
            return out | {"content": "\n".join(map(str, parts))}
        style = self._style
        if style.images_first:
            parts.sort(key=lambda part: isinstance(part, str))
        marker = f"{style.lead}{_core.media_marker()}{style.trail}"
        if self._form.kind != "jinja":
            return out | {"content": _joined(parts, marker)}
        return out | {"content": [_typed(part, marker) for part in parts]}

    def _probe(self) -> _ImageStyle:
        """Ask the template for an image between two words."""
        words = [{"type": "text", "text": word} for word in (_BEFORE, _AFTER)]
        plain = self._try(words, "image")
        if plain is None or _BEFORE not in plain or _AFTER not in plain:
            return _ImageStyle()  # the template takes no parts
        image = {"type": "media_marker", "text": ""}
        for kind in ("image", "image_url"):
            shown = self._try([words[0], image, words[1]], kind)
            if shown is None or shown == plain or f"'{kind}'" in shown or f'"{kind}"' in shown:
                continue  # not read, or the list was printed as it is
            between = _between(shown).removeprefix(_between(plain))
            first = not between.strip()
            if first:  # the image went somewhere else: in front of both words, as LLaVA's template does
                between = _difference(plain, shown)
            if between.strip():
                lead = between[: len(between) - len(between.lstrip())]
                return _ImageStyle(lead, between[len(between.rstrip()) :], first)
        return _ImageStyle()

    def _try_plain(self) -> bool:
        """Whether upstream's analysis of the template, which takes longer than rendering, changes nothing for text."""
        roles = ("system", "user", "assistant", "user")
        messages = json.dumps([{"role": role, "content": f"word {n}"} for n, role in enumerate(roles)])
        try:
            whole, pure = (self._native.apply(messages, pure=pure) for pure in (False, True))
            return whole.text == pure.text and not whole.stops
        except (RuntimeError, UnicodeDecodeError):
            return False

    def _try(self, content: list[dict[str, str]], kind: str) -> str | None:
        try:
            message = json.dumps([{"role": "user", "content": content}])
            return self._native.apply(message, image_type=kind).text
        except (RuntimeError, UnicodeDecodeError):  # a template that takes no list may raise anything
            return None


def open_template(language: LanguageModel, mmproj: str, form: ChatFormat | None = None) -> ChatTemplate:
    """The template of a pair of files: `form`, else the language model's own, else what its kind was trained on.

    Without a template a LLaVA with an MLP projector gets Vicuna's form with its system text; others ChatML, as from
    llama.cpp.

    Args:
        language: the language model.
        mmproj: path of the mmproj file.
        form: a format that takes the place of the model's template.
    """
    return ChatTemplate(language.model_address, form or fallback_form(language.llama.metadata, mmproj))


def fallback_form(metadata: Mapping[str, str], mmproj: str) -> ChatFormat | None:
    """The form of a pair of files without a template; None where the language model's `metadata` has one."""
    if metadata.get("tokenizer.chat_template"):
        return None
    projector = read_gguf(mmproj).metadata.get("clip.projector_type")
    return VICUNA if projector == "mlp" else ChatFormat("chatml")


def _json(name: str, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as err:
        raise ConfigError(f"{name}: expected what JSON can hold, got other values ({err}); check it") from err
    if not is_unicode(text):
        raise ConfigError(f"{name}: expected Unicode text, got a lone surrogate; take it out")
    return text


def _typed(part: str | ImagePart, marker: str) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "media_marker", "text": marker}


def _joined(parts: Sequence[str | ImagePart], marker: str) -> str:
    """As upstream joins them: a line break between two texts, none beside an image."""
    text, after_text = "", False
    for part in parts:
        text += marker if isinstance(part, ImagePart) else ("\n" if after_text else "") + part
        after_text = isinstance(part, str)
    return text


def _merge_system(turns: Sequence[Turn]) -> Sequence[Turn]:
    """A system message at the beginning becomes part of the next one, as upstream does it, but with its images kept."""
    if len(turns) < 2 or turns[0].role not in ("system", "developer") or not turns[0].parts:
        return turns
    first, second, *rest = turns
    parts = list(second.parts or ())
    if parts and isinstance(parts[0], str):
        parts[0] = f"{first.text}\n{parts[0]}"
    else:
        parts.insert(0, f"{first.text}\n")
    return (Turn(second.fields, tuple(parts), second.is_list), *rest)


def _calls_as_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """The calls of tools of an earlier answer, for templates that would drop them."""
    functions = [call["function"] for call in calls]
    plain = [{"name": function["name"], "arguments": _parsed(function["arguments"])} for function in functions]
    return _json("tool_calls", {"tool_calls": plain})


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _between(prompt: str) -> str:
    return prompt.partition(_BEFORE)[2].partition(_AFTER)[0]


def _difference(short: str, long: str) -> str:
    """What `long` has more than `short`, if it was put in at one place."""
    n_more = len(long) - len(short)
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return long[same : same + n_more] if n_more > 0 else ""


def _reason(err: BaseException) -> str:
    """An engine's message without the place in the source that it quotes."""
    return " ".join(str(err).rpartition(_NOISE)[2].split())[:200]
