"""The routes: what clients of OpenAI's API ask a local model, llama-cpp-python's extras, health and metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qap_gguf.errors import QapError
from qap_gguf.serve.answers import Relay, too_slow
from qap_gguf.serve.guard import Guard
from qap_gguf.serve.metrics import Metrics
from qap_gguf.serve.page import page_routes
from qap_gguf.serve.problems import RefusedError, problem, respond
from qap_gguf.serve.request_fields import parse
from qap_gguf.serve.requests import Prepared, Preparer
from qap_gguf.serve.settings import ServeSettings
from qap_gguf.serve.upstream import Upstream

#: Headers of a route of llama-server's that is passed on as it is.
_PASSED = ("content-type", "cache-control", "etag")
#: Commas and brackets of a body: its fields, a schema, tools; and those in texts that fit the context.
_VALUES, _VALUES_OF_A_TOKEN = 100_000, 8
#: Bytes beside its pictures above which a body is checked alone: Python does one thing at a time, and small requests
#: share that time with one large one instead of many.
_LARGE = 1 << 16


def _picture_bytes(body: dict[str, Any]) -> int:
    """Characters of the pictures in a chat."""
    found, messages = 0, body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            url = part.get("image_url") if isinstance(part, dict) else None
            url = url.get("url") if isinstance(url, dict) else url
            found += len(url) if isinstance(url, str) else 0
    return found


class _Weight:
    """Lets requests go on while what they weigh together is at most `most`; one that is alone always may."""

    def __init__(self, most: int) -> None:
        self._most, self._now, self._changed = most, 0, anyio.Condition()

    @contextlib.asynccontextmanager
    async def held(self, weight: int) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Hold a weight for the block, or until what it gives is called."""
        async with self._changed:
            while self._now and self._now + weight > self._most:
                await self._changed.wait()
            self._now += weight
        held = True

        async def let_go() -> None:
            nonlocal held
            if held:
                held = False
                self._now -= weight
                async with self._changed:
                    self._changed.notify_all()

        try:
            yield let_go
        finally:
            with anyio.CancelScope(shield=True):
                await let_go()


class Application:
    """The guard's routes for one llama-server.

    Args:
        upstream: llama-server.
        preparer: reads and checks requests.
        settings: limits and names.
        metrics: counts.
        watch: runs beside the routes as long as they do: it watches llama-server.
    """

    def __init__(
        self,
        upstream: Upstream,
        preparer: Preparer,
        settings: ServeSettings,
        metrics: Metrics,
        watch: Callable[[Application], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.upstream, self.preparer, self.settings, self.metrics = upstream, preparer, settings, metrics
        self.n_now = 0
        self._watch = watch
        rules = settings.sources
        # a decoded picture is large, a fetched one is waited for
        self._decoding = anyio.CapacityLimiter(16 if rules.allow_urls else 4)
        self._checking = anyio.CapacityLimiter(1)
        # llama-server holds the pixels of a request until it has made the encoder's input of them
        self._pixels = _Weight(rules.max_pixels * rules.max_images)

    def asgi(self) -> Starlette:
        """The application, with its guard in front."""
        settings = self.settings
        routes = [
            Route("/v1/chat/completions", self._as_endpoint(self.chat), methods=["POST"]),
            Route("/v1/completions", self._as_endpoint(self.complete), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/extras/tokenize", self.tokenize, methods=["POST"]),
            Route("/extras/tokenize/count", self.count, methods=["POST"]),
            Route("/extras/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.text_of_metrics),
            *page_routes(settings, self.preparer.config),
        ]
        if settings.routes:
            routes.append(Route("/{path:path}", self.pass_on, methods=["GET", "POST", "DELETE", "PUT"]))
        middleware = [
            Middleware(
                Guard,
                metrics=self.metrics,
                api_key=settings.api_key,
                max_body_bytes=settings.max_body_bytes,
                max_requests=8 * settings.max_requests,
            )
        ]
        if settings.cors:
            cors = Middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
            middleware.insert(0, cors)
        kinds: tuple[type[Exception], ...] = (QapError, RefusedError, HTTPException, UnicodeEncodeError, Exception)
        handlers: Any = dict.fromkeys(kinds, respond)
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            if self._watch is not None:
                tasks.start_soon(self._watch, self)
            yield
            tasks.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Count a request as being worked on."""
        if self.n_now >= self.settings.max_requests:
            raise RefusedError(503, f"{self.n_now} requests are waiting already; come back later", "overloaded")
        self.n_now += 1
        try:
            yield
        finally:
            self.n_now -= 1

    # --- completions ---

    @staticmethod
    def _as_endpoint(answer: Callable[[Request, Scope, Receive, Send], Awaitable[None]]) -> Any:
        class Endpoint:
            """An ASGI application, so that answers are passed on by :class:`Relay`, not through a response."""

            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                try:
                    await answer(Request(scope, receive), scope, receive, send)
                except (QapError, RefusedError, UnicodeEncodeError) as err:
                    await problem(err)(scope, receive, send)

        return Endpoint()

    async def chat(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """A chat completion; images as `image_url` parts, `prune` for this request's pruning."""
        await self._answer(request, self.preparer.chat, "/v1/chat/completions", scope, receive, send)

    async def complete(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """A completion of plain text."""
        await self._answer(request, self.preparer.completion, "/v1/completions", scope, receive, send)

    async def _answer(
        self,
        request: Request,
        prepare: Callable[[dict[str, Any]], Prepared],
        path: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        seconds = self.settings.max_seconds
        begun = time.monotonic()
        body = await self._json(request)
        async with self._admitted(), contextlib.AsyncExitStack() as stack:
            try:
                with anyio.fail_after(seconds):
                    prepared = await self._prepared(prepare, body, await self._limiter(request, body))
                    let_go = await stack.enter_async_context(self._pixels.held(prepared.n_pixels))
            except TimeoutError as err:
                raise too_slow(seconds) from err
            noted, change = self.metrics.add_result, prepared.change
            relay = Relay(self.upstream, path, prepared.body, seconds, begun, let_go, noted, change)
            prepared.body = {}
            await relay(scope, receive, send)

    async def _prepared(
        self, prepare: Callable[[dict[str, Any]], Prepared], body: dict[str, Any], limiter: anyio.CapacityLimiter | None
    ) -> Prepared:
        started = time.perf_counter()
        prepared = await anyio.to_thread.run_sync(prepare, body, limiter=limiter)
        if prepared.images:
            await anyio.to_thread.run_sync(self.preparer.load, prepared, limiter=self._decoding)
            self.metrics.add("seconds_total", time.perf_counter() - started, 'step="images"')
        return prepared

    async def _limiter(self, request: Request, body: dict[str, Any]) -> anyio.CapacityLimiter | None:
        """What a request waits for before it is checked: nothing, or the large one that is checked now."""
        return self._checking if len(await request.body()) - _picture_bytes(body) > _LARGE else None

    async def _json(self, request: Request) -> dict[str, Any]:
        most = _VALUES + _VALUES_OF_A_TOKEN * self.settings.n_ctx
        return parse(await request.body(), request.headers.get("content-type", ""), most)

    # --- what is answered here ---

    async def models(self, _request: Request) -> Response:
        """The model."""
        row = {"id": self.settings.model_name, "object": "model", "created": 0, "owned_by": "qap-gguf"}
        return JSONResponse({"object": "list", "data": [row]})

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text."""
        return JSONResponse({"tokens": await self._tokens(request)})

    async def count(self, request: Request) -> Response:
        """Number of tokens of a text."""
        return JSONResponse({"count": len(await self._tokens(request))})

    async def _tokens(self, request: Request) -> list[int]:
        body = await self._json(request)
        limiter = await self._limiter(request, body)
        return await anyio.to_thread.run_sync(self.preparer.tokens, body.get("input"), limiter=limiter)

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        body = await self._json(request)
        return JSONResponse({"text": await anyio.to_thread.run_sync(self.preparer.text, body.get("tokens"))})

    async def health(self, _request: Request) -> Response:
        """Whether the server answers, and how many requests it has now."""
        return JSONResponse({"status": "ok", "model": self.settings.model_name, "requests": self.n_now})

    async def text_of_metrics(self, _request: Request) -> Response:
        """Counters in Prometheus' text format, ours and llama-server's."""
        text = self.metrics.text(self.n_now)
        with contextlib.suppress(RefusedError), anyio.move_on_after(5):
            async with self.upstream.send("GET", "/metrics") as reply:
                if reply.status == 200:
                    text += (await reply.read()).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # --- routes of llama-server that were asked for ---

    async def pass_on(self, request: Request) -> Response:
        """A route of llama-server, as it is: neither its fields nor its pictures are looked at."""
        if not self.settings.passes(request.url.path):
            raise HTTPException(404)
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        kind = request.headers.get("content-type", "application/json")
        body = await request.body()
        stack = contextlib.AsyncExitStack()
        try:
            await stack.enter_async_context(self._admitted())
            reply = await stack.enter_async_context(self.upstream.send(request.method, target, body, kind))
        except BaseException:
            await stack.aclose()
            raise

        async def blocks() -> AsyncIterator[bytes]:
            async with stack:
                async for block in reply.blocks:
                    yield block

        headers = {name: value for name, value in reply.headers.items() if name in _PASSED}
        return StreamingResponse(blocks(), reply.status, headers=headers)
