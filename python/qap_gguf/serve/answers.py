"""llama-server's answers on their way to a client: whole, or as server-sent events that nothing holds back."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio
from starlette.responses import JSONResponse, Response

from qap_gguf.serve.problems import RefusedError, describe, error_event, from_upstream, problem
from qap_gguf.serve.upstream import Reply, Upstream

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

#: X-Accel-Buffering: nginx passes events on as they come.
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def events_of(blocks: bytes, rest: bytes) -> tuple[list[bytes], bytes]:
    """Whole events of a stream, each with its blank line, and what is left of the bytes.

    Example:
        >>> events_of(b"data: 1\\n\\ndata: 2", b"")
        ([b'data: 1\\n\\n'], b'data: 2')
    """
    *whole, left = (rest + blocks).split(b"\n\n")
    return [event + b"\n\n" for event in whole], left


def too_slow(seconds: float) -> RefusedError:
    """The error of a request whose time is over."""
    return RefusedError(
        504, f"the answer: expected within {seconds:.0f} seconds; ask for fewer tokens, or later", "timeout"
    )


class Relay:
    """Passes one request on and its answer back; the request ends when its time is over or its client has gone.

    Args:
        upstream: llama-server.
        path: its route.
        body: the request's JSON.
        seconds: how long it may take, and
        begun: since when, by the monotonic clock.
        on_head: called when the answer begins.
        on_result: called with each JSON object of the answer that has ``timings``.
        change: what becomes of the answer, or of each chunk of it.
    """

    def __init__(
        self,
        upstream: Upstream,
        path: str,
        body: dict[str, Any],
        seconds: float,
        begun: float,
        on_head: Callable[[], Awaitable[None]],
        on_result: Callable[[dict[str, Any]], None],
        change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self._upstream, self._path, self._body = upstream, path, body
        self._seconds, self._begun = seconds, begun
        self._on_head, self._on_result, self._change = on_head, on_result, change
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application that has the body already."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._until_gone, receive, tasks.cancel_scope)
            with anyio.move_on_after(max(0.0, self._begun + self._seconds - time.monotonic())) as limit:
                await self._answer(scope, receive, send)
            if limit.cancelled_caught:
                await self._fail(too_slow(self._seconds), scope, receive, send)
            tasks.cancel_scope.cancel()

    @staticmethod
    async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            data, self._body = json.dumps(self._body, ensure_ascii=False, allow_nan=False).encode(), {}
            async with self._upstream.send("POST", self._path, data) as reply:
                del data  # pictures are large
                await self._on_head()
                if reply.status != 200:
                    status, body = from_upstream(reply.status, await reply.read())
                    headers = {"Retry-After": "1"} if status == 503 else None
                    await JSONResponse(body, status, headers=headers)(scope, receive, send)
                elif reply.headers.get("content-type", "").startswith("text/event-stream"):
                    await self._stream(reply, send)
                else:
                    whole = self._read(await reply.read())
                    await Response(whole, media_type="application/json")(scope, receive, send)
        except (RefusedError, UnicodeEncodeError) as err:
            await self._fail(err, scope, receive, send)

    async def _stream(self, reply: Reply, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})
        self._started = True
        async for event in self._events(reply.blocks):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        left = b""
        async for block in blocks:
            events, left = events_of(block, left)
            for event in events:
                if event.startswith(b'data: {"error"'):
                    yield error_event(from_upstream(500, event.removeprefix(b"data: "))[1])
                    continue
                yield b"data: " + self._read(event[6:]) + b"\n\n" if event.startswith(b"data: {") else event
        if left:
            yield left

    def _read(self, data: bytes) -> bytes:
        """Look at a JSON object of the answer, and change it if that was asked for."""
        if self._change is None and b'"timings"' not in data:
            return data.strip()
        found = json.loads(data)
        if "timings" in found:
            self._on_result(found)
        return data.strip() if self._change is None else json.dumps(self._change(found), ensure_ascii=False).encode()

    async def _fail(self, err: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            await send({"type": "http.response.body", "body": error_event(describe(err)[1]), "more_body": False})
        else:
            await problem(err)(scope, receive, send)
