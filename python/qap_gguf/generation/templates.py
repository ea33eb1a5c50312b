"""From messages to the prompt that a model was trained on, with a marker where each image goes.

The template is the GGUF's own (``tokenizer.chat_template``), one that llama-cpp-python knows by name (those of its
multimodal handlers and its text formats), or one that the caller gives; llama-cpp-python's formatter renders it.

An image is not left to the template, which would write the model's own image token: libmtmd writes that by itself.
As in llama.cpp's server the marker goes into the text of the message. Where it goes there, and which white space
stands beside it, is read off the template: it is asked once to render an image between two words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llama_cpp import llama_chat_format

from qap_gguf import _core
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.generation.messages import ImagePart, Turn

#: Formats with images that llama-cpp-python's server knows by name, and the handler whose template they are.
IMAGE_FORMATS: Final[Mapping[str, str]] = {
    "llava-1-5": "Llava15ChatHandler",
    "llava-1-6": "Llava16ChatHandler",
    "obsidian": "ObsidianChatHandler",
    "moondream": "MoondreamChatHandler",
    "nanollava": "NanoLlavaChatHandler",
    "llama-3-vision-alpha": "Llama3VisionAlphaChatHandler",
    "minicpm-v-2.6": "MiniCPMv26ChatHandler",
    "qwen2.5-vl": "Qwen25VLChatHandler",
}
#: Its formats for text; the image's marker goes in front of the message's text.
TEXT_FORMATS: Final[Mapping[str, str]] = {
    "alpaca": "format_alpaca",
    "chatml": "format_chatml",
    "gemma": "format_gemma",
    "llama-2": "format_llama2",
    "llama-3": "format_llama3",
    "mistral-instruct": "format_mistral_instruct",
    "openchat": "format_openchat",
    "vicuna": "format",
    "zephyr": "format_zephyr",
}
_BEFORE, _AFTER = "word-in-front", "word-behind"


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: with a marker for each image.
        stop: texts that end an answer, beside the model's own end tokens.
        writes_bos: the text begins with the model's BOS, so the tokenizer must not add it.
    """

    text: str
    stop: tuple[str, ...] = ()
    writes_bos: bool = False


@dataclass(frozen=True)
class _Style:
    """How the text of a message with images is written.

    Attributes:
        kind: "url" for templates that print an image's URL, "list" for those that take content parts, else "text".
        lead, trail: white space around an image.
        images_first: all images of a message stand in front of its texts.
    """

    kind: str
    lead: str = ""
    trail: str = "\n"
    images_first: bool = False


class ChatTemplate:
    """A chat template that takes images.

    Args:
        source: Jinja source, or a function of llama-cpp-python that formats text messages.
        bos: text of the model's BOS token, "" where there is none.
        eos: text of its end token.
        urls: the template prints an image's URL where the image goes.
        system: system message for conversations without one.

    Raises:
        ModelFileError: (of the constructor and :meth:`render`) the template is not valid, or refuses the messages.
    """

    def __init__(
        self,
        source: str | Callable[..., Any],
        *,
        bos: str = "",
        eos: str = "",
        urls: bool = False,
        system: str | None = None,
    ) -> None:
        self._bos = bos
        self._system = system
        if isinstance(source, str):
            try:
                self._format: Callable[..., Any] = llama_chat_format.Jinja2ChatFormatter(
                    template=source, eos_token=eos, bos_token=bos
                )
            except Exception as err:  # whatever Jinja raises is about the template
                raise ModelFileError(f"chat template: expected valid Jinja, got an error ({_line(err)})") from err
            self._style = _Style("url", trail="") if urls else self._probe()
        else:
            self._format = source
            self._style = _Style("text")
        self._is_jinja = isinstance(source, str)

    def render(self, turns: Sequence[Turn], **variables: Any) -> Prompt:
        """The prompt of a conversation; `variables` (tools and the like) are the template's."""
        messages = [self._message(turn) for turn in turns]
        if self._system is not None and not any(m["role"] == "system" and m["content"] for m in messages):
            messages.insert(0, {"role": "system", "content": self._system})
        try:
            result = self._format(messages=messages, **variables)
        except Exception as err:  # templates come with the file: whatever they raise is about it and the messages
            raise ModelFileError(
                f"the chat template of this model refuses these messages ({_line(err)}); check their roles and order"
            ) from err
        text = str(result.prompt)
        asked = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts or ())
        found = text.count(_core.media_marker())
        if asked != found:
            raise ModelFileError(
                f"the chat template of this model drops images ({found} of {asked} are left); move them to a user "
                "message, or choose another chat_format"
            )
        stop = () if self._is_jinja or not result.stop else result.stop
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return Prompt(text, stop, bool(self._bos) and text.startswith(self._bos))

    def _message(self, turn: Turn) -> dict[str, Any]:
        message = dict(turn.fields)
        if turn.parts is None:
            return message | {"content": None}
        marker, style = _core.media_marker(), self._style
        has_image = any(isinstance(part, ImagePart) for part in turn.parts)
        # in templates that print URLs a str counts as a list of letters, so that a user's text would come twice
        as_list = style.kind == "url" and (has_image or message["role"] == "user")
        if not has_image and not as_list:
            return message | {"content": turn.text}
        if as_list:
            parts = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": marker}
                for part in turn.parts
            ]
            return message | {"content": parts}
        image = style.lead + marker + style.trail
        pieces = sorted(turn.parts, key=lambda part: isinstance(part, str)) if style.images_first else turn.parts
        text, glue = "", ""
        for part in pieces:
            if isinstance(part, ImagePart):
                text += glue + image if style.kind == "text" else image  # a str template knows no parts: one a line
            else:
                text += glue + part
            glue = "" if isinstance(part, ImagePart) else "\n"
        return message | {"content": [{"type": "text", "text": text}] if style.kind == "list" else text}

    def _probe(self) -> _Style:
        """Ask the template for an image between two words."""
        words = [{"type": "text", "text": _BEFORE}, {"type": "text", "text": _AFTER}]
        plain = self._try(words)
        if plain is None or "'type'" in plain or '"type"' in plain or _BEFORE not in plain or _AFTER not in plain:
            return _Style("text")  # the template joins the content with a str, or prints the list as it is
        for image in ({"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}):
            shown = self._try([words[0], image, words[1]])
            if shown is None or shown == plain:
                continue
            between = (
                shown.partition(_BEFORE)[2]
                .partition(_AFTER)[0]
                .removeprefix(plain.partition(_BEFORE)[2].partition(_AFTER)[0])
            )
            first = not between.strip()
            if first:  # the image went somewhere else: in front of both words, as LLaVA's template does
                between = _difference(plain, shown)
            if between.strip():
                lead = between[: len(between) - len(between.lstrip())]
                return _Style("list", lead, between[len(between.rstrip()) :], first)
        return _Style("list")

    def _try(self, content: list[dict[str, Any]]) -> str | None:
        try:
            return str(self._format(messages=[{"role": "user", "content": content}]).prompt)
        except Exception:  # a template that takes no list may raise anything
            return None


def _difference(short: str, long: str) -> str:
    """What `long` has more than `short`, if it was put in at one place."""
    n_more = len(long) - len(short)
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return long[same : same + n_more] if n_more > 0 else ""


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]


def named_template(name: str, *, bos: str, eos: str) -> ChatTemplate:
    """A template that llama-cpp-python knows by name.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    if name in IMAGE_FORMATS:
        handler = getattr(llama_chat_format, IMAGE_FORMATS[name])
        return ChatTemplate(
            str(handler.CHAT_FORMAT), bos=bos, eos=eos, urls=True, system=handler.DEFAULT_SYSTEM_MESSAGE
        )
    if name in TEXT_FORMATS:
        return ChatTemplate(getattr(llama_chat_format, TEXT_FORMATS[name]), bos=bos, eos=eos)
    known = ", ".join((*IMAGE_FORMATS, *TEXT_FORMATS))
    raise ConfigError(f"chat_format: expected one of {known}, or None for the model's own, got {name!r}")
