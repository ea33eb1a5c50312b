"""From a client's request to llama-server's: read, checked, pictures decoded.

What llama-server does only after long work, or not at all, is looked at here: whether a text can fit the context,
whether its chat template takes the messages (rendered here within the budget for templates), whether grammars and
schemas stay within bounds, where pictures come from. Pictures arrive there as PNG in data URIs, so that neither its
decoders nor its fetching of URLs meet what strangers send.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_cpp.llama_grammar import LlamaGrammar
from PIL import Image

from qap_gguf import _core
from qap_gguf.chat.grammars import check_grammar
from qap_gguf.chat.schemas import checked_grammar, checked_schema
from qap_gguf.chat.tools import ToolChoice, read_tools, response_schema
from qap_gguf.config import LEVELS, WEIGHTS_KEY, PruneConfig
from qap_gguf.defaults import check_weights
from qap_gguf.errors import ConfigError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.generation.chat_formats import ChatFormat
from qap_gguf.generation.chat_template import ChatTemplate, Prompt, fallback_form
from qap_gguf.generation.messages import Turn, images_of, read_messages
from qap_gguf.language.prompt_length import PromptLimit
from qap_gguf.language.vocabulary import Vocabulary
from qap_gguf.serve.forced import ForcedCall
from qap_gguf.serve.request_fields import CHAT, SAMPLING, common, logit_bias
from qap_gguf.serve.settings import ServeSettings
from qap_gguf.vision.sources import ChatImage

_MAX_TOP = 20
#: What llama-server itself cannot know: it tokenizes before the question is compared with anything.
_OF_THE_PROMPT = ("text", "clip_text")


@dataclass
class Prepared:
    """A request for llama-server.

    Attributes:
        body: its JSON.
        images: what stands for its pictures, not loaded yet; :meth:`Preparer.load` puts them in.
        n_pixels: of its pictures, when they are loaded.
        change: what becomes of the answer, or of each chunk of it; None leaves it as it is.
    """

    body: dict[str, Any]
    images: list[ChatImage] = field(default_factory=list)
    n_pixels: int = 0
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def as_png(pixels: Any) -> str:
    """A picture, uint8 RGB (height, width, 3), as a data URI; lossless, and the same text for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _parts(text: str) -> Iterator[dict[str, Any]]:
    """A text with markers as parts: an image for each marker, texts between them."""
    for i, piece in enumerate(text.split(_core.media_marker())):
        if i:
            yield {"type": "image_url", "image_url": {"url": ""}}
        if piece:
            yield {"type": "text", "text": piece}


def _content(content: Any) -> Any:
    """The content of a message with its markers as image parts; white space beside one goes to the text next to it,
    for llama-server puts line breaks between texts."""
    if not isinstance(content, list):
        found = list(_parts(content)) if isinstance(content, str) and _core.media_marker() in content else None
        return content if found is None else found
    out: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            if out and out[-1].get("white"):
                out[-1] = {"type": "text", "text": out[-1]["text"] + part["text"]}
            else:
                out.append({"type": "text", "text": part["text"]})
            continue
        out += [piece | ({"white": True} if piece["type"] == "text" else {}) for piece in _parts(part["text"])]
    return [{key: value for key, value in part.items() if key != "white"} for part in out]


class Preparer:
    """Prepares requests for one model, from several threads; it has the model's vocabulary, not the model.

    Args:
        model, mmproj: the files, which have passed the gate.
        config: the server's own pruning.
        settings: limits.
        chat_format: a format that takes the place of the model's template.

    Raises:
        ModelFileError: the vocabulary or the chat template cannot be used.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path,
        config: PruneConfig,
        settings: ServeSettings,
        chat_format: ChatFormat | None = None,
    ) -> None:
        self.config, self.settings = config, settings
        self._weighted = WEIGHTS_KEY in read_gguf(mmproj).metadata
        self.words = Vocabulary(model)
        self.form = chat_format or fallback_form(self.words.metadata, str(mmproj))
        self.template = ChatTemplate(self.words.address, self.form)
        self.limit = PromptLimit(self.words, settings.n_ctx)
        self._rendering = threading.Lock()

    def close(self) -> None:
        """Let go of the vocabulary."""
        self.words.close()

    # --- chats ---

    def chat(self, body: Mapping[str, Any]) -> Prepared:
        """A chat completion; its pictures are looked at by :meth:`load`.

        Raises:
            ConfigError, ImageError, ModelFileError: what is wrong with it.
        """
        if "messages" not in body:
            raise ConfigError("messages: expected a list of messages, got none; send it")
        out = self._common(body, {**SAMPLING, **CHAT})
        out |= self._prune(body)
        self.limit.check_number(_n_texts(body["messages"]))  # before the thousands of them are read
        turns = read_messages(body["messages"], look_for_files=False)
        images = images_of(turns)
        if len(images) > self.settings.sources.max_images:
            most = self.settings.sources.max_images
            raise ConfigError(f"images: expected at most {most} images in a request, got {len(images)}; send fewer")
        self.limit.check_turns([[part for part in turn.parts or () if isinstance(part, str)] for turn in turns])
        tools = read_tools(*(body.get(name) for name in ("functions", "function_call", "tools", "tool_choice")))
        variables = self._variables(body)
        prompt = self._render(turns, tools, variables)
        can_call = tools.is_open and bool(self.template.has_tool_calls or prompt.native.grammar)
        forced = tools.only() if tools.is_open and tools.choice == "required" and not can_call else None
        out |= self._answer_form(body, tools, can_call)
        if self.form is None or self.form.kind == "jinja":
            messages = self.template.messages(turns)
            out["messages"] = [message | {"content": _content(message.get("content"))} for message in messages]
        else:  # llama-server has the template options.RENDERED
            out["messages"] = [{"role": "user", "content": list(_parts(prompt.text))}]
            out["stop"] = [*out.get("stop", ()), *prompt.stop]
        if variables:
            out["chat_template_kwargs"] = variables
        return Prepared(out, images, change=None if forced is None else ForcedCall(forced))

    def _render(self, turns: Sequence[Turn], tools: ToolChoice, variables: Mapping[str, Any]) -> Prompt:
        """The prompt: the template takes the messages, within its budget and the context."""
        choice = tools.choice if tools.is_open else "none"
        with self._rendering:
            prompt = self.template.render(turns, tools=tools.shown, tool_choice=choice, variables=variables)
        self.limit.check(prompt.text, "messages")
        return prompt

    def _answer_form(self, body: Mapping[str, Any], tools: ToolChoice, can_call: bool) -> dict[str, Any]:
        """Tools, schemas and grammars, checked."""
        out: dict[str, Any] = {}
        schema = response_schema(body.get("response_format"))
        if can_call:
            out |= {"tools": [dict(tool) for tool in tools.tools], "tool_choice": tools.choice}
        elif tools.is_open and tools.choice == "required":
            schema = tools.tools[0]["function"]["parameters"] or {"type": "object"}
        if schema is not None:
            checked = checked_schema(schema)
            checked_grammar(checked)  # llama-server answers a schema that cannot become a grammar with a 500
            wrapped = {"name": "answer", "schema": checked}
            out["response_format"] = {"type": "json_schema", "json_schema": wrapped}
        if body.get("grammar") is not None and schema is None:
            if can_call:
                raise ConfigError("grammar: expected none beside tools, whose calls have a grammar; leave one out")
            out["grammar"] = self._grammar(body["grammar"])
        if body.get("logprobs"):
            if body["logprobs"] is not True:
                raise ConfigError(f"logprobs: expected true or false, got {str(body['logprobs'])[:40]!r}; correct it")
            out |= {"logprobs": True, "top_logprobs": max(1, _top("top_logprobs", body.get("top_logprobs", 0)))}
        return out

    def _grammar(self, text: Any) -> str:
        if not isinstance(text, str):
            raise ConfigError(f"grammar: expected GBNF as text, got {str(text)[:80]!r}; correct it")
        grammar = LlamaGrammar.from_string(text, verbose=False)
        check_grammar(self.words, grammar)
        return text

    def _variables(self, body: Mapping[str, Any]) -> dict[str, Any]:
        given = body.get("chat_template_kwargs") or {}
        if not isinstance(given, dict) or len(given) > 16:
            raise ConfigError("chat_template_kwargs: expected an object of at most 16 fields; correct it")
        for name, value in given.items():
            if not isinstance(value, (bool, str)) or len(str(value)) > 200:
                raise ConfigError(
                    f"chat_template_kwargs: expected true, false or a short text as {name[:40]!r}, "
                    f"got {str(value)[:40]!r}; correct it"
                )
        return given

    # --- texts ---

    def completion(self, body: Mapping[str, Any]) -> Prepared:
        """A completion of plain text.

        Raises:
            ConfigError: what is wrong with it.
        """
        texts = [body.get("prompt")] if not isinstance(body.get("prompt"), list) else body["prompt"]
        if len(texts) != 1 or not isinstance(texts[0], str) or not texts[0]:
            raise ConfigError("prompt: expected one text that is not empty; send one request for each")
        for name in ("suffix", "echo"):
            if body.get(name):
                raise ConfigError(f"{name}: expected none, this server does not do that; leave it out")
        out = self._common({"max_tokens": 16} | dict(body), SAMPLING)
        read_messages([{"role": "user", "content": texts[0]}], look_for_files=False)  # no markers, no lone surrogates
        self.limit.check(texts[0])
        out["prompt"] = texts[0]
        if body.get("grammar") is not None:
            out["grammar"] = self._grammar(body["grammar"])
        if body.get("logprobs") is not None:
            out["logprobs"] = max(1, _top("logprobs", body["logprobs"]))
        return Prepared(out)

    def tokens(self, text: Any) -> list[int]:
        """Token ids of a text, which may not be longer than the context.

        Raises:
            ConfigError: it is longer, or no text.
        """
        if not isinstance(text, str):
            raise ConfigError(f"input: expected a text, got {str(text)[:80]!r}; correct it")
        self.limit.check(text, "input")
        return self.words.tokenize(text.encode("utf-8", "replace"), special=True)

    def text(self, tokens: Any) -> str:
        """The text of token ids.

        Raises:
            ConfigError: no list of ids that there are.
        """
        n_vocab = self.words.n_vocab()
        ids: list[Any] = tokens if isinstance(tokens, list) else [None]
        if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < n_vocab for token in ids):
            raise ConfigError(f"tokens: expected a list of ids from 0 to {n_vocab - 1}; leave the others out")
        return self.words.detokenize(ids).decode("utf-8", "replace")

    # --- both ---

    def load(self, prepared: Prepared) -> None:
        """Fetch and decode the pictures of a request, and put them into its body; takes time.

        Raises:
            ImageError: one that is not allowed, not to be had, no picture, or too large.
        """
        slots = iter(
            part["image_url"]
            for message in prepared.body.get("messages", ())
            for part in message["content"] or ()
            if isinstance(part, dict) and part["type"] == "image_url"
        )
        for image in prepared.images:
            assert not hasattr(image, "tiles")  # JSON holds no encoded images
            pixels = self.settings.sources.load(image)  # type: ignore[arg-type]
            prepared.n_pixels += pixels.shape[0] * pixels.shape[1]
            next(slots)["url"] = as_png(pixels)
        prepared.images = []

    def _common(self, body: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        body = dict(body)
        if "max_tokens" not in body and "max_completion_tokens" in body:
            body["max_tokens"] = body["max_completion_tokens"]
        out = common(body, known)
        most = self.settings.max_tokens
        if most is not None:
            out["max_tokens"] = min(most, out.get("max_tokens", most))
        out |= logit_bias(body, self.words.n_vocab(), self._token_ids)
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise ConfigError(f"model: expected a name, got {str(model)[:80]!r}; correct it")
        return out

    def _token_ids(self, word: str) -> list[int]:
        self.limit.check(word, "logit_bias")
        return self.words.tokenize(word.encode("utf-8", "replace"), add_bos=False, special=True)

    def _prune(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """llama-server's field of that name; all of our fields, so that nothing is left to other defaults."""
        if "prune" not in body:
            return {}
        asked = body["prune"]
        if asked is None or asked is False:
            return {"prune": False}
        if not isinstance(asked, dict):
            raise ConfigError(
                f'prune: expected an object such as {{"n_keep": 64}}, got {str(asked)[:80]!r}; see docs/serve.md'
            )
        told = {name: asked[name] for name in ("indices", "scores") if isinstance(asked.get(name), bool)}
        changes = {name: value for name, value in asked.items() if name not in told}
        changes |= {name: None for name in LEVELS if changes.get(name) == "off"}
        config = self.config.replace(**changes)
        check_semantic(config)
        check_weights(config, self._weighted)
        found = {name: value for name, value in config.to_dict().items() if value is not None}
        off = {name: "off" for name in LEVELS if name not in found}  # over the environment of llama-server
        return {"prune": found | off | told}


def check_semantic(config: PruneConfig) -> None:
    """The semantic score of `config` is one that llama-server has.

    Raises:
        ConfigError: it looks at the prompt.
    """
    if config.semantic in _OF_THE_PROMPT:
        raise ConfigError(
            f"semantic: expected a score of the picture alone, got {config.semantic!r}, which looks at the prompt; "
            "choose auto, cls, attention or none"
        )


def _n_texts(messages: Any) -> int:
    """Messages whose content is a text, which is not empty."""
    given = messages if isinstance(messages, list) else []
    contents = (message.get("content") for message in given if isinstance(message, dict))
    return sum(isinstance(content, str) and content != "" for content in contents)


def _top(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_TOP:
        raise ConfigError(f"{name}: expected an integer from 0 to {_MAX_TOP}, got {str(value)[:40]!r}; correct it")
    return value
