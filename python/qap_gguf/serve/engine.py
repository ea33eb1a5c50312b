"""The model behind the routes: requests become calls of the chat handler, one at a time.

Images of a request are fetched, decoded and encoded before it takes the model; the model is then its own until the
last token is read, also when a stream's reader is slow: the handler's answers are not interleaved.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf.chat import ChatHandler
from qap_gguf.chat.completion import check_settings, merge_bias, steps_of
from qap_gguf.chat.grammars import check_grammar
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError
from qap_gguf.serve.metrics import Metrics
from qap_gguf.serve.problems import RefusedError
from qap_gguf.serve.schema import ChatRequest, CompletionRequest
from qap_gguf.serve.settings import ServeSettings

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "repeat_penalty", "mirostat_mode", "mirostat_tau",
    "mirostat_eta",
)  # fmt: skip
_CHAT = ("functions", "function_call", "tools", "tool_choice", "response_format", "logprobs", "top_logprobs")


class Engine:
    """One language model and its handler, for many requests.

    Args:
        llama: the language model.
        handler: the chat handler; its `sources` are what requests may bring.
        settings: limits.
    """

    def __init__(self, llama: llama_cpp.Llama, handler: ChatHandler, settings: ServeSettings) -> None:
        self.llama, self.handler, self.settings = llama, handler, settings
        self.metrics = Metrics()
        self.n_now = 0
        self._model = anyio.Semaphore(1)
        # a decoded picture is large, a fetched one is waited for
        self._decoding = anyio.CapacityLimiter(16 if settings.sources.allow_urls else 4)

    @contextlib.asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Count a request as being worked on."""
        if self.n_now >= self.settings.max_requests:
            raise RefusedError(503, f"{self.n_now} requests are waiting already; come back later", "overloaded")
        self.n_now += 1
        try:
            yield
        finally:
            self.n_now -= 1

    @contextlib.asynccontextmanager
    async def model(self) -> AsyncIterator[None]:
        """Hold the model."""
        async with self._model:
            started = time.perf_counter()
            try:
                yield
            finally:
                self.metrics.add("seconds_total", time.perf_counter() - started, 'step="held"')

    def prune_of(self, request: ChatRequest) -> dict[str, Any]:
        """The handler's argument `prune`; none where the request leaves it to the server."""
        if not request.asks_to_prune:
            return {}
        if request.prune is None:
            return {"prune": None}
        base = self.handler.prune
        return {"prune": PruneConfig.from_dict(request.prune) if base is None else base.replace(**request.prune)}

    async def encode(self, request: ChatRequest) -> list[dict[str, Any]]:
        """The request's messages, their images encoded."""
        started = time.perf_counter()
        try:
            call = partial(self.handler.encode_images, self.llama, request.messages, **self.prune_of(request))
            return await anyio.to_thread.run_sync(call, limiter=self._decoding)
        finally:
            self.metrics.add("seconds_total", time.perf_counter() - started, 'step="images"')

    async def chat(self, request: ChatRequest, messages: list[dict[str, Any]]) -> Any:
        """A chat completion, or the iterator of its chunks; the model must be held."""
        settings = self._settings(request) | {name: getattr(request, name) for name in _CHAT}
        call = partial(self.handler, llama=self.llama, messages=messages, **self.prune_of(request), **settings)
        completion = await anyio.to_thread.run_sync(call)
        n_images = sum(not isinstance(part, str) for m in messages for part in m["content"] or ())
        self.metrics.add_answer(self.handler.stats, n_images)
        return completion

    async def complete(self, request: CompletionRequest) -> Any:
        """A completion of plain text, or the iterator of its chunks; the model must be held."""
        return await anyio.to_thread.run_sync(self._complete, request)

    def _complete(self, request: CompletionRequest) -> Any:
        settings = self._settings(request)
        vlm = self.handler.vision_model(self.llama)
        stop, stream = settings.pop("stop"), settings.pop("stream")
        plain = {**settings, "typical_p": 1.0, "tfs_z": 1.0}
        stops = check_settings(self.llama, plain, stop, request.logprobs is not None, request.logprobs)
        if request.suffix is not None:
            raise ConfigError("suffix: expected none, this server does not fill in; leave it out")
        n_tokens, most = len(self.llama.tokenize(request.text.encode(), special=True)), self.llama.n_ctx() - 1
        if n_tokens > most:
            raise ConfigError(f"prompt: expected at most {most} tokens (n_ctx less one), got {n_tokens}; shorten it")
        if settings["grammar"] is not None:
            check_grammar(self.llama, settings["grammar"])
        processors = merge_bias(self.llama, settings.pop("logits_processor"), settings.pop("logit_bias"))
        step = steps_of(vlm.answers, self.llama, grammar=settings["grammar"] is not None, signals=None)
        with vlm.answers.turn():
            number = vlm.answers.turns.begin()
            with step():
                completion: Any = self.llama.create_completion(
                    request.text, stop=stops, stream=stream, echo=request.echo, logprobs=request.logprobs,
                    logits_processor=processors, **settings,
                )  # fmt: skip
            return vlm.answers.turns.stream(number, completion, step) if stream else completion

    def _tokens(self, word: str) -> list[int]:
        return self.llama.tokenize(word.encode("utf-8", "replace"), add_bos=False, special=True)

    def _settings(self, request: ChatRequest | CompletionRequest) -> dict[str, Any]:
        """Settings that both kinds of completion have."""
        most = self.settings.max_tokens
        settings: dict[str, Any] = {name: getattr(request, name) for name in _SAMPLING}
        if most is not None and (settings["max_tokens"] is None or settings["max_tokens"] > most):
            settings["max_tokens"] = most
        bias: dict[Any, float] | None = request.logit_bias
        if bias is not None and request.logit_bias_type == "tokens":
            bias = {token: value for word, value in bias.items() for token in self._tokens(word)}
        processors: list[Any] = []
        if request.min_tokens > 0:
            processors.append(llama_cpp.MinTokensLogitsProcessor(request.min_tokens, self.llama.token_eos()))
        return settings | {
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "stop": request.stop,
            "stream": request.stream,
            "model": request.model or self.settings.model_name,
            "grammar": None if request.grammar is None else LlamaGrammar.from_string(request.grammar, verbose=False),
            "logit_bias": bias,
            "logits_processor": processors or None,
        }
