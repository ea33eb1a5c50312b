"""``ChatHandler``: what ``llama_cpp.Llama(chat_handler=...)`` calls for a chat completion, with pruning.

It does what llama-cpp-python's own multimodal handlers do (llama_chat_format.py, ``Llava15ChatHandler`` and
``MTMDChatHandler``: prompt, prefill, then ``Llama.create_completion`` over the prompt that is in the KV cache) through
a :class:`~qap_gguf.VisionModel`, and returns what they return: llama-cpp-python makes and converts the completion.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import llama_cpp
from llama_cpp import llama_chat_format
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf import defaults
from qap_gguf.arguments import check_flag, check_threads
from qap_gguf.chat.completion import check_settings, complete, fitting_tokens, merge_bias
from qap_gguf.chat.grammars import check_grammar
from qap_gguf.chat.tool_answers import convert, convert_stream
from qap_gguf.chat.tools import read_tools, response_grammar, tool_grammar
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import UNSET, Unset
from qap_gguf.errors import ConfigError, QapError
from qap_gguf.files.gguf import check_pair
from qap_gguf.generation.chat_formats import ChatFormat, named_format
from qap_gguf.generation.chat_template import ChatTemplate, Prompt, open_template
from qap_gguf.generation.messages import ImagePart, Turn, images_of, question_of, read_messages
from qap_gguf.generation.settings import GenerationStats
from qap_gguf.language.llama import LanguageModel
from qap_gguf.model import VisionModel
from qap_gguf.runtime.fork import check_process
from qap_gguf.vision.cache import EmbeddingCache
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.resize import check_resize
from qap_gguf.vision.sources import ChatImage, SourceRules


class ChatHandler:
    """Chat completions about images for ``llama_cpp.Llama``, with pruned image tokens.

    How an image is pruned is decided for each call: the argument `prune` of the call, else the innermost
    :meth:`use` or :func:`qap_gguf.use` of the thread, else `prune` of the handler, else :func:`qap_gguf.set_default`,
    else the environment, else the ``qap.*`` keys of the mmproj file, else ``PruneConfig()``, which keeps a quarter of
    the tokens (all of them where the model cannot be pruned). ``QAP_DISABLE=1`` keeps all tokens.

    Args:
        clip_model_path: the mmproj file, as for llama-cpp-python's handlers.
        prune: how to prune where nothing nearer says so; None leaves it to the defaults.
        chat_format: None takes the chat template of the GGUF file, or what its kind was trained on where it has none;
            else a name that llama-cpp-python or llama.cpp knows (``qap_gguf.generation.chat_formats``).
        chat_template: Jinja source that takes the place of both.
        sources: where images may come from; None allows files and data URIs, but fetches nothing.
        device: ggml device of the encoder; None takes a GPU if there is one.
        n_threads: CPU threads of the encoder; None is what the language model uses.
        flash_attn: flash attention in the encoder; None is upstream's choice.
        resize: how pictures come to the encoder's size, see :class:`~qap_gguf.VisionModel`.
        force_family: prune also a family that was not compared with its original, see there.
        cache: where encoded images are kept, so that each is encoded once; None is a cache of its own, in memory.
        max_image_tokens: the most tokens of a picture, see :class:`~qap_gguf.VisionModel`.
        verbose: let upstream write its log to stderr.

    Attributes:
        cache: that cache.
        prune: see above.
        sources: see above.
        stats: counts and times of the last call; those of the answer itself are in its ``usage``.

    Raises:
        ModelFileError: the mmproj file is missing or damaged, or (at the first call) belongs to another model.
        ConfigError: an argument is outside its range.

    Example:
        >>> import llama_cpp
        >>> import qap_gguf as qap
        >>> files = qap.packaged_model()
        >>> handler = qap.ChatHandler(files.mmproj, prune=qap.PruneConfig(n_keep=72))
        >>> llm = llama_cpp.Llama(str(files.model), chat_handler=handler, n_ctx=512, verbose=False)
        >>> question = {"role": "user", "content": [files.sample, "What is in row 1, column 2?"]}
        >>> llm.create_chat_completion([question], temperature=0)["choices"][0]["message"]["content"]
        'house'
        >>> with handler.use(None):  # all tokens, for this block
        ...     answer = llm.create_chat_completion([question], temperature=0)
        >>> handler.stats.n_image_kept
        144
        >>> llm.close()
    """

    def __init__(
        self,
        clip_model_path: str | os.PathLike[str],
        prune: PruneConfig | None = None,
        *,
        chat_format: str | None = None,
        chat_template: str | None = None,
        sources: SourceRules | None = None,
        device: str | None = None,
        n_threads: int | None = None,
        flash_attn: bool | None = None,
        resize: str | None = None,
        force_family: bool = False,
        cache: EmbeddingCache | None = None,
        max_image_tokens: int | None = None,
        verbose: bool = False,
    ) -> None:
        if prune is not None:
            defaults.check_config(prune)
        check_flag("force_family", force_family)
        if chat_format is not None and chat_template is not None:
            raise ConfigError("chat_format and chat_template: expected at most one, got both; leave one out")
        if sources is not None and not isinstance(sources, SourceRules):
            raise ConfigError(f"sources: expected SourceRules, got {type(sources).__name__}; make some")
        check_threads(n_threads)
        check_pair(clip_model_path, None)
        form = None if chat_template is None else ChatFormat(chat_template)
        if chat_format is not None:
            form = named_format(chat_format)  # an unknown name is an error here, not at the first question
        self.clip_model_path = os.fspath(clip_model_path)
        self.prune = prune
        self.sources = sources or SourceRules()
        self.stats = GenerationStats()
        self.cache = EmbeddingCache() if cache is None else cache
        self._form = form
        self._encoder_settings: dict[str, Any] = {"device": device, "flash_attn": flash_attn, "verbose": verbose}
        self._encoder_settings["max_image_tokens"] = max_image_tokens
        self._encoder_settings["resize"] = None if resize is None else check_resize(resize)
        self._encoder_settings["force_family"] = force_family
        self._n_threads = n_threads
        self._lock = threading.RLock()
        self._vlm: VisionModel | None = None
        self._llama: weakref.ReferenceType[llama_cpp.Llama] | None = None
        self._template: ChatTemplate | None = None
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> ChatHandler:
        """A handler whose mmproj comes from the Hugging Face hub (extra ``hub``), as llama-cpp-python's have it.

        Args:
            repo_id: ``owner/name``.
            filename: the mmproj's name, or a pattern that leaves one file; None takes the one in f16.
            revision: a branch, a tag or a commit.
            cache_dir: another cache than the hub's own.
            settings: those of the constructor.

        Raises:
            ModelFileError: no such repository or file, or no network and no copy in the cache.
            ConfigError: no repository id, or huggingface_hub is not installed.
        """
        from qap_gguf.files.hub import fetch_mmproj

        folder = None if cache_dir is None else os.fspath(cache_dir)
        return cls(fetch_mmproj(repo_id, filename, revision=revision, cache_dir=folder), **settings)

    # --- which pruning ---

    @contextlib.contextmanager
    def use(self, prune: PruneConfig | None) -> Iterator[None]:
        """Within the block, and in this thread only, this handler prunes by `prune`, or not at all for None.

        Raises:
            ConfigError: `prune` is neither a PruneConfig nor None.
        """
        with defaults.block(self, prune):
            yield

    def _choose(self, asked: PruneConfig | Unset | None, vlm: VisionModel) -> PruneConfig | None:
        return vlm.choose(asked, self, self.prune)

    # --- a chat completion ---

    def __call__(
        self,
        *,
        llama: llama_cpp.Llama,
        messages: Sequence[Mapping[str, Any]],
        prune: PruneConfig | Unset | None = UNSET,
        functions: Sequence[Any] | None = None,
        function_call: Any = None,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Any = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **template_variables: Any,
    ) -> Any:
        """A chat completion, or an iterator of its chunks; ``Llama.create_chat_completion`` calls this.

        The arguments are those of that method, besides:

        Args:
            llama: the language model.
            messages: OpenAI-style; images as ``image_url`` parts, or as they are (docs/chat.md).
            prune: how to prune the images of this call; None keeps all tokens.
            template_variables: what else the chat template reads.

        Raises:
            ConfigError: malformed messages or settings, or a prompt above n_ctx.
            ImageError: an image that is not allowed, cannot be read or is too large.
            UnsupportedError: the model cannot be pruned as asked.
            ModelFileError: the mmproj belongs to another model, or the chat template refuses the messages.
        """
        sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "typical_p": typical_p,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "repeat_penalty": repeat_penalty,
            "tfs_z": tfs_z,
            "mirostat_mode": mirostat_mode,
            "mirostat_tau": mirostat_tau,
            "mirostat_eta": mirostat_eta,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        stops = check_settings(llama, sampling, stop, logprobs, top_logprobs)
        turns = self._read(messages)
        tools_ = read_tools(functions, function_call, tools, tool_choice)
        vlm, template = self._prepare(llama)
        choice = tools_.choice if tools_.is_open else "none"
        prompt = template.render(turns, tools=tools_.shown, tool_choice=choice, variables=template_variables)
        calls = tools_.is_open and bool(template.has_tool_calls or prompt.native.grammar)
        forced = None if calls or choice != "required" else tools_.only()
        grammar = tools_.arguments_grammar() if forced else response_grammar(response_format) or grammar
        if calls and (grammar is None or choice == "required"):
            grammar = tool_grammar(llama, prompt.native)
        if grammar is not None:
            check_grammar(llama, grammar)
        images = self._encode(vlm, images_of(turns), prompt, prune)
        with vlm.answers.turn():
            chosen, question, stats = self._choose(prune, vlm), question_of(turns), GenerationStats()
            pairs = [(image, None if chosen is None else vlm.prune(image, chosen, question)) for image in images]
            number = vlm.answers.place(prompt.text, pairs, stats, add_special=True)
            self.stats = stats
            sampling["max_tokens"] = fitting_tokens(vlm.answers, max_tokens)
            completion = complete(
                vlm.answers,
                llama,
                number,
                llama.input_ids[: llama.n_tokens].tolist(),
                stream=stream,
                logits_processor=merge_bias(llama, logits_processor, logit_bias),
                markers=prompt.native.preserved_tokens if calls else (),
                stop=[*stops, *prompt.stop],
                model=model,
                grammar=grammar,
                logprobs=(top_logprobs or 0) if logprobs else None,
                **sampling,
            )
        if forced is not None:
            return llama_chat_format._convert_completion_to_chat_function(forced, completion, stream)
        if calls:
            return convert_stream(completion, prompt.native) if stream else convert(completion, prompt.native)
        return llama_chat_format._convert_completion_to_chat(completion, stream=stream)

    def encode_images(
        self,
        llama: llama_cpp.Llama,
        messages: Sequence[Mapping[str, Any]],
        prune: PruneConfig | Unset | None = UNSET,
        **for_template: Any,
    ) -> list[dict[str, Any]]:
        """The same messages with each image encoded: a call with them waits for no disk, network or decoder.

        Args:
            llama: see the call itself.
            messages: the same.
            prune: the same.
            for_template: `functions`, `function_call`, `tools`, `tool_choice` and what else the chat template reads: a
                prompt that cannot fit is refused before its images are encoded.

        Raises:
            ConfigError, ImageError, UnsupportedError: see the call itself.
        """
        turns = self._read(messages)
        vlm, template = self._prepare(llama)
        old = {name: for_template.pop(name, None) for name in ("functions", "function_call", "tools", "tool_choice")}
        tools_ = read_tools(old["functions"], old["function_call"], old["tools"], old["tool_choice"])
        choice = tools_.choice if tools_.is_open else "none"
        prompt = template.render(turns, tools=tools_.shown, tool_choice=choice, variables=for_template)
        images = iter(self._encode(vlm, images_of(turns), prompt, prune))

        def encoded(part: str | ImagePart) -> str | ImageEmbedding:
            return part if isinstance(part, str) else next(images)

        def content(turn: Turn) -> Any:
            parts = None if turn.parts is None else [encoded(part) for part in turn.parts]
            return parts[0] if parts and not turn.is_list else parts

        return [{**turn.fields, "content": content(turn)} for turn in turns]

    def _read(self, messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
        return read_messages(messages, look_for_files=self.sources.allow_files)

    def _encode(
        self, vlm: VisionModel, sources: list[ChatImage], prompt: Prompt, prune: PruneConfig | Unset | None
    ) -> list[ImageEmbedding]:
        if len(sources) > self.sources.max_images:
            raise ConfigError(
                f"messages: expected at most {self.sources.max_images} images, got {len(sources)}; send fewer"
            )
        pictures = [p if isinstance(p, ImageEmbedding) else self.sources.load(p) for p in sources]
        return vlm.encode_fitting(prompt.text, True, pictures, self._choose(prune, vlm))

    # --- the model underneath ---

    def vision_model(self, llama: llama_cpp.Llama) -> VisionModel:
        """The vision model around `llama`, which shares its KV cache, encoded images and turns with this handler."""
        return self._prepare(llama)[0]

    def _prepare(self, llama: llama_cpp.Llama) -> tuple[VisionModel, ChatTemplate]:
        """The vision model around `llama`, made at its first call, and its chat template."""
        check_process(int(llama.n_threads_batch))  # a lock may be held by a thread that the fork left behind
        with self._lock:
            return self._prepare_locked(llama)

    def _prepare_locked(self, llama: llama_cpp.Llama) -> tuple[VisionModel, ChatTemplate]:
        if self._closed:
            raise QapError("this ChatHandler is closed; make a new one")
        if self._vlm is not None and self._template is not None and self._llama is not None and self._llama() is llama:
            return self._vlm, self._template
        self._forget()
        language = LanguageModel(llama)  # refuses a closed Llama and one that does not generate
        template = open_template(language, self.clip_model_path, self._form)
        # A strong reference would be a cycle (a Llama holds its handler), and some GB would wait for the collector.
        vlm = VisionModel(
            self.clip_model_path,
            weakref.proxy(llama),
            n_threads=self._n_threads or int(llama.n_threads),
            cache=self.cache,
            **self._encoder_settings,
        )
        llama._stack.callback(vlm.close)  # before the language model goes, as llama-cpp-python's handlers do it
        self._vlm, self._template, self._llama = vlm, template, weakref.ref(llama)
        return vlm, template

    @property
    def n_encodes(self) -> int:
        """How often the image encoder has run for the language model that was used last."""
        return 0 if self._vlm is None else self._vlm.n_encodes

    def _forget(self) -> None:
        if self._vlm is not None:
            self._vlm.close()
        self._vlm = self._template = self._llama = None

    def close(self) -> None:
        """Free the encoder; the language model stays its owner's. Closing twice is fine."""
        with self._lock:
            self._forget()
            self._closed = True

    def __enter__(self) -> ChatHandler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
