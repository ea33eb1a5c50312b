"""Chat formats by name: those of llama-cpp-python, and those that llama.cpp has built in.

A GGUF file mostly brings its own template. A name is for files that have none or a wrong one. llama-cpp-python's image
handlers have Jinja templates that print an image's URL; llama.cpp's chat code has no URLs, so the place that reads one
is made to read the marker (:data:`_URL`). Its formats for text are llama.cpp's own under other names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import llama_cpp
from llama_cpp import llama_chat_format

from qap_gguf.errors import ConfigError

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
#: llama-cpp-python's names for text formats that llama.cpp has built in under its own.
TEXT_FORMATS: Final[Mapping[str, str]] = {
    "chatml": "chatml",
    "gemma": "gemma",
    "llama-2": "llama2",
    "llama-3": "llama3",
    "mistral-instruct": "mistral-v1",
    "openchat": "openchat",
    "vicuna": "vicuna",
    "zephyr": "zephyr",
}
#: Where those templates read a URL, and where they take a text for a list, which llama.cpp's Jinja does not.
_URL = (("content.image_url", "content.text"), (" is iterable", " is not string"))
#: LLaVA-1.5's own form (Vicuna v1), for files of such models without a template.
_VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatFormat:
    """A form of prompts.

    Attributes:
        source: Jinja, or the name of a format that llama.cpp has built in; "" is the template of the model's file.
        kind: "jinja"; "builtin" for such a name; "urls" for Jinja that takes images as URLs.
        system: system message of conversations without one.
    """

    source: str = ""
    kind: Literal["jinja", "builtin", "urls"] = "jinja"
    system: str | None = None


#: What a LLaVA with an MLP projector gets if its file has no template; others get ChatML, as from llama.cpp.
VICUNA: Final = ChatFormat(_VICUNA, system=_VICUNA_SYSTEM)


def builtin_formats() -> tuple[str, ...]:
    """Names of the formats that llama.cpp has built in.

    Example:
        >>> "chatml" in builtin_formats()
        True
    """
    count = llama_cpp.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    llama_cpp.llama_chat_builtin_templates(names, count)
    return tuple((name or b"").decode() for name in names)


def named_format(name: str) -> ChatFormat:
    """A format by its name.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.

    Example:
        >>> named_format("llama-2").source
        'llama2'
    """
    if name in IMAGE_FORMATS:
        handler = getattr(llama_chat_format, IMAGE_FORMATS[name])
        source = str(handler.CHAT_FORMAT)
        for there, here in _URL:
            source = source.replace(there, here)
        return ChatFormat(source, "urls", handler.DEFAULT_SYSTEM_MESSAGE)
    if name == "alpaca":
        return ChatFormat(_ALPACA)
    builtin = TEXT_FORMATS.get(name, name)
    if builtin in builtin_formats():
        return ChatFormat(builtin, "builtin")
    known = ", ".join(dict.fromkeys((*IMAGE_FORMATS, "alpaca", *TEXT_FORMATS, *builtin_formats())))
    raise ConfigError(f"chat_format: expected one of {known}, or None for the model's own, got {name!r}")
