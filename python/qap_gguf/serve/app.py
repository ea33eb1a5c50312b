"""The routes: what clients of OpenAI's API ask a local model, llama-cpp-python's extras, health and metrics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import llama_cpp
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from llama_cpp.server import types
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException

from qap_gguf import _core
from qap_gguf.chat import ChatHandler
from qap_gguf.errors import QapError
from qap_gguf.serve.engine import Engine
from qap_gguf.serve.guard import Guard
from qap_gguf.serve.problems import PROBLEMS, RefusedError, describe, respond
from qap_gguf.serve.schema import ChatRequest, CompletionRequest
from qap_gguf.serve.settings import ServeSettings
from qap_gguf.serve.usage import counted, with_usage

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_OBJECT = {"schema": {"type": "object"}}
_COMPLETION: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A completion; with `stream`, its chunks as server-sent events.",
        "content": {"application/json": _OBJECT, "text/event-stream": {}},
    }
}


def to_json(completion: Any) -> str:
    """A completion as JSON; llama-cpp-python's logprobs are NumPy numbers."""
    return json.dumps(completion, default=float, allow_nan=False)


class EventStream(StreamingResponse):
    """Chunks as server-sent events; what they hold is let go after the last one, or when the client leaves."""

    def __init__(self, chunks: Iterator[Any], held: contextlib.AsyncExitStack) -> None:
        # X-Accel-Buffering: nginx passes events on as they come
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(chunks), media_type="text/event-stream", headers=headers)
        self._chunks, self._held = chunks, held

    @staticmethod
    async def _events(chunks: Iterator[Any]) -> AsyncIterator[str]:
        try:
            async for chunk in iterate_in_threadpool(chunks):
                yield f"data: {to_json(chunk)}\n\n"
        except Exception as err:  # the status is sent already; clients of OpenAI look for this event
            yield f"data: {json.dumps(describe(err)[1])}\n\n"
            return
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                close = getattr(self._chunks, "close", None)
                if close is not None:
                    await anyio.to_thread.run_sync(close)
                await self._held.aclose()


def create_app(llama: llama_cpp.Llama, handler: ChatHandler, settings: ServeSettings | None = None) -> FastAPI:
    """An ASGI application that answers for one model.

    Args:
        llama: the language model; it stays the caller's to close.
        handler: its chat handler; its `sources` become `settings.sources`.
        settings: limits and names.

    Example:
        >>> import llama_cpp
        >>> import qap_gguf as qap
        >>> from qap_gguf.serve import create_app
        >>> files = qap.packaged_model()
        >>> llm = llama_cpp.Llama(str(files.model), n_ctx=512, verbose=False)
        >>> app = create_app(llm, qap.ChatHandler(files.mmproj))
        >>> "/v1/chat/completions" in app.openapi()["paths"]
        True
        >>> llm.close()
    """
    settings = settings or ServeSettings()
    handler.sources = settings.sources
    engine = Engine(llama, handler, settings)
    app = FastAPI(
        title="qap-gguf serve",
        summary="Chat completions about images, with pruned image tokens",
        version=_core.__version__,
        responses=PROBLEMS,
    )
    app.state.engine = engine
    for kind in (QapError, RefusedError, RequestValidationError, HTTPException, UnicodeEncodeError, Exception):
        app.add_exception_handler(kind, respond)

    async def answer(request: Request, body: ChatRequest | CompletionRequest) -> Response:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(engine.admitted())
            usage, messages = None, []
            if isinstance(body, ChatRequest):
                engine.prune_of(body)  # refused before its images are decoded
                messages = await engine.encode(body)
            await stack.enter_async_context(engine.model())
            if await request.is_disconnected():
                raise RefusedError(499, "the client went away")
            if body.stream and body.stream_options.include_usage:
                usage = stack.enter_context(counted(llama))
            if isinstance(body, ChatRequest):
                completion = await engine.chat(body, messages)
            else:
                completion = await engine.complete(body)
            if body.stream:
                chunks = completion if usage is None else with_usage(completion, usage)
                return EventStream(chunks, stack.pop_all())
            return Response(to_json(completion), media_type="application/json")

    @app.post("/v1/chat/completions", tags=["OpenAI"], responses=_COMPLETION)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """A chat completion; images as `image_url` parts, `prune` for this request's pruning."""
        return await answer(request, body)

    @app.post("/v1/completions", tags=["OpenAI"], responses=_COMPLETION)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """A completion of plain text."""
        return await answer(request, body)

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The model."""
        row = {"id": settings.model_name, "object": "model", "created": 0, "owned_by": "qap-gguf"}
        return {"object": "list", "data": [row]}

    @app.post("/extras/tokenize", tags=["Extras"])
    def tokenize(body: types.TokenizeInputRequest) -> dict[str, list[int]]:
        """Token ids of a text."""
        engine.limit.check(body.input, "input")
        return {"tokens": llama.tokenize(body.input.encode("utf-8", "replace"), special=True)}

    @app.post("/extras/tokenize/count", tags=["Extras"])
    def count(body: types.TokenizeInputRequest) -> dict[str, int]:
        """Number of tokens of a text."""
        engine.limit.check(body.input, "input")
        return {"count": len(llama.tokenize(body.input.encode("utf-8", "replace"), special=True))}

    @app.post("/extras/detokenize", tags=["Extras"])
    def detokenize(body: types.DetokenizeInputRequest) -> dict[str, str]:
        """Text of token ids."""
        if not all(0 <= token < llama.n_vocab() for token in body.tokens):
            raise RefusedError(400, f"tokens: expected ids from 0 to {llama.n_vocab() - 1}; leave the others out")
        return {"text": llama.detokenize(body.tokens).decode("utf-8", "replace")}

    @app.get("/health", tags=["Operation"])
    async def health() -> dict[str, Any]:
        """Whether the server answers, and how many requests it has now."""
        return {"status": "ok", "model": settings.model_name, "requests": engine.n_now}

    @app.get("/metrics", tags=["Operation"], response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus' text format."""
        text = engine.metrics.text(handler.cache.stats, handler.n_encodes, engine.n_now)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    app.add_middleware(
        Guard,
        metrics=engine.metrics,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        max_requests=8 * settings.max_requests,
    )
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    return app
