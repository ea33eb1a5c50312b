"""From messages to the text that the model was trained on, with a marker where each image goes.

The chat template of the GGUF (``tokenizer.chat_template``) is rendered by llama-cpp-python's own formatter. A model
without one gets the form of LLaVA-1.5 (Vicuna): "USER: ... ASSISTANT:".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from qap_gguf import _core
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.language.llama import LanguageModel

ROLES = ("system", "user", "assistant")


def _parts(message: Mapping[str, Any]) -> list[Any]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
        raise ConfigError(
            f'messages: expected {{"role": {"|".join(ROLES)}, "content": ...}}, got {str(message)[:80]}; '
            "see VisionModel.chat"
        )
    content = message["content"]
    return list(content) if isinstance(content, (list, tuple)) else [content]


def flatten(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages with plain text, each image replaced by the marker and a line break; and the images in order.

    Raises:
        ConfigError: no messages, one of another form, or a text that holds the marker.
    """
    if not messages:
        raise ConfigError("messages: expected at least one, got none; add a user message")
    marker = _core.media_marker()
    flat: list[dict[str, str]] = []
    images: list[Any] = []
    for message in messages:
        text = ""
        for part in _parts(message):
            if isinstance(part, str):
                if marker in part:
                    raise ConfigError(f"prompt: expected text without the reserved marker {marker}; take it out")
                try:
                    part.encode()
                except UnicodeEncodeError as err:
                    raise ConfigError("prompt: expected Unicode text, got a lone surrogate; take it out") from err
                text += part
            else:
                text += f"{marker}\n"
                images.append(part)
        flat.append({"role": str(message["role"]), "content": text})
    return flat, images


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message: what signals that look at the prompt compare with."""
    users = [message for message in messages if message["role"] == "user"]
    return " ".join(part for part in _parts(users[-1]) if isinstance(part, str)).strip() if users else ""


def _vicuna(messages: Sequence[Mapping[str, str]]) -> str:
    names = {"user": "USER: ", "assistant": "ASSISTANT: ", "system": ""}
    return "\n".join(names[m["role"]] + m["content"] for m in messages) + "\nASSISTANT:"


@lru_cache(maxsize=8)
def _formatter(template: str, eos: str, bos: str) -> Any:
    """The template, compiled: that takes milliseconds, as long as the prefill of a small model."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)


def _filled(template: Callable[[list[Any]], str], messages: Sequence[Mapping[str, str]]) -> str:
    """The template with the messages in it: as text, or as content parts where the text would be left out.

    The templates of llava-hf's checkpoints read lists of parts only, and pass over a text without a word.
    """
    as_text: list[Any] = [dict(m) for m in messages]
    as_parts: list[Any] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    last = as_text[-1]["content"].strip()
    try:
        prompt = template(as_text)
    except Exception:
        if last in (prompt := template(as_parts)):
            return prompt
        raise
    if last not in prompt and last in (other := template(as_parts)):
        return other
    return prompt


def render(language: LanguageModel, messages: Sequence[Mapping[str, str]]) -> tuple[str, bool]:
    """The prompt, and whether the tokenizer shall add its special tokens (False when the template writes BOS itself).

    Raises:
        ModelFileError: the file's chat template cannot be rendered for these messages.
    """
    template = language.llama.metadata.get("tokenizer.chat_template")
    if not template:
        return _vicuna(messages), True
    bos = language.special_text(language.llama.token_bos())
    eos = language.special_text(language.llama.token_eos())
    try:
        formatter = _formatter(template, eos, bos)
        prompt = _filled(lambda filled: str(formatter(messages=filled).prompt), messages)
    except Exception as err:  # templates come with the file: whatever they raise is about the file
        raise ModelFileError(
            f"the chat template of this model refuses these messages ({' '.join(str(err).split())[:200]}); "
            "check their roles and order"
        ) from err
    return prompt, not (bos and prompt.startswith(bos))
